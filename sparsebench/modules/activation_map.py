"""The activation map of a convolutional network: a ReLU that stands alone, can be counted, and can drop more than ReLU.

ReLU6 is such a map, too: it keeps its clip at 6. `isolate` gives every ReLU call of a traced network such a module of its
own, however the network wrote it (a module, one module called twice, a function), so that methods and counters find maps
by structure, not by the model's name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsebench.modules.base import MapCounter, SparseModule

PRODUCTS = (nn.Conv2d, nn.Linear)  # what reads a map


def spatial_topk(z: torch.Tensor, keep: float) -> torch.Tensor:
    """Keep the k = max(1, round(keep * H * W)) largest |z| of each image's each channel map, zero the rest.

    z [N, C, H, W]; ties: the lowest position wins, so exactly k positions stay. The gradient passes where z was kept
    (arXiv 2310.18894, the shape-bias experiments: groups are spatial, so no channel is ever switched off).
    """
    positions = z.shape[2] * z.shape[3]
    k = max(1, round(keep * positions))
    if k == positions:
        return z
    order = z.detach().abs().flatten(2).argsort(dim=2, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=z.dtype).scatter_(2, order[..., :k], 1)
    return z * mask.view_as(z)


class ActivationMap(SparseModule):
    """y = ReLU(x), at most `ceiling`; then 0 where y < threshold (FATReLU keeps y >= threshold); then top-k per channel map.

    Args:
        site: name in records.
        threshold: FATReLU's t, or None for plain ReLU.
        keep: share of each channel map that `spatial_topk` keeps, or None.
        ceiling: 6 for ReLU6, None for ReLU.
    """

    def __init__(
        self, site: str, threshold: float | None = None, keep: float | None = None, ceiling: float | None = None
    ):
        super().__init__()
        self.site, self.threshold, self.keep, self.ceiling = site, threshold, keep, ceiling

    def new_counter(self) -> MapCounter:
        return MapCounter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(x) if self.ceiling is None else F.hardtanh(x, 0.0, self.ceiling)
        if self.threshold:
            y = torch.where(y >= self.threshold, y, 0)
        if self.keep is not None and y.dim() == 4:
            y = spatial_topk(y, self.keep)
        if self.counter is not None:
            self.counter.add(y)
        return y

    def extra_repr(self) -> str:
        return f"{self.site}, threshold={self.threshold}, keep={self.keep}"


def maps_of(module: nn.Module) -> Iterator[ActivationMap]:
    """The activation maps of a network in the order of its forward pass."""
    return (m for m in module.modules() if isinstance(m, ActivationMap))


def isolate(module: nn.Module) -> nn.Module:
    """The same network as a traced one in which every ReLU that feeds a convolution or linear map is an ActivationMap.

    Parameter names and values stay. Raises ValueError where the network can't be traced, and where no such ReLU is found.
    """
    try:
        graph = fx.Tracer().trace(module)
    except (fx.proxy.TraceError, TypeError) as error:
        raise ValueError(f"model: {type(module).__name__} can't be traced to find its ReLUs ({error})") from error
    sites: dict[str, ActivationMap] = {}
    calls = [node for node in graph.nodes if is_relu(node, module) and feeds_products(node, module)]
    for node in calls:
        site = name = site_name(node)
        repeat = 1
        while site in sites:
            repeat += 1
            site = f"{name}.{repeat}"
        target = f"maps.{len(sites)}"
        sites[site] = ActivationMap(site, ceiling=6.0 if is_relu6(node, module) else None)
        with graph.inserting_after(node):
            replacement = graph.create_node("call_module", target, (input_of(node),))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    if not sites:
        raise ValueError(f"model: no ReLU or ReLU6 before a convolution or linear map in {type(module).__name__}")
    module.maps = nn.ModuleList(sites.values())
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(node.target), (nn.ReLU, nn.ReLU6))
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in (F.relu, torch.relu, torch.relu_, F.relu6)


def is_relu6(node: fx.Node, module: nn.Module) -> bool:
    return node.target is F.relu6 or (
        node.op == "call_module" and isinstance(module.get_submodule(node.target), nn.ReLU6)
    )


def input_of(node: fx.Node) -> fx.Node:
    """What a ReLU call reads."""
    return node.args[0] if node.args else node.kwargs["input"]


def site_name(node: fx.Node) -> str:
    """The path of the ReLU module, or of the module that made its input with `relu` for the last part."""
    if node.op == "call_module":
        return str(node.target)
    source = input_of(node)
    parent = str(source.target).rpartition(".")[0] if source.op == "call_module" else ""
    return f"{parent}.relu" if parent else node.name


def feeds_products(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node's value reaches a convolution or linear map without passing another ReLU."""
    waiting, seen = list(node.users), set()
    while waiting:
        user = waiting.pop()
        if user in seen or user.op == "output" or is_relu(user, module):
            continue
        seen.add(user)
        if user.op == "call_module" and isinstance(module.get_submodule(user.target), PRODUCTS):
            return True
        waiting += user.users
    return False
