"""The reference: dense products of masked inputs. Exact, any device, any shape; nothing is skipped."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

RANK = 0
WIDEST = 1 << 15  # numbers of which one program of the GPU kernel finds the largest
SKIPS = False


def prepare(threads: int) -> None:
    """Nothing to set up: torch's own threads are used."""


def unsupported(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    return None


def kept(x: torch.Tensor, threshold: torch.Tensor | float, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Which entries stay: |x| * c > t, strictly. x [..., n], scale c [n]; returns bool [..., n]."""
    return (x.abs() if scale is None else x.abs() * scale) > threshold


def largest(x: torch.Tensor, k: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Which entries are among the k largest |x| c of their token: exactly k, the first of equal ones. As `kept` otherwise."""
    return k_largest(x.abs() if scale is None else x.abs() * scale, k)


def k_largest(score: torch.Tensor, k: int) -> torch.Tensor:
    """bool, the shape of score [..., n]: the k largest of each last dimension; exactly k, the lowest index wins a tie."""
    if not 0 < k < score.shape[-1]:
        return torch.full_like(score, k > 0, dtype=torch.bool)
    if score.is_cuda and score.shape[-1] <= WIDEST and not torch.compiler.is_compiling():
        from sparsebench.kernels._triton_mask import k_largest as by_kernel

        return by_kernel(score, k)
    limit = kth_largest(score, k)
    if score.device.type == "cpu" and not torch.compiler.is_compiling():
        mask = score >= limit
        if bool((mask.sum(-1) == k).all()):  # no ties
            return mask
    above, equal = score > limit, score == limit
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def kth_largest(score: torch.Tensor, k: int) -> torch.Tensor:
    """[..., 1]: the k-th largest of each last dimension, 1 <= k <= n."""
    if score.device.type != "cpu" or torch.compiler.is_compiling():
        return score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    # numpy's partial sort is vector code, ten times as fast as torch's on one thread
    numbers = score.detach().to(torch.promote_types(score.dtype, torch.float32)).numpy()
    at = numbers.shape[-1] - k
    return torch.from_numpy(np.partition(numbers, at, axis=-1)[..., at : at + 1]).to(score.dtype)


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None):
    """y = W (x where kept) + low-rank image of the dropped part + b.

    x [..., n]; weight [m, n]; bias [m]; either `keep` [..., n] bool or `threshold` with an optional `scale` [n];
    low_rank (A [n, r], B [r, m]) or None. Returns [..., m].
    """
    if keep is None:
        keep = kept(x, threshold, scale)
    y = F.linear(torch.where(keep, x, 0), weight, bias)
    if low_rank is not None:
        a, b = low_rank
        y = y + (torch.where(keep, 0, x) @ a) @ b
    return y


def semi_structured_linear(x, weight, bias=None, *, trusted=False):
    """y = W x + b for x [rows, n] with at most 2 nonzeros in every 4 consecutive inputs. Returns [rows, m].

    trusted: the caller knows that x is so (a kernel that packs x would drop what is too much).
    """
    return F.linear(x, weight, bias)


def quantised_linear(x, packed, bias=None, *, threshold=None, scale=None, keep=None):
    """As input_sparse_linear with the weight that `packed` (kernels/_packed.py) stands for; it is unpacked at each call."""
    return input_sparse_linear(x, packed.dequantised(), bias, threshold=threshold, scale=scale, keep=keep)


def unpacked(packed):
    """The weight [m, n] that `packed` stands for, in the dtype of its activations."""
    return packed.dequantised()


def neuron_sparse_ffn(x, activation, up, down):
    """y = sum_j a_j (up_j . x) down_j: the second half of a gated FFN, where neurons with activation 0 add nothing.

    x [..., d]; activation a [..., f], exactly 0 where a neuron is inactive; up [f, d]; down [d, f]. Returns [..., d].
    """
    return F.linear(activation * F.linear(x, up), down)


def output_sparse_linear(x, weight, keep):
    """y_j = weight_j . x where keep_j, else 0. x [..., n]; weight [m, n], rows contiguous; keep [..., m] bool."""
    return torch.where(keep, F.linear(x, weight), 0)


def selective_attention(q, keys, values, keep, lengths, scaling):
    """Attention of one new token per sequence; heads of groups that are not kept give 0.

    q [B, H, D]; keys and values [B, groups, P, D], of which the first lengths [B] positions hold tokens; keep bool
    [B, groups]. Returns [B, H, D].
    """
    shared = q.shape[1] // keys.shape[1]
    k, v = (t.repeat_interleave(shared, 1) for t in (keys, values))
    inside = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1)
    scores = (k @ q.unsqueeze(-1))[..., 0].float() * scaling
    weights = scores.masked_fill(~inside, float("-inf")).softmax(-1).to(v.dtype)
    v = torch.where(inside.unsqueeze(-1), v, 0)  # what lies behind the tokens may be anything
    y = (weights.unsqueeze(2) @ v)[:, :, 0]
    return torch.where(keep.repeat_interleave(shared, 1).unsqueeze(-1), y, 0)


ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def above(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """bool: sigmoid(score) > tau, strictly; all where tau is below 0 (LTE, eq. 2)."""
    return (scores > torch.logit(threshold.clamp(min=0))) | (threshold < 0)


def near_largest(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """bool: R_e >= tau max R, without experts of R_e = 0; all where tau is 0 or below (D2DMoE; scores >= 0)."""
    return (scores >= threshold * scores.amax(-1, keepdim=True)) & ((scores > 0) | (threshold <= 0)) | (threshold < 0)


RULES = {"above": above, "max": near_largest}


def expert_scores(x, weight, second=None, *, inner="relu", outer="none", normalise=False):
    """Scores of a router of one map [E, d], or two: [w, d] and [E, w]; float32 at least [..., E], computed in their dtype.

    inner: an activation of torch between the maps; outer: abs or none; normalise: x is divided by its length.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(weight.dtype)
        scores = F.linear(F.normalize(x, dim=-1) if normalise else x, weight)
        if second is not None:
            scores = F.linear(getattr(torch, inner)(scores), second)
        return (scores.abs() if outer == "abs" else scores).to(torch.promote_types(scores.dtype, torch.float32))


def expert_keep(x, weight, threshold, second=None, *, outer="none", rule="above"):
    """bool [..., E]: a rule of RULES on the scores of a router with ReLU between its maps."""
    return RULES[rule](expert_scores(x, weight, second, outer=outer), threshold)


def expert_hidden(x, first, activation, *, first_bias=None, up=None, up_bias=None):
    """(z, a, x1): pre-activation, activation, and what the last map reads; all [..., f]. x1 = a, or a * (U x + b_u)."""
    z = F.linear(x, first, first_bias)
    a = ACTIVATIONS[activation](z)
    return z, a, a if up is None else a * F.linear(x, up, up_bias)


def expert_ffn(x, keep, first, last, activation, *, first_bias=None, up=None, up_bias=None, last_bias=None):
    """y = b + sum of kept experts e of x1_e B_e; an expert is m = f / E neighbouring neurons.

    x [..., d]; keep [..., E] bool (a float scales each expert's output); first, up [f, d]; last [f, n], every neuron
    contiguous; biases [f], [f], [n]; activation one of ACTIVATIONS. Returns [..., n]; a token without experts gets b.
    """
    x1 = expert_hidden(x, first, activation, first_bias=first_bias, up=up, up_bias=up_bias)[2]
    x1 = x1.unflatten(-1, (keep.shape[-1], -1)) * keep.to(x1.dtype).unsqueeze(-1)
    return F.linear(x1.flatten(-2), last.t(), last_bias)
