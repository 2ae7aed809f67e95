"""Linear maps with weights in 8 or 4 bits: dense, and sparse by input channels as InputSparseLinear is.

Both hold the tensors of kernels/_packed.py; `weight` is what they stand for, unpacked whenever it is asked for. A call of
one token goes to a kernel, also in the dense map: the same kernel with nothing skipped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench import kernels
from sparsebench.kernels._packed import Packed
from sparsebench.modules.base import Cost, SiteSparsity
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.modules.tokens import per_row
from sparsebench.sites import LinearMap, find_blocks


def hold(module: nn.Module, packed: Packed) -> None:
    """Put the tensors of `packed` into a module's buffers; the rest of it becomes `module.layout`."""
    for name in ("q", "scale", "zero"):
        module.register_buffer(f"packed_{name}", getattr(packed, name), persistent=False)
    module.layout = (packed.shape, packed.bits, packed.group, packed.axis, packed.dtype)


def held(module: nn.Module) -> Packed:
    """What `hold` put there, on the module's present device."""
    return Packed(module.packed_q, module.packed_scale, module.packed_zero, *module.layout)


class QuantLinear(nn.Module, LinearMap):
    """The dense map; kernel: backend for one-token calls, None = unpack and multiply."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None, kernel: str | None = None):
        super().__init__()
        hold(self, packed)
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)
        self.kernel_name = kernel or "masked_dense"
        self.register_buffer("threshold", torch.full((), -1.0, device=packed.device), persistent=False)
        kernels.chain(self.kernel_name)

    packed = property(held)

    @property
    def weight(self) -> torch.Tensor:
        """float [m, n], in the dtype of the activations."""
        return kernels.providing(self.kernel_name, "unpacked").unpacked(self.packed)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.layout[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if per_row(x) != 1:
            return F.linear(x, self.weight, self.bias)
        packed = self.packed
        backend = kernels.serving(self.kernel_name, x, packed, "quantised_linear")
        return backend.quantised_linear(x, packed, self.bias, threshold=self.threshold)

    def sparse(self, site: str, threshold: float, **rule) -> QuantSparseLinear:
        """The sparse map with the same weight; `rule` as for InputSparseLinear."""
        return QuantSparseLinear(self, site, threshold, **rule)

    def extra_repr(self) -> str:
        return described(self.packed)


class QuantSparseLinear(InputSparseLinear):
    """InputSparseLinear with a quantised weight; linear: a QuantLinear, whose tensors it shares."""

    packed = property(held)

    def __init__(self, linear, site, threshold, *, low_rank=None, **rule):
        if low_rank is not None:
            raise ValueError(
                f"model.quantize: a low-rank remainder beside quantised weights is not known, got one at {site}"
            )
        super().__init__(linear, site, threshold, **rule)

    def take(self, linear: QuantLinear) -> None:
        hold(self, linear.packed)

    @property
    def weight(self) -> torch.Tensor:
        """float [m, n], in the dtype of the activations."""
        return kernels.providing(self.kernel_name, "unpacked").unpacked(self.packed)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout[0]

    @property
    def device(self) -> torch.device:
        return self.packed_q.device

    def kernel(self, tokens: int) -> str:
        """One token goes to the kernel, more are masked."""
        return kernels.ran(self.kernel_name, self.packed, "quantised_linear") if tokens == 1 else "masked_dense"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if per_row(x) != 1:
            return super().forward(x)
        if (
            self.counter is not None
        ):  # the kernel runs beside: to unpack the whole weight for one token takes far longer
            self.counter.add(self.keep(x))
        rule = {"threshold": self.threshold, "scale": self.scale}
        rule = rule if self.top_k is None else {"keep": self.keep(x)}
        packed = self.packed
        backend = kernels.serving(self.kernel_name, x, packed, "quantised_linear")
        return backend.quantised_linear(x, packed, self.bias, **rule)

    def costs(self, measured: dict[str, SiteSparsity]) -> dict[str, Cost]:
        """As InputSparseLinear.costs, with the bytes that are stored: payload of kept channels, scales of touched groups.

        A group along the inputs is touched where any of its channels is kept: 1 - (1 - kept)^group of them, as if channels
        were kept independently (docs/quantisation.md, Scales and bytes).
        """
        packed, site = self.packed, measured[self.site]
        costs = super().costs(measured)
        share = 1 - site.sparsity_of_sparse_tokens
        groups = touched(share, packed)
        costs[self.site].dense_bytes = packed.bytes
        costs[self.site].sparse_bytes = packed.read_bytes(share * packed.shape[1], groups)
        return costs

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {described(self.packed)}"


def touched(share: float, packed: Packed) -> float:
    """Expected number of groups of inputs with a kept channel, where each is kept with probability `share`."""
    n = packed.shape[1]
    sizes = [min(packed.group, n - g * packed.group) for g in range(packed.groups)]
    return sum(1 - (1 - share) ** size for size in sizes)


def described(packed: Packed) -> str:
    where = "" if packed.bits == 8 else f", groups of {packed.group} along the {packed.axis}s"
    return f"int{packed.bits}{where}{'' if packed.zero is None else ', zero points'}"


class TorchQuantLinear(nn.Module, LinearMap):
    """The same map by torch's own quantised product, for timing: the baseline that a user has without us.

    int8 is `_weight_int8pack_mm`, int4 `_weight_int4pack_mm` (on a GPU tinygemm's, in bfloat16) in the layout each wants.
    Raises ValueError for what torch has no product for.
    """

    def __init__(self, linear: QuantLinear):
        super().__init__()
        packed = linear.packed
        (m, n), cuda = packed.shape, packed.device.type == "cuda"
        problem = untaken(packed, cuda)
        if problem:
            raise ValueError(f"torch has no quantised product for {problem}")
        self.bias, self.shape, self.bits, self.group, self.on_cuda = (
            linear.bias,
            (m, n),
            packed.bits,
            packed.group,
            cuda,
        )
        levels = packed.levels().t().contiguous()  # [m, n]
        self.inner = torch.bfloat16 if cuda and packed.bits == 4 else packed.dtype
        if packed.bits == 8:
            q, scales = levels, packed.scale.flatten().to(self.inner)
        else:
            zeros = torch.full_like(packed.scale, 8.0) if packed.zero is None else packed.zero
            scales = torch.stack([packed.scale, (8 - zeros.float()) * packed.scale.float()], -1)  # [groups, m, 2]
            scales = scales.to(self.inner).contiguous()
            if cuda:
                q = torch._convert_weight_to_int4pack((levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8), 8)
            else:
                q = torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.inner)
        if self.bits == 8:
            y = torch._weight_int8pack_mm(rows, self.q, self.scales)
        elif self.on_cuda:
            y = torch._weight_int4pack_mm(rows, self.q, self.group, self.scales)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.q, self.group, self.scales)
        y = y.to(x.dtype).view(*x.shape[:-1], self.shape[0])
        return y if self.bias is None else y + self.bias


def with_torch_products(module: nn.Module) -> None:
    """Put torch's own quantised products into the places of quantised maps, in place. Raises ValueError where it has none."""
    for block in find_blocks(module):
        for site in block.sites.values():
            replace(module, site.path, TorchQuantLinear(module.get_submodule(site.path)))


def quantised_maps(module: nn.Module) -> bool:
    """Whether any block map of a dense model is quantised."""
    return any(isinstance(m, QuantLinear) for m in module.modules())


def untaken(packed: Packed, cuda: bool) -> str | None:
    """What torch's own product does not take of a weight, or None."""
    m, n = packed.shape
    if packed.bits == 4 and packed.axis != "input":
        return "groups along the outputs"
    if packed.bits == 4 and packed.group not in (32, 64, 128, 256):
        return f"groups of {packed.group}"
    if packed.bits == 4 and (n % packed.group or n % (128 if cuda else 32) or m % (8 if cuda else 32)):
        return f"{m} outputs of {n} inputs in groups of {packed.group}"
    if packed.bits == 8 and not cuda and packed.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"inputs in {packed.dtype}"
    return None
