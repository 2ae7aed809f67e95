"""Sparse products of 2 to 16 rows on an NVIDIA GPU (few_rows.cu), and decode attention over the kept heads (heads.cu).

The rows may be sequences of a batch or tokens of one sequence (a verify step). A weight row is read once for all of them,
where any of them keeps its channel; each row's own mask holds exactly. fp16 or bf16. It can be captured in CUDA graphs
and compiled through (fullgraph). One row goes to cuda_gather, more than 16 to masked_dense.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from sparsebench.kernels import _nvrtc, cuda_gather, masked_dense
from sparsebench.kernels._heads_cuda import selective_attention, unsupported_selective_attention  # noqa: F401
from sparsebench.kernels.cuda_gather import Tuning

SOURCE = Path(__file__).with_name("few_rows.cu")
RANK = 15
SKIPS = True
BUILT_FOR = (2, 4, 8, 16)  # rows that a kernel has registers for
MAX_ROWS = BUILT_FOR[-1]
ITEMS = 2  # channels a thread looks at together, as in few_rows.cu
Pointer = ctypes.c_void_p
_workspaces: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


class FewRows(ctypes.Structure):
    """Arguments of few_rows.cu's kernels."""

    _fields_ = [
        *((name, Pointer) for name in ("weight", "input", "threshold", "scale", "bias", "sums", "result", "arrived")),
        *((name, ctypes.c_int) for name in ("m", "n", "rows")),
    ]


def prepare(threads: int) -> None:
    """Nothing to set up: kernels are compiled when they are first launched."""


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why a call can't be served: 2 to 16 rows, 16 bits, channel-contiguous weight, outputs a multiple of 8."""
    if weight.dtype not in (torch.float16, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cuda_rows serves float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    rows = x.numel() // x.shape[-1]
    if not 2 <= rows <= MAX_ROWS:
        return f"cuda_rows serves 2 to {MAX_ROWS} rows, got {rows}"
    if not weight.t().is_contiguous() or weight.shape[0] % 8:
        return "cuda_rows needs the weight stored with input channels contiguous and a multiple of 8 outputs"
    return None


@torch.compiler.assume_constant_result
def reserve(device: torch.device, outputs: int) -> bool:
    """Make the workspace of one output size: sums of all rows and arrival counters (cuda_gather.reserve says why)."""
    if (device, outputs) not in _workspaces:
        sums = torch.zeros(MAX_ROWS * outputs, dtype=torch.float32, device=device)
        _workspaces[device, outputs] = sums, torch.zeros(-(-outputs // 256), dtype=torch.int32, device=device)
    return True


def shared_bytes(rows: int, tuning: Tuning) -> int:
    """Shared memory of a kernel built for so many rows: the ring, values and indices of a chunk, a counter."""
    threads = tuning.warps * 32
    return threads * (max(tuning.loads, 2) * tuning.wide * 16 + ITEMS * (4 * rows + 2)) + 16


def tuning_for(rows: int) -> Tuning:
    """[choice] Fewer CTAs where a thread's sums fill its registers."""
    return Tuning(8, 4, 1, 4.0 if rows <= 4 else 2.0 if rows <= 8 else 1.0)


def run_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """x [B, n], weight [n, m] -> [B, m] in one launch; needs `reserve(.., m)`."""
    batch, (n, m), device = x.shape[0], weight.shape, weight.device.index
    y, (sums, arrived) = x.new_empty(batch, m), _workspaces[x.device, m]
    tensors = {
        "weight": weight, "input": x, "threshold": threshold, "scale": scale, "bias": bias, "sums": sums, "result": y,
        "arrived": arrived,
    }  # fmt: skip
    arguments = FewRows(m=m, n=n, rows=batch, **{k: None if v is None else v.data_ptr() for k, v in tensors.items()})
    rows = next(size for size in BUILT_FOR if size >= batch)
    t = tuning_for(rows)
    shared, tiles = shared_bytes(rows, t), -(-m // (256 * t.wide))
    kernel = built(f"few_rows_{rows}", weight, t, shared)
    shares = max(1, round(cuda_gather.processors(device) * t.per_sm / tiles))
    _nvrtc.launch(kernel, (tiles, shares), t.warps * 32, shared, [arguments], overlap=True)
    return y


def built(name: str, weight: torch.Tensor, tuning: Tuning, shared: int):
    """A kernel for the weight's type and device, compiled the first time."""
    defines = cuda_gather.defines_of(tuning, weight.dtype)
    return _nvrtc.function(SOURCE, name, weight.device.index, shared, **defines)


rows_linear = torch.library.custom_op("sparsebench::rows_linear", run_rows, mutates_args=(), device_types="cuda")


@rows_linear.register_fake
def _(x, weight, bias, threshold, scale):
    return x.new_empty(x.shape[0], weight.shape[1])


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None):
    """As masked_dense.input_sparse_linear, for 2 to 16 rows. Raises ValueError for what `unsupported` names."""
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    reserve(x.device, weight.shape[0])
    if low_rank is not None and keep is None:
        keep = masked_dense.kept(x.float(), threshold, scale)
    if keep is not None:
        rows = torch.where(keep.reshape(rows.shape), rows, 0)
        threshold, scale = torch.zeros((), device=x.device), None
    y = rows_linear(rows, weight.t(), bias, threshold.float(), None if scale is None else scale.float())
    y = y.view(*x.shape[:-1], -1)
    if low_rank is not None:
        a, b = low_rank
        y = y + (torch.where(keep, 0, x) @ a) @ b
    return y
