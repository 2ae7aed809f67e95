"""The activation map of a convolutional network: a ReLU that stands alone, can be counted, and can drop more than ReLU.

ReLU6 is such a map, too: it keeps its clip at 6. `isolate` gives every ReLU call of a traced network such a module of its
own, however the network wrote it (a module, one module called twice, a function), so that methods and counters find maps
by structure, not by the model's name. In a network that can't be traced it takes the place of the ReLU modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from sparsebench.modules.base import MapCounter, SparseModule

PRODUCTS = (nn.Conv2d, nn.Linear)  # what reads a map
RELUS = (nn.ReLU, nn.ReLU6)
FUNCTIONS = (F.relu, F.relu6, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)


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


def needed_maps(module: nn.Module, method: str) -> list[ActivationMap]:
    """The activation maps of a network. Raises ValueError where it has none, so that `method` would do nothing."""
    maps = list(maps_of(module))
    if not maps:
        raise ValueError(
            f"method={method} needs a network with ReLU or ReLU6 before its convolutions and linear maps: "
            f"{type(module).__name__} has none"
        )
    return maps


class Tracer(fx.Tracer):
    """A library's own convolutions and linear maps stay whole: how they pad depends on their input's shape."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PRODUCTS) or super().is_leaf_module(m, module_qualified_name)


def isolate(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """The same network as a traced one in which every ReLU that feeds a convolution or linear map is an ActivationMap.

    example: an input [1, C, H, W], which the network must take. Parameter names and values stay. A network that can't be
    traced keeps its form, and its ReLU modules become maps. Raises ValueError where that would miss some.
    """
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(example)
    except Exception as error:
        shape = " x ".join(map(str, example.shape[1:]))
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"model: {type(module).__name__} does not take images of {shape} ({reason})") from error
    try:
        graph = Tracer().trace(module)
    except Exception:  # tracing runs the network's own code with stand-ins for tensors, which may raise anything
        return in_place(module, example).train(mode)
    sites: dict[str, ActivationMap] = {}
    for node in [node for node in graph.nodes if is_relu(node, module) and feeds_products(node, module)]:
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
    module.maps = nn.ModuleList(sites.values())
    return fx.GraphModule(module, graph, class_name=type(module).__name__).train(mode)


def in_place(module: nn.Module, example: torch.Tensor) -> nn.Module:
    """`module` with a map in the place of every ReLU module. Raises ValueError where other ReLUs would be left.

    What a map feeds can't be seen without a trace: all ReLU modules count as maps.
    """
    relus = {path: m for path, m in module.named_modules(remove_duplicate=False) if isinstance(m, RELUS)}
    calls = Calls(list(relus.values()))
    with calls, torch.no_grad():
        module(example)
    calls.remove()
    if calls.functions or calls.modules > len(relus):
        raise ValueError(
            f"model: {type(module).__name__} can't be traced, and not each of its ReLUs is a module that is called once "
            f"({calls.modules} calls of {len(relus)} modules, {calls.functions} of functions)"
        )
    for path, relu in relus.items():
        module.set_submodule(path, ActivationMap(path, ceiling=6.0 if isinstance(relu, nn.ReLU6) else None))
    return module


class Calls(TorchFunctionMode):
    """How often ReLUs are called while it is active: as modules, and as functions outside of them."""

    def __init__(self, relus: list[nn.Module]):
        super().__init__()
        self.modules = self.functions = 0
        self.inside = False
        hooks = ((m.register_forward_pre_hook(self.enter), m.register_forward_hook(self.leave)) for m in {*relus})
        self.hooks = [hook for pair in hooks for hook in pair]

    def enter(self, module: nn.Module, args) -> None:
        self.modules, self.inside = self.modules + 1, True

    def leave(self, module: nn.Module, args, output) -> None:
        self.inside = False

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions += func in FUNCTIONS and not self.inside
        return func(*args, **(kwargs or {}))


def is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(node.target), RELUS)
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
