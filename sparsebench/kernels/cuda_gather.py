"""Sparse products and expert FFNs of one row on an NVIDIA GPU: the kernels of decode.cu as operators of torch.

One row, fp16 or bf16. The kept channels are compacted inside the kernel; the last CTA of each tile of outputs adds the
bias and rounds. It can be captured in CUDA graphs and compiled through (fullgraph), and needs no compiler installed.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsebench.kernels import _nvrtc

SOURCE = Path(__file__).with_name("decode.cu")
Pointer = ctypes.c_void_p


class Gather(ctypes.Structure):
    """Arguments of decode.cu's `gather`: up to 6 products in one launch."""

    _fields_ = [
        *((name, Pointer * 6) for name in ("weight", "input", "out", "scale", "threshold")),
        *((name, ctypes.c_int * 6) for name in ("m", "n", "complement")),
        ("second", Pointer), ("norm", Pointer), ("eps", ctypes.c_float), ("zero", Pointer), ("zero_count", ctypes.c_int),
        ("result", Pointer), ("bias", Pointer), ("arrived", Pointer),
        ("top_k", ctypes.c_int * 6), ("choice", Pointer * 6), ("guess", Pointer * 6),
    ]  # fmt: skip

    def choose(self, i: int, top_k: int, choice: torch.Tensor, guess: torch.Tensor | None = None) -> None:
        """Product i keeps the largest k, as the word `choice` (8 bytes, zero before) will say; top_k -1: another writes it."""
        self.top_k[i], self.choice[i] = top_k, choice.data_ptr()
        self.guess[i] = None if guess is None else guess.data_ptr()

    def set_part(self, i: int, weight, x, out, threshold, scale=None, *, complement=False) -> None:
        """Product i: out [m] += weight [n, m] transposed times x [n] where |x| c > t, or where it isn't."""
        tensors = {"weight": weight, "input": x, "out": out, "threshold": threshold, "scale": scale}
        for name, tensor in tensors.items():
            getattr(self, name)[i] = None if tensor is None else tensor.data_ptr()
        (self.n[i], self.m[i]), self.complement[i] = weight.shape, int(complement)


class Rows(ctypes.Structure):
    """Arguments of decode.cu's `rows`."""

    _fields_ = [
        ("weight", Pointer), ("input", Pointer), ("half", Pointer), ("norm", Pointer), ("gate", Pointer), ("out", Pointer),
        ("eps", ctypes.c_float), ("m", ctypes.c_int), ("n", ctypes.c_int),
        ("token", Pointer), ("position", Pointer), ("best", Pointer), ("best_row", Pointer), ("arrived", Pointer),
        ("zero", Pointer), ("zero_count", ctypes.c_int), ("active", Pointer), ("least", Pointer),
    ]  # fmt: skip


class Keep(ctypes.Structure):
    """Arguments of decode.cu's `expert_keep`."""

    _fields_ = [
        ("weight", Pointer), ("x", Pointer), ("threshold", Pointer), ("keep", Pointer),
        ("wide", ctypes.c_int), ("d", ctypes.c_int),
    ]  # fmt: skip


class Experts(ctypes.Structure):
    """Arguments of decode.cu's `expert_hidden`, `expert_hidden_gated` and `expert_last`."""

    _fields_ = [
        *((name, Pointer) for name in ("first", "first_bias", "up", "up_bias", "last", "last_bias", "x", "keep")),
        *((name, Pointer) for name in ("hidden", "sums", "result", "arrived")),
        *((name, ctypes.c_int) for name in ("d", "n", "experts", "size", "activation")),
    ]


@dataclass(frozen=True)
class Tuning:
    """How a kernel is built and spread: warps per CTA, 16-byte loads in flight, loads per lane and channel, CTAs per SM."""

    warps: int = 8
    loads: int = 4
    wide: int = 1
    per_sm: float = 4.0


def gather_bytes(tuning: Tuning) -> int:
    """Shared memory of a gather: the ring of rows in flight, compacted values and indices, a counter, scratch."""
    return tuning.warps * 32 * (max(tuning.loads, 2) * tuning.wide * 16 + 8 * 6) + tuning.warps * 4 + 16


def choose_bytes(n: int, tuning: Tuning) -> int:
    """Shared memory of a choice among n scores (select.cu): bins, scratch and all scores."""
    return (1024 + tuning.warps + 3 + n) * 4


def rows_bytes(n: int, tuning: Tuning) -> int:
    """Shared memory of `rows`: the input in fp32 and scratch per warp."""
    return (n + 3 * tuning.warps) * 4 + 16


def hidden_bytes(d: int, experts: int, size: int, ctas: int, tuning: Tuning) -> int:
    """Shared memory of `expert_hidden`: the input in fp32, sums of pieces, rows of the listed neurons, the list."""
    pieces, most = -(-d // (256 * tuning.loads)), -(-experts * size // ctas)
    return d * 4 + most * (pieces * 8 + 4) + tuning.warps * 32 + experts * 2 + 16


def last_bytes(experts: int, size: int, shares: int, tuning: Tuning) -> int:
    """Shared memory of `expert_last`: the ring of rows in flight, values and rows of the listed neurons, the list."""
    ring = tuning.warps * 32 * max(tuning.loads, 2) * tuning.wide * 16
    return ring + -(-experts * size // shares) * 8 + tuning.warps * 32 + experts * 2 + 16


RANK = 20
SKIPS = True
SELECTS = True  # its input_sparse_linear takes top_k
_workspaces: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


def prepare(threads: int) -> None:
    """Nothing to set up: kernels are compiled when they are first launched."""


@torch.compiler.assume_constant_result
def reserve(device: torch.device, outputs: int) -> bool:
    """Make the workspace of one output size: fp32 sums and arrival counters, which every call finds and leaves zero.

    Called before an operator that uses it, so that compiled code makes it while it is traced, outside any CUDA graph's
    memory, and sees an operator that changes none of its arguments (else no graph would be captured).
    """
    if (device, outputs) not in _workspaces:
        sums = torch.zeros(outputs, dtype=torch.float32, device=device)
        _workspaces[device, outputs] = sums, torch.zeros(-(-outputs // 256), dtype=torch.int32, device=device)
    return True


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why a single product can't be served: one row, 16 bits, channel-contiguous weight, outputs a multiple of 8."""
    if weight.dtype not in (torch.float16, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cuda_gather serves float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if x.numel() != x.shape[-1]:
        return f"cuda_gather serves one row, got {x.numel() // x.shape[-1]}"
    if not weight.t().is_contiguous() or weight.shape[0] % 8:
        return "cuda_gather needs the weight stored with input channels contiguous and a multiple of 8 outputs"
    return None


@torch.library.custom_op("sparsebench::gather_linear", mutates_args=(), device_types="cuda")
def gather_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threshold: torch.Tensor, scale: torch.Tensor | None,
    complement: bool, top_k: int, warps: int, loads: int, wide: int, per_sm: float,
) -> torch.Tensor:  # fmt: skip
    """One product of a row x [n] with a weight [n, m], finished by the last CTA of each tile; needs `reserve(.., m)`.

    top_k: the largest so many are kept, chosen by one launch more in front; -1: those above the threshold.
    """
    m = weight.shape[1]
    y, (sums, arrived) = x.new_empty(m), _workspaces[x.device, m]
    arguments = Gather()
    arguments.set_part(0, weight, x, sums, threshold, scale, complement=complement)
    arguments.result, arguments.arrived = y.data_ptr(), arrived.data_ptr()
    if bias is not None:
        arguments.bias = bias.data_ptr()
    tuning, extra = Tuning(warps, loads, wide, per_sm), {}
    if top_k >= 0:
        word, extra = torch.empty(1, dtype=torch.int64, device=x.device), {"TOPK": 1}
        arguments.choose(0, top_k, word)
        shared = choose_bytes(len(x), tuning)
        kernel = built("choose_half", weight, tuning, shared, **extra)
        _nvrtc.launch(kernel, (1, 1), tuning.warps * 32, shared, [arguments], overlap=True)
        arguments.top_k[0] = -1
    start("gather_half", arguments, weight, tuning, **extra)
    return y


def accumulate(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, threshold: torch.Tensor, tuning: Tuning
) -> None:
    """out [m] += W (x where |x| > t), fp32 x and out, weight [n, m] in 16 bits: the product as a fused step runs it."""
    arguments = Gather()
    arguments.set_part(0, weight, x, out, threshold)
    start("gather_plain", arguments, weight, tuning)


def defines_of(tuning: Tuning, dtype: torch.dtype) -> dict[str, int]:
    """What decode.cu, and every source that includes it, is compiled with for a product alone: no attention in it."""
    sizes = {"WARPS": tuning.warps, "LOADS": tuning.loads, "WIDE": tuning.wide, "HEAD_DIM": 64, "GROUP": 1, "SPLITS": 1}
    return sizes | ({"BF16": 1} if dtype == torch.bfloat16 else {})


def built(name: str, weight: torch.Tensor, tuning: Tuning, shared: int, **extra: int):
    """A kernel for the weight's type and device, compiled the first time."""
    return _nvrtc.function(SOURCE, name, weight.device.index, shared, **defines_of(tuning, weight.dtype), **extra)


def start(name: str, arguments: Gather, weight: torch.Tensor, tuning: Tuning, **extra: int) -> None:
    """Start a gather of one part on the current stream."""
    shared, device = gather_bytes(tuning), weight.device.index
    kernel = built(name, weight, tuning, shared, **extra)
    tiles = -(-weight.shape[1] // (256 * tuning.wide))
    shares = max(1, round(processors(device) * tuning.per_sm / tiles))
    _nvrtc.launch(kernel, (tiles, shares), tuning.warps * 32, shared, [arguments], overlap=True)


@functools.cache
def processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gather_linear.register_fake
def _(x, weight, bias, threshold, scale, complement, top_k, warps, loads, wide, per_sm):
    return x.new_empty(weight.shape[1])


def input_sparse_linear(
    x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None, top_k=None, tuning=None
):
    """As masked_dense.input_sparse_linear, for one row; top_k: instead of a threshold >= 0. Raises ValueError for what
    `unsupported` names."""
    problem = unsupported(x, weight)
    if problem is None and low_rank is not None and (low_rank[0].shape[1] % 8 or not low_rank[0].is_contiguous()):
        problem = f"cuda_gather needs A contiguous with a multiple of 8 ranks, got {low_rank[0].shape[1]}"
    if problem:
        raise ValueError(problem)
    row = x.reshape(-1).contiguous()
    reserve(x.device, weight.shape[0])
    if keep is not None:
        row = torch.where(keep.reshape(-1), row, 0)
        threshold = torch.zeros((), device=x.device)
    t = tuning or Tuning()
    shape = (-1 if top_k is None else top_k, t.warps, t.loads, t.wide, t.per_sm)
    scale = None if scale is None else scale.float()
    y = gather_linear(row, weight.t(), bias, threshold, scale, False, *shape)
    if low_rank is not None:
        a, b = low_rank
        reserve(x.device, a.shape[1])
        if keep is None:
            inner = gather_linear(row, a, None, threshold, scale, True, *shape)
        else:
            inner = torch.where(keep.reshape(-1), 0, x.reshape(-1)) @ a
        y = y + inner @ b
    return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("sparsebench::cuda_ffn", mutates_args=(), device_types="cuda")
def cuda_ffn(
    x: torch.Tensor, activation: torch.Tensor, up: torch.Tensor, down: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    """x [d], activation [f], up and down [f, d] -> [d]: rows of up where active, then the same rows of down."""
    (f, d), (sums, arrived) = up.shape, _workspaces[x.device, up.shape[1]]
    scores, y = torch.empty(f, dtype=torch.float32, device=x.device), x.new_empty(d)
    tuning = Tuning(16, 4, 1, 1.0)
    first = Rows()
    first.weight, first.half, first.gate = up.data_ptr(), x.data_ptr(), activation.data_ptr()
    first.out, first.m, first.n = scores.data_ptr(), f, d
    shared = rows_bytes(d, tuning)
    _nvrtc.launch(
        built("rows", up, tuning, shared),
        (processors(x.device.index), 1),
        tuning.warps * 32,
        shared,
        [first],
        overlap=True,
    )
    second = Gather()
    second.set_part(0, down, activation, sums, zero)
    second.second, second.result, second.arrived = scores.data_ptr(), y.data_ptr(), arrived.data_ptr()
    start("gather_neuron", second, down, Tuning())
    return y


@cuda_ffn.register_fake
def _(x, activation, up, down, zero):
    return torch.empty_like(x)


def neuron_sparse_ffn(x, activation, up, down):
    """As masked_dense.neuron_sparse_ffn, for one row. Raises ValueError for what it can't serve."""
    problem = unsupported(activation.to(down.dtype), down)
    if problem or not up.is_contiguous() or up.shape[1] % 8:
        raise ValueError(problem or "cuda_gather needs up stored by neuron and sizes that are multiples of 8")
    reserve(x.device, down.shape[0])
    zero = torch.zeros((), device=x.device)
    row = activation.to(down.dtype).reshape(-1).contiguous()
    return cuda_ffn(x.reshape(-1).contiguous(), row, up, down.t(), zero).view(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Expert FFN

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")  # in decode.cu's order
KEEP, HIDDEN, LAST = Tuning(16, 4), Tuning(16, 4, 1, 1.0), Tuning(8, 4, 1, 4.0)
PLAIN_HIDDEN = Tuning(16, 8, 1, 1.0)  # without a gate, as many loads in flight
LARGEST = 96 * 1024  # bytes of shared memory for the input and the list of experts


def unsupported_expert_ffn(x: torch.Tensor, weight: torch.Tensor, last: torch.Tensor | None = None) -> str | None:
    """Why this call can't be served; weight: the experts' first map [f, d], last: their last map [f, n]."""
    f, d = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cuda_gather serves float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if x.numel() != x.shape[-1]:
        return f"cuda_gather serves one row, got {x.numel() // x.shape[-1]}"
    if d % 8 or 4 * d + 2 * f > LARGEST or not weight.is_contiguous():
        return f"cuda_gather needs contiguous maps, inputs a multiple of 8 and 4 d + 2 f <= {LARGEST}, got d {d}, f {f}"
    if last is not None and (last.shape[1] % 8 or not last.is_contiguous()):
        return f"cuda_gather needs a contiguous last map with a multiple of 8 outputs, got {last.shape[1]}"
    return None


def run_experts(
    x: torch.Tensor, keep: torch.Tensor, first: torch.Tensor, last: torch.Tensor, activation: str,
    first_bias: torch.Tensor | None, up: torch.Tensor | None, up_bias: torch.Tensor | None,
    last_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x [d], keep bool [E], first and up [f, d], last [f, n] -> [n] in two launches."""
    (f, d), n, device, x = first.shape, last.shape[1], x.device.index, aligned(x)
    sums, arrived = _workspaces[x.device, n]
    hidden, y = torch.empty(f, dtype=torch.float32, device=x.device), x.new_empty(n)
    a = Experts(d=d, n=n, experts=len(keep), size=f // len(keep), activation=ACTIVATIONS.index(activation))
    tensors = {
        "first": first, "first_bias": first_bias, "up": up, "up_bias": up_bias, "last": last, "last_bias": last_bias,
        "x": x, "keep": keep, "hidden": hidden, "sums": sums, "result": y, "arrived": arrived,
    }  # fmt: skip
    for name, tensor in tensors.items():
        setattr(a, name, None if tensor is None else tensor.data_ptr())
    t = PLAIN_HIDDEN if up is None else HIDDEN
    ctas = max(1, round(processors(device) * t.per_sm))
    shared = hidden_bytes(d, a.experts, a.size, ctas, t)
    kernel = built("expert_hidden" if up is None else "expert_hidden_gated", first, t, shared)
    _nvrtc.launch(kernel, (ctas, 1), t.warps * 32, shared, [a], overlap=True)
    tiles = -(-n // (256 * LAST.wide))
    shares = max(1, round(processors(device) * LAST.per_sm / tiles))
    shared = last_bytes(a.experts, a.size, shares, LAST)
    kernel = built("expert_last", last, LAST, shared)
    _nvrtc.launch(kernel, (tiles, shares), LAST.warps * 32, shared, [a], overlap=True)
    return y


cuda_experts = torch.library.custom_op("sparsebench::cuda_experts", run_experts, mutates_args=(), device_types="cuda")


@cuda_experts.register_fake
def _(x, keep, first, last, activation, first_bias, up, up_bias, last_bias):
    return x.new_empty(last.shape[1])


def expert_ffn(x, keep, first, last, activation, *, first_bias=None, up=None, up_bias=None, last_bias=None):
    """As masked_dense.expert_ffn for a bool mask, sums in fp32. Raises ValueError for what it can't serve."""
    problem = unsupported_expert_ffn(x, first, last)
    if problem or keep.dtype != torch.bool or not (up is None or up.is_contiguous()):
        raise ValueError(problem or f"cuda_gather needs a bool mask and a contiguous gate, got a {keep.dtype} mask")
    row, chosen = x.reshape(-1).contiguous(), keep.reshape(-1).contiguous()
    reserve(x.device, last.shape[1])
    y = cuda_experts(row, chosen, first, last, activation, first_bias, up, up_bias, last_bias)
    return y.view(*x.shape[:-1], -1)


def unsupported_expert_keep(x: torch.Tensor, weight: torch.Tensor, second: torch.Tensor | None = None) -> str | None:
    """Why this router can't be served; weight [E, d], float32 or as x."""
    if second is not None:
        return "cuda_gather serves routers of one map"
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype not in (torch.float32, x.dtype):
        return f"cuda_gather serves float16 and bfloat16, got input {x.dtype} and router {weight.dtype}"
    if x.numel() != x.shape[-1] or x.shape[-1] % 8 or not weight.is_contiguous():
        return "cuda_gather serves one row, a multiple of 8 inputs and a contiguous router"
    return None


def run_keep(x: torch.Tensor, weight: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """x [d], weight [E, d], threshold fp32 on the device -> bool [E] in one launch."""
    (experts, d), x = weight.shape, aligned(x)
    keep = torch.empty(experts, dtype=torch.bool, device=x.device)
    pointers = {"weight": weight, "x": x, "threshold": threshold, "keep": keep}
    a = Keep(wide=weight.dtype == torch.float32, d=d, **{k: v.data_ptr() for k, v in pointers.items()})
    shared = KEEP.warps * 4
    _nvrtc.launch(built("expert_keep", x, KEEP, shared), (experts, 1), KEEP.warps * 32, shared, [a], overlap=True)
    return keep


cuda_expert_keep = torch.library.custom_op(
    "sparsebench::cuda_expert_keep", run_keep, mutates_args=(), device_types="cuda"
)


@cuda_expert_keep.register_fake
def _(x, weight, threshold):
    return x.new_empty(len(weight), dtype=torch.bool)


def expert_keep(x, weight, threshold, second=None, *, outer="none", rule="above"):
    """As masked_dense.expert_keep for one row, scores summed in fp32. Raises ValueError for what it can't serve."""
    problem = unsupported_expert_keep(x, weight, second)
    if problem or (outer, rule) != ("none", "above"):
        raise ValueError(problem or f"cuda_gather serves the rule above on plain scores, got {rule} on {outer}")
    return cuda_expert_keep(x.reshape(-1).contiguous(), weight, threshold.float()).view(*x.shape[:-1], -1)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x where 16-byte loads can read it."""
    return x.clone() if x.data_ptr() % 16 else x
