"""Where the time of a step goes in engines that are not marked from within: by module where Python runs, else by kernel.

`by_module` puts marks around the modules of an eager model; what a module does itself is told from what modules inside it
do. `kernels` asks the profiler for the kernels that a GPU ran, which is the only way into a captured graph.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sparsebench.modules.base import SparseModule
from sparsebench.sites import ATTENTIONS, FFNS

ROLE_OF = {
    "q": "qkv", "k": "qkv", "v": "qkv", "qkv": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "gate_up": "gate_up",
    "fc1": "gate_up", "down": "down", "fc2": "down",
    "q_a": "qkv", "kv_a": "qkv", "q_b": "qkv", "kv_b": "qkv",
}  # fmt: skip
PATHS = {f".{path}": role for layout in (*ATTENTIONS, *FFNS) for role, path in layout.items()}  # endings of names
HOLDERS = {  # what holds the maps of attention and of the FFN, in decoders: what neither map does is theirs
    path.rpartition(".")[0]: "attention" if role == "o" else "ffn"
    for path, role in PATHS.items() if role in ("o", "down", "fc2")
}  # fmt: skip
KINDS = (  # of kernels that a compiler or a library chose, by what their names hold
    ("attention", re.compile("flash|fmha|attention|sdpa", re.IGNORECASE)),
    ("products", re.compile("gemm|gemv|cutlass|cublas|nvjet|splitk|matmul|(^|_)(add)?b?mm(_|$)", re.IGNORECASE)),
    ("copies", re.compile("memcpy|memset", re.IGNORECASE)),
    ("norms and elementwise", re.compile("")),
)


# ---------------------------------------------------------------------------------------------------------------------
# By module


def role(name: str, module: nn.Module) -> str | None:
    """What a module is in a step, by what it says of itself, else by its name; None: its time is that of what holds it."""
    kinds = (
        {ROLE_OF.get(site.partition(".")[2]) for site in module.covers} if isinstance(module, SparseModule) else set()
    )
    if kinds - {None}:
        return str(kinds.pop()) if len(kinds) == 1 else "ffn"
    path = next((path for path in PATHS if f".{name}".endswith(path)), None)
    if path is not None:
        return ROLE_OF[PATHS[path]]
    holder = next((holder for holder in HOLDERS if holder and f".{name}".endswith(holder)), None)
    if holder is not None:
        return HOLDERS[holder]
    if isinstance(module, nn.Embedding):
        return "embed"
    return "norm" if "norm" in type(module).__name__.lower() else None


def roles(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules of a causal LM that have a role, each with its own."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        told = "head" if module is head else role(name, module)
        if told is not None:
            yield module, told


class Marks:
    """Moments on the clock of a device at which the work passes from one role to another."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.moments: list[tuple[object, str | None]] = []  # (when, the role from then on)
        self.inside: list[str] = []

    def now(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(self, role: str) -> None:
        self.inside.append(role)
        self.moments.append((self.now(), role))

    def leave(self) -> None:
        self.inside.pop()
        self.moments.append((self.now(), self.inside[-1] if self.inside else None))

    def milliseconds(self) -> Counter[str]:
        """The time of each role."""
        if self.on_gpu:
            torch.cuda.synchronize()
        sums: Counter[str] = Counter()
        for (start, role), (end, _) in zip(self.moments, self.moments[1:], strict=False):
            if role is not None:
                sums[role] += start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)  # type: ignore[attr-defined, operator]
        return sums


def by_module(model: nn.Module, take: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of a step by role while `take` takes so many eager steps of `model`."""
    marks, hooks = Marks(next(model.parameters()).device), []
    for module, told in roles(model):
        hooks.append(module.register_forward_pre_hook(lambda *_, told=told: marks.enter(told)))
        hooks.append(module.register_forward_hook(lambda *_: marks.leave()))
    try:
        take()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: ms / steps for name, ms in marks.milliseconds().items()}


# ---------------------------------------------------------------------------------------------------------------------
# By kernel


@dataclass(frozen=True)
class Kernel:
    """One kernel that a GPU ran: its name, and when, in microseconds."""

    name: str
    start: float
    end: float


def kernels(take: Callable[[], object]) -> list[Kernel]:
    """The kernels (and copies) that `take` made the GPU run, by their start. Raises ValueError where none were seen."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        take()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    if not events:
        raise ValueError(
            "the profiler saw no kernels (CUPTI may be closed to this user, or in use by another profiler)"
        )
    return sorted((Kernel(e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda k: k.start)


def own_times(every: list[Kernel]) -> list[float]:
    """Microseconds that each kernel adds to the time in which any of them runs.

    Kernels may overlap: one is launched while the one before it drains, and waits. So each counts from where all before
    it ended, if that is later than its own start; then the sum is the time that the GPU was busy.
    """
    times, busy = [], float("-inf")
    for kernel in every:
        times.append(max(0.0, kernel.end - max(kernel.start, busy)))
        busy = max(busy, kernel.end)
    return times


def by_order(take: Callable[[], object], steps: int, names: list[str], labels: list[str]) -> dict[str, float]:
    """Milliseconds of a step by label, of a graph whose kernels run in a known order.

    names: of a step's kernels in order; labels: what each is. Kernels of other names (a copy of the token) are nobody's.
    Raises ValueError where the kernels that ran are not those.
    """
    every = kernels(take)
    mine = [(kernel, us) for kernel, us in zip(every, own_times(every), strict=True) if kernel.name in set(names)]
    if [kernel.name for kernel, _ in mine] != names * steps:
        raise ValueError(f"the profiler saw {len(mine)} kernels of {len(names) * steps}, or not in their order")
    sums: Counter[str] = Counter()
    for (_, us), label in zip(mine, labels * steps, strict=True):
        sums[label] += us / 1e3 / steps
    return dict(sums)


def by_name(take: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel (KINDS), where a compiler chose and named them."""
    every, sums = kernels(take), Counter()
    for kernel, us in zip(every, own_times(every), strict=True):
        sums[next(kind for kind, names in KINDS if names.search(kernel.name))] += us / 1e3 / steps
    return dict(sums)
