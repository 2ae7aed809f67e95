"""CPU kernels compiled at run time by numba: the kept input channels are compacted, then only their weights are read.

A weight is stored transposed ([n, m], one input channel contiguous; bf16 as uint16). Outputs are split between threads,
so nothing is reduced. The compiled loops are in _gather_numba.py; here is what chooses, splits and reshapes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
import torch.nn.functional as F

from sparsebench.kernels import _conv_numba, _heads_numba, masked_dense
from sparsebench.kernels._gather_numba import VECTOR, compact, finish, gather, linear, listed_dots

RANK = 10
SKIPS = True
PARALLEL_BYTES = 1 << 19  # below this much weight traffic a second thread costs more than it saves

_pool: ThreadPoolExecutor | None = None
_threads = 1


def prepare(threads: int) -> None:
    """Keep `threads - 1` worker threads; the caller's thread is the other one."""
    global _pool, _threads  # noqa: PLW0603
    if _pool is not None:
        _pool.shutdown()
    _threads = threads
    _pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why this call can't be served: other dtypes than fp32 and bf16, more than 8 rows, weight not channel-contiguous."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cpu_numba serves float32 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if not weight.t().is_contiguous():
        return "cpu_numba needs the weight stored with its input channels contiguous"
    if x.numel() // x.shape[-1] > 8:
        return f"cpu_numba serves 1 to 8 rows, got {x.numel() // x.shape[-1]}"
    return None


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


NO_SCALE = np.empty(0, np.float32)


def spread(work, count: int, unit: int) -> None:
    """work(lo, hi) over [0, count) in one piece per thread, in whole units."""
    cuts = [count * t // _threads // unit * unit for t in range(_threads)] + [count]
    others = [_pool.submit(work, *cuts[t : t + 2]) for t in range(1, _threads)]
    work(*cuts[:2])
    wait(others)
    for other in others:
        other.result()


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None):
    """As masked_dense.input_sparse_linear, for up to 8 rows. Raises ValueError for what `unsupported` names."""
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    rows = whole = x.reshape(-1, x.shape[-1])
    if keep is not None:
        rows, threshold = torch.where(keep.reshape(rows.shape), rows, 0), 0.0
    (m, n), batch = weight.shape, rows.shape[0]
    index, values = np.empty(n + 1, np.int64), np.empty((batch, n + 1), np.float32)
    sums, y = np.empty((batch, m), np.float32), torch.empty(batch, m, dtype=x.dtype)
    stored, out, inputs = as_numpy(weight.t()), as_numpy(y), as_numpy(rows)
    scales = NO_SCALE if scale is None else scale.numpy()
    biases = stored[0, :0] if bias is None else as_numpy(bias)
    limit = np.float32(threshold)
    if _pool is None or weight.numel() * weight.element_size() < PARALLEL_BYTES:
        count = linear(inputs, stored, biases, limit, scales, index, values, sums, out)
    else:
        count = compact(inputs, limit, scales, index, values)
        spread(lambda lo, hi: gather(sums, stored, index, values, count, lo, hi), m, VECTOR)
        finish(sums, biases, out)
    y = y.view(*x.shape[:-1], m)
    if low_rank is not None:
        a, b = low_rank
        kept = torch.zeros(batch, n).index_copy_(
            1, torch.from_numpy(index[:count]), torch.from_numpy(values[:, :count])
        )
        y = y + ((whole - kept).to(x.dtype).view(x.shape) @ a) @ b
    return y


def neuron_sparse_ffn(x, activation, up, down):
    """As masked_dense.neuron_sparse_ffn, for up to 8 rows: only active rows of up and columns of down are read.

    Raises ValueError for what `unsupported` names and for an up projection whose neurons are not contiguous.
    """
    problem = unsupported(activation, down)
    if problem or not up.is_contiguous():
        raise ValueError(problem or "cpu_numba needs the up projection stored with each neuron contiguous")
    rows = x.reshape(-1, x.shape[-1]).float().contiguous().numpy()
    gates = activation.reshape(-1, activation.shape[-1]).contiguous()
    (d, f), batch = down.shape, rows.shape[0]
    index, values = np.empty(f + 1, np.int64), np.empty((batch, f + 1), np.float32)
    sums, y = np.empty((batch, d), np.float32), torch.empty(batch, d, dtype=x.dtype)
    ups, downs = as_numpy(up), as_numpy(down.t())
    count = compact(as_numpy(gates), np.float32(0), NO_SCALE, index, values)
    if _pool is None or count * d * ups.itemsize < PARALLEL_BYTES:
        listed_dots(ups, rows, index, values, 0, count)
        gather(sums, downs, index, values, count, 0, d)
    else:
        spread(lambda lo, hi: listed_dots(ups, rows, index, values, lo, hi), count, 1)
        spread(lambda lo, hi: gather(sums, downs, index, values, count, lo, hi), d, VECTOR)
    finish(sums, downs[0, :0], as_numpy(y))
    return y.view(x.shape)


def output_sparse_linear(x, weight, keep):
    """As masked_dense.output_sparse_linear, for up to 8 rows: only rows of the weight that some row keeps are read.

    Raises ValueError for what `unsupported` names.
    """
    problem = unsupported(keep.to(weight.dtype), weight.t())
    if problem or x.dtype != weight.dtype:
        raise ValueError(problem or f"cpu_numba needs input and weight of one dtype, got {x.dtype}, {weight.dtype}")
    rows = x.reshape(-1, x.shape[-1]).float().contiguous().numpy()
    (m, d), batch = weight.shape, rows.shape[0]
    index, values = np.empty(m + 1, np.int64), np.empty((batch, m + 1), np.float32)
    ones, stored = as_numpy(keep.reshape(batch, m).to(weight.dtype).contiguous()), as_numpy(weight)
    count = compact(ones, np.float32(0), NO_SCALE, index, values)
    if _pool is None or count * d * stored.itemsize < PARALLEL_BYTES:
        listed_dots(stored, rows, index, values, 0, count)
    else:
        spread(lambda lo, hi: listed_dots(stored, rows, index, values, lo, hi), count, 1)
    y = torch.zeros(batch, m)
    y.index_copy_(1, torch.from_numpy(index[:count]), torch.from_numpy(values[:, :count]))
    return y.to(x.dtype).view(keep.shape)


def map_sparse_conv2d(x, rows, bias, stride, padding, dilation):
    """One image's convolution that skips zeros of x [1, C, H, W] float32; rows [kh, kw, C, M]. Returns [1, M, OH, OW]."""
    kernel_h, kernel_w, _, outputs = rows.shape
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip(x.shape[2:], padding, dilation, (kernel_h, kernel_w), stride, strict=True)
    ]
    out = torch.zeros(*size, outputs)
    if bias is not None:
        out += bias.detach()
    _conv_numba.scatter(x[0].contiguous().numpy(), rows.numpy(), out.numpy(), stride, padding, dilation)
    return out.permute(2, 0, 1)[None]


def unsupported_selective_attention(q: torch.Tensor, keys: torch.Tensor) -> str | None:
    """Why a call can't be served; q [B, H, D], keys [B, groups, P, D]."""
    if q.dtype not in (torch.float32, torch.bfloat16) or keys.dtype != q.dtype:
        return f"cpu_numba serves float32 and bfloat16, got queries {q.dtype} and keys {keys.dtype}"
    return None


def selective_attention(q, keys, values, keep, lengths, scaling):
    """As masked_dense.selective_attention: the cache of groups that a sequence does not keep is not read."""
    problem = unsupported_selective_attention(q, keys)
    if problem:
        raise ValueError(problem)
    groups, y = keys.shape[1], torch.zeros_like(q, memory_format=torch.contiguous_format)
    parts = (q.contiguous().unflatten(1, (groups, -1)), keys.contiguous(), values.contiguous())
    pairs, out = keep.nonzero().numpy(), as_numpy(y.unflatten(1, (groups, -1)))
    fixed = (*map(as_numpy, parts), pairs, lengths.to(torch.int64).numpy(), np.float32(scaling), out)
    if _pool is None or len(pairs) * keys[0, 0].numel() * keys.element_size() < PARALLEL_BYTES:
        _heads_numba.attend(*fixed, 0, len(pairs))
    else:
        spread(lambda lo, hi: _heads_numba.attend(*fixed, lo, hi), len(pairs), 1)
    return y


def unsupported_expert_ffn(x: torch.Tensor, weight: torch.Tensor, last: torch.Tensor | None = None) -> str | None:
    """Why this call can't be served; weight: the experts' first map [f, d]."""
    if weight.dtype not in (torch.float32, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cpu_numba serves float32 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    return None


def expert_ffn(x, keep, first, last, activation, *, first_bias=None, up=None, up_bias=None, last_bias=None):
    """As masked_dense.expert_ffn. Up to 8 tokens read the weights of selected experts only; more are grouped by expert."""
    rows, chosen = x.reshape(-1, x.shape[-1]), keep.reshape(-1, keep.shape[-1])
    maps = (first, first_bias, up, up_bias, last)
    served = few_tokens if len(rows) <= 8 else many_tokens
    y = served(rows.contiguous(), chosen, masked_dense.ACTIVATIONS[activation], *maps).to(x.dtype)
    y = y if last_bias is None else y + last_bias
    return y.view(*x.shape[:-1], last.shape[1])


def few_tokens(rows, chosen, function, first, first_bias, up, up_bias, last) -> torch.Tensor:
    """float32 [B, n] of rows [B, d]: neurons of experts that any row selects, listed dots, then a gather."""
    batch, size, f = len(rows), len(first) // chosen.shape[1], len(first)
    experts = chosen.any(0).nonzero().flatten()
    listed = (experts[:, None] * size + torch.arange(size)).flatten()
    count, x, index = len(listed), rows.float().numpy(), np.zeros(f + 1, np.int64)
    index[:count] = listed.numpy()
    parallel = _pool is not None and count * rows.shape[1] * first.element_size() >= PARALLEL_BYTES

    def dots(weight, bias) -> torch.Tensor:
        values, stored = np.ones((batch, f + 1), np.float32), as_numpy(weight)
        if parallel:
            spread(lambda lo, hi: listed_dots(stored, x, index, values, lo, hi), count, 1)
        else:
            listed_dots(stored, x, index, values, 0, count)
        products = torch.from_numpy(values)[:, :count]
        return products if bias is None else products + bias[listed].float()

    x1 = function(dots(first, first_bias))
    x1 = x1 if up is None else x1 * dots(up, up_bias)
    values = np.zeros((batch, f + 1), np.float32)
    values[:, :count] = (x1 * chosen[:, experts].repeat_interleave(size, 1)).numpy()
    sums, stored, n = np.empty((batch, last.shape[1]), np.float32), as_numpy(last), last.shape[1]
    if parallel:
        spread(lambda lo, hi: gather(sums, stored, index, values, count, lo, hi), n, VECTOR)
    else:
        gather(sums, stored, index, values, count, 0, n)
    return torch.from_numpy(sums)


def many_tokens(rows, chosen, function, first, first_bias, up, up_bias, last) -> torch.Tensor:
    """float32 [T, n] of rows [T, d]: for each expert the products of its own tokens only."""
    size = len(first) // chosen.shape[1]
    y = torch.zeros(len(rows), last.shape[1])
    for e in chosen.any(0).nonzero().flatten().tolist():
        tokens, part = chosen[:, e].nonzero().flatten(), slice(e * size, (e + 1) * size)
        x = rows[tokens]
        x1 = function(F.linear(x, first[part], None if first_bias is None else first_bias[part]))
        if up is not None:
            x1 = x1 * F.linear(x, up[part], None if up_bias is None else up_bias[part])
        y.index_add_(0, tokens, (x1 @ last[part]).float())
    return y
