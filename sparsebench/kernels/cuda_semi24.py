"""2:4 on sparse tensor cores with the activation as the compressed operand: y = x W^T, x [rows, n] packed at every call.

Hardware takes 2:4 in the first operand only, along the reduction axis, so x may be sparse or W, never both. torch packs
(`to_sparse_semi_structured`, a prototype; cuSPARSELt where torch has it, else CUTLASS) and multiplies; packing is part of
the call, hence of every time. It serves whole prompts in fp16 and bf16 on compute capability 8.0 and later. Wider
patterns exist on no hardware at hand: they are simulated.

torch's packing silently drops what is not 2:4, so an input that is not is refused here. Not used: torch's pruning by
tiles of 4 x 4, which lets four tokens decide on each other's masks.
"""

from __future__ import annotations

import warnings

import torch

RANK = 5  # below kernels for one token, which it does not serve
SKIPS = True
ROWS, INPUTS, OUTPUTS = 32, 64, 8  # multiples that x [rows, n] and W [m, n] must have: the stricter of both libraries'
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)


def prepare(threads: int) -> None:
    """Nothing to set up."""


def unsupported(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """Why a call can't be served: shapes, dtypes, device."""
    rows, (m, n) = x.numel() // x.shape[-1], weight.shape
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"cuda_semi24 serves float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if rows % ROWS or n % INPUTS or m % OUTPUTS:
        return (
            f"cuda_semi24 takes rows, inputs and outputs in multiples of {ROWS}, {INPUTS} and {OUTPUTS}, got {rows}, {n} "
            f"and {m}"
        )
    if x.device.type != "cuda":
        return f"cuda_semi24 runs on cuda, got {x.device.type}"
    if torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return f"cuda_semi24 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    return None


def check(x: torch.Tensor) -> None:
    """Raise ValueError where more than 2 of 4 consecutive inputs are not 0; it waits for the device."""
    most = int((x.unflatten(-1, (-1, 4)) != 0).sum(-1).max())
    if most > 2:
        raise ValueError(
            f"cuda_semi24 takes inputs that are 2:4 and prunes none itself, got {most} of 4 that are not 0"
        )


def packed(x: torch.Tensor) -> torch.Tensor:
    """x [rows, n] as torch's semi-structured tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage.*")
        return torch.sparse.to_sparse_semi_structured(x.contiguous())


def semi_structured_linear(x, weight, bias=None, *, trusted=False):
    """As masked_dense.semi_structured_linear, within the limits. Raises ValueError for what `unsupported` and `check` name.

    trusted: leave out `check`; a mask that keeps 2 of 4 by construction needs none.
    """
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    if not trusted:
        check(x)
    y = torch.mm(packed(x), weight.t())  # the bias apart: torch's addmm takes a sparse second operand only
    return y if bias is None else y + bias
