"""A whole decode step of a Llama-type model on an NVIDIA GPU, dense or sparse, as five kernels a layer (decode.cu).

What surrounds the projections is fused into them: the norm, the thresholds and the compaction of the kept channels
stand in front of each product, residual adds at its end. The step is captured once in a CUDA graph; the next token and
the position live on the device. `step_unsupported` says what it does not take.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.kernels import nvrtc
from sparsebench.models.sites import find_blocks

SOURCE = Path(__file__).with_name("decode.cu")
Pointer = ctypes.c_void_p


class Gather(ctypes.Structure):
    """Arguments of decode.cu's `gather`."""

    _fields_ = [
        ("weight", Pointer * 3), ("out", Pointer * 3), ("scale", Pointer * 3), ("threshold", Pointer),
        ("m", ctypes.c_int * 3), ("parts", ctypes.c_int), ("n", ctypes.c_int),
        ("complement", ctypes.c_int), ("input", Pointer), ("second", Pointer), ("norm", Pointer), ("eps", ctypes.c_float),
        ("zero", Pointer), ("zero_count", ctypes.c_int), ("result", Pointer), ("bias", Pointer), ("arrived", Pointer),
    ]  # fmt: skip


class Attend(ctypes.Structure):
    """Arguments of decode.cu's `attend`."""

    _fields_ = [
        ("q", Pointer), ("k", Pointer), ("v", Pointer), ("q_bias", Pointer), ("k_bias", Pointer), ("v_bias", Pointer),
        ("cosine", Pointer), ("sine", Pointer), ("keys", Pointer), ("values", Pointer), ("position", Pointer),
        ("partial", Pointer), ("softmax", Pointer), ("positions", ctypes.c_int),
        ("window", ctypes.c_int), ("scaling", ctypes.c_float),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    """Arguments of decode.cu's `rows`."""

    _fields_ = [
        ("weight", Pointer), ("input", Pointer), ("norm", Pointer), ("gate", Pointer), ("out", Pointer),
        ("eps", ctypes.c_float), ("limit", ctypes.c_float), ("m", ctypes.c_int), ("n", ctypes.c_int),
        ("token", Pointer), ("position", Pointer), ("best", Pointer), ("best_row", Pointer), ("arrived", Pointer),
        ("zero", Pointer), ("zero_count", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """How a kernel is built and spread: warps per CTA, 16-byte loads in flight, loads per lane and channel, CTAs per SM."""

    warps: int = 8
    loads: int = 8
    wide: int = 1
    per_sm: float = 2.0


@dataclass
class Launch:
    """One kernel of the step."""

    name: str
    label: str  # e.g. `3.qkv`
    grid: tuple[int, int]
    shared_bytes: int
    arguments: list
    tuning: Tuning
    reference: Callable[[], dict[str, tuple[torch.Tensor, torch.Tensor]]] | None = None


def step_unsupported(module: nn.Module) -> str | None:
    """Why this model's step can't be fused, or None. The model must hold input-sparse linears at every site."""
    try:
        blocks = find_blocks(module)
    except ValueError as error:
        return str(error)
    if set(blocks[0].sites) != {"q", "k", "v", "o", "gate", "up", "down"}:
        return f"cuda_fused takes blocks with q, k, v, o, gate, up, down, got {', '.join(blocks[0].sites)}"
    config = module.config
    dtype = next(module.parameters()).dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"cuda_fused takes float16 and bfloat16, got {dtype}"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"cuda_fused takes SiLU, got {config.hidden_act}"
    head_dim = heads(config)[2]
    if head_dim % 8 or 32 % (head_dim // 8):
        return f"cuda_fused takes head sizes 8, 16, 32, 64, 128 and 256, got {head_dim}"
    if any(size % 8 for size in (config.hidden_size, config.intermediate_size)):
        return "cuda_fused takes sizes that are multiples of 8"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"cuda_fused takes fixed rotary embeddings, got {rope}"
    for block in blocks:
        for role, site in block.sites.items():
            linear = module.get_submodule(site.path)
            if not linear.weight.t().is_contiguous():
                return f"cuda_fused needs channel-contiguous weights, {site.path} is not (see modules.input_sparse)"
            if linear.bias is not None and role not in ("q", "k", "v"):
                return f"cuda_fused takes no bias at {role}"
            if getattr(linear, "low_rank_a", None) is not None:
                return "cuda_fused takes no low-rank remainder"
    return None


def heads(config: Any) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size)."""
    count = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // count
    return count, getattr(config, "num_key_value_heads", None) or count, head_dim


def gather_bytes(tuning: Tuning) -> int:
    """Shared memory of a gather: the ring of rows in flight, compacted values and indices, a counter, scratch."""
    return tuning.warps * 32 * (max(tuning.loads, 2) * tuning.wide * 16 + 8 * 6) + tuning.warps * 4 + 16


RANK = 20
SKIPS = True
_workspaces: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


def prepare(threads: int) -> None:
    """Nothing to set up: kernels are compiled when they are first launched."""


def workspace(device: torch.device, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 sums and arrival counters for one output size; every call leaves them zero."""
    key = (device, outputs)
    if key not in _workspaces:
        sums = torch.zeros(outputs, dtype=torch.float32, device=device)
        _workspaces[key] = sums, torch.zeros(-(-outputs // 256), dtype=torch.int32, device=device)
    return _workspaces[key]


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why a single product can't be served: one row, 16 bits, channel-contiguous weight, outputs a multiple of 8."""
    if weight.dtype not in (torch.float16, torch.bfloat16) or x.dtype != weight.dtype:
        return f"cuda_fused serves float16 and bfloat16, got input {x.dtype} and weight {weight.dtype}"
    if x.numel() != x.shape[-1]:
        return f"cuda_fused serves one row, got {x.numel() // x.shape[-1]}"
    if not weight.t().is_contiguous() or weight.shape[0] % 8:
        return "cuda_fused needs the weight stored with input channels contiguous and a multiple of 8 outputs"
    return None


@torch.library.custom_op("sparsebench::gather_linear", mutates_args=("sums", "arrived"), device_types="cuda")
def gather_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threshold: torch.Tensor, scale: torch.Tensor | None,
    sums: torch.Tensor, arrived: torch.Tensor, complement: bool, warps: int, loads: int, wide: int, per_sm: float,
) -> torch.Tensor:  # fmt: skip
    """One product of a row x [n] with a weight [n, m], finished by the last CTA of each tile."""
    tuning = Tuning(warps, loads, wide, per_sm)
    n, m = weight.shape
    y = x.new_empty(m)
    arguments = Gather()
    arguments.weight[0], arguments.out[0], arguments.m[0] = weight.data_ptr(), sums.data_ptr(), m
    arguments.threshold, arguments.parts, arguments.n = threshold.data_ptr(), 1, n
    arguments.complement, arguments.input, arguments.result = int(complement), x.data_ptr(), y.data_ptr()
    arguments.arrived = arrived.data_ptr()
    if scale is not None:
        arguments.scale[0] = scale.data_ptr()
    if bias is not None:
        arguments.bias = bias.data_ptr()
    defines = {"WARPS": warps, "LOADS": loads, "WIDE": wide, "HEAD_DIM": 64, "GROUP": 1, "SPLITS": 1}
    if x.dtype == torch.bfloat16:
        defines["BF16"] = 1
    shared = gather_bytes(tuning)
    kernel = nvrtc.function(SOURCE, "gather_half", x.device.index, shared, **defines)
    tiles = -(-m // (256 * wide))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    grid = (tiles, max(1, round(processors * per_sm / tiles)))
    nvrtc.launch(kernel, grid, warps * 32, shared, [arguments], overlap=False)
    return y


@gather_linear.register_fake
def _(x, weight, bias, threshold, scale, sums, arrived, complement, warps, loads, wide, per_sm):
    return x.new_empty(weight.shape[1])


def input_sparse_linear(x, weight, bias=None, *, threshold=None, scale=None, keep=None, low_rank=None, tuning=None):
    """As masked_dense.input_sparse_linear, for one row. Raises ValueError for what `unsupported` names."""
    problem = unsupported(x, weight)
    if problem:
        raise ValueError(problem)
    row = x.reshape(-1).contiguous()
    if keep is not None:
        row = torch.where(keep.reshape(-1), row, 0)
        threshold = torch.zeros((), device=x.device)
    t = tuning or Tuning()
    shape = (t.warps, t.loads, t.wide, t.per_sm)
    scale = None if scale is None else scale.float()
    y = gather_linear(row, weight.t(), bias, threshold, scale, *workspace(x.device, weight.shape[0]), False, *shape)
    if low_rank is not None:
        a, b = low_rank
        dropped = row if keep is None else torch.where(keep.reshape(-1), 0, x.reshape(-1))
        inner = torch.empty(0)
        if keep is None:
            inner = gather_linear(dropped, a, None, threshold, scale, *workspace(x.device, a.shape[1]), True, *shape)
        else:
            inner = dropped @ a
        y = y + inner @ b
    return y.view(*x.shape[:-1], -1)


class Step:
    """The kernels of one decode step, in order, with the buffers they share.

    Args:
        module: a causal LM for which `step_unsupported` is None.
        cache: a transformers StaticCache that holds the prompt; its tensors are used in place.
        processors: multiprocessors to spread over.
        tunings: per kernel kind (qkv, attend, o, gate_up, down, head).
    """

    def __init__(self, module: nn.Module, cache: Any, processors: int, tunings: dict[str, Tuning] | None = None):
        problem = step_unsupported(module)
        if problem:
            raise ValueError(problem)
        self.module, self.cache, self.processors = module, cache, processors
        self.tunings = tunings or {}
        config = module.config
        self.blocks = find_blocks(module)
        self.num_heads, self.num_groups, self.head_dim = heads(config)
        self.hidden, self.mid = config.hidden_size, config.intermediate_size
        self.vocabulary = module.get_output_embeddings().weight.shape[0]
        self.dtype = next(module.parameters()).dtype
        self.device = next(module.parameters()).device
        self.positions = cache.layers[0].keys.shape[2]
        query, group = self.num_heads * self.head_dim, self.num_groups * self.head_dim

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=self.device)

        def integers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self.device)

        self.residual, self.qkv = floats(self.hidden), floats(query + 2 * group)
        self.q, self.k, self.v = self.qkv.split([query, group, group])
        self.gate_up, self.logits = floats(2 * self.mid), floats(self.vocabulary)
        self.gate, self.up = self.gate_up.split([self.mid, self.mid])
        self.token, self.position = integers(1), integers(1)
        self.splits = max(1, processors // self.num_groups)
        self.partial = floats(self.num_heads, self.splits, self.head_dim)
        self.softmax = floats(self.num_heads, self.splits, 2)
        self.arrived = integers(1)
        self.best, self.best_row = floats(processors * 8), integers(processors * 8)
        place = torch.arange(self.positions, device=self.device)[None]
        rotary = next(m for m in module.base_model.modules() if hasattr(m, "inv_freq"))
        with torch.no_grad():
            self.cosine, self.sine = (t[0].float().contiguous() for t in rotary(floats(1), place))
        self.thresholds: list[torch.Tensor] = []
        self.launches = list(self.plan())

    def defines(self, tuning: Tuning) -> dict[str, int]:
        found = {"WARPS": tuning.warps, "LOADS": tuning.loads, "WIDE": tuning.wide, "HEAD_DIM": self.head_dim}
        found |= {"GROUP": self.num_heads // self.num_groups, "SPLITS": self.splits}
        return {**found, "BF16": 1} if self.dtype == torch.bfloat16 else found

    def tuning(self, kind: str) -> Tuning:
        return self.tunings.get(kind, Tuning())

    def plan(self) -> Iterator[Launch]:
        """The launches of one step."""
        base = self.module.base_model
        simple = Tuning(warps=8)
        yield Launch(
            "embed", "embed", (8, 1), 0,
            [Pointer(base.get_input_embeddings().weight.data_ptr()), Pointer(self.token.data_ptr()),
             Pointer(self.residual.data_ptr()), ctypes.c_int(self.hidden)], simple,
        )  # fmt: skip
        for block in self.blocks:
            layer = self.module.get_submodule(block.path)
            maps = {role: self.module.get_submodule(site.path) for role, site in block.sites.items()}
            norms = [m for m in layer.children() if hasattr(m, "variance_epsilon")]
            yield self.gather(
                f"{block.index}.qkv", [maps[r] for r in "qkv"], [self.q, self.k, self.v], "norm", self.residual,
                norm=norms[0], zero=self.gate_up,
            )  # fmt: skip
            yield self.attend(block.index, maps)
            yield self.gather(
                f"{block.index}.o", [maps["o"]], [self.residual], "attention", self.partial, second=self.softmax, zero=self.qkv
            )
            yield self.gather(
                f"{block.index}.gate_up", [maps["gate"], maps["up"]], [self.gate, self.up], "norm", self.residual, norm=norms[1]
            )
            yield self.gather(f"{block.index}.down", [maps["down"]], [self.residual], "swiglu", self.gate, second=self.up)
        yield self.head(base)

    def gather(self, label, maps, outs, mode, source, *, norm=None, second=None, zero=None) -> Launch:
        tuning = self.tuning(label.partition(".")[2])
        threshold = torch.stack([getattr(m, "threshold", torch.tensor(-1.0)).to(self.device).float() for m in maps])
        self.thresholds.append(threshold)
        arguments = Gather()
        for i, (linear, out) in enumerate(zip(maps, outs, strict=True)):
            arguments.weight[i], arguments.out[i] = linear.weight.data_ptr(), out.data_ptr()
            arguments.m[i] = linear.weight.shape[0]
            scale = getattr(linear, "scale", None)
            if scale is not None:
                linear.scale = scale = scale.float().contiguous()
                arguments.scale[i] = scale.data_ptr()
        arguments.threshold, arguments.parts, arguments.n = threshold.data_ptr(), len(maps), maps[0].weight.shape[1]
        arguments.input = source.data_ptr()
        if second is not None:
            arguments.second = second.data_ptr()
        if norm is not None:
            arguments.norm, arguments.eps = norm.weight.data_ptr(), norm.variance_epsilon
        if zero is not None:
            arguments.zero, arguments.zero_count = zero.data_ptr(), zero.numel()
        tile = 256 * tuning.wide
        tiles = sum(-(-linear.weight.shape[0] // tile) for linear in maps)
        shares = max(1, round(self.processors * tuning.per_sm / tiles))
        shared = gather_bytes(tuning)

        def reference() -> dict:
            """Masked-dense in fp32 on the buffers as they are now: what this launch must add to its outputs."""
            x = source
            if mode == "norm":
                x = x * torch.rsqrt(x.square().mean() + norm.variance_epsilon) * norm.weight.float()
            elif mode == "swiglu":
                x = F.silu(x) * second
            elif mode == "attention":
                fade = (second[..., :1] - second[..., :1].amax(1, keepdim=True)).exp()
                x = ((x * fade).sum(1) / (second[..., 1:] * fade).sum(1)).flatten()
            found = {}
            for i, (linear, out) in enumerate(zip(maps, outs, strict=True)):
                scale = getattr(linear, "scale", None)
                keep = (x.abs() if scale is None else x.abs() * scale) > threshold[i]
                found[f"{label}[{i}]"] = (out, out + linear.weight.float() @ torch.where(keep, x, 0))
            return found

        return Launch(f"gather_{mode}", label, (tiles, shares), shared, [arguments], tuning, reference)

    def attend(self, index: int, maps: dict[str, nn.Module]) -> Launch:
        tuning, layer = replace(self.tuning("attend"), loads=1, wide=1), self.cache.layers[index]
        arguments = Attend()
        for name in ("q", "k", "v"):
            setattr(arguments, name, getattr(self, name).data_ptr())
            if maps[name].bias is not None:
                setattr(arguments, f"{name}_bias", maps[name].bias.data_ptr())
        for name in ("cosine", "sine", "position", "partial", "softmax"):
            setattr(arguments, name, getattr(self, name).data_ptr())
        arguments.positions = self.positions
        arguments.keys, arguments.values = layer.keys.data_ptr(), layer.values.data_ptr()
        arguments.scaling = self.head_dim**-0.5
        group = self.num_heads // self.num_groups
        shared = group * (self.head_dim + tuning.warps * (self.head_dim + 2)) * 4
        return Launch("attend", f"{index}.attend", (self.num_groups, self.splits), shared, [arguments], tuning)

    def head(self, base: nn.Module) -> Launch:
        tuning, weight = self.tuning("head"), self.module.get_output_embeddings().weight
        norm = next(m for m in base.children() if hasattr(m, "variance_epsilon"))
        ctas = round(self.processors * tuning.per_sm)
        arguments = Rows()
        arguments.weight, arguments.input, arguments.norm = weight.data_ptr(), self.residual.data_ptr(), norm.weight.data_ptr()
        arguments.out, arguments.eps = self.logits.data_ptr(), norm.variance_epsilon
        arguments.m, arguments.n = weight.shape
        for name in ("token", "position", "best", "best_row"):
            setattr(arguments, name, getattr(self, name).data_ptr())
        arguments.arrived = self.arrived.data_ptr()
        shared = (self.hidden + 3 * tuning.warps) * 4 + 16

        def reference() -> dict:
            x = self.residual * torch.rsqrt(self.residual.square().mean() + norm.variance_epsilon) * norm.weight.float()
            return {"head": (self.logits, weight.float() @ x)}

        return Launch("rows", "head", (ctas, 1), shared, [arguments], tuning, reference)

    def enqueue(self, overlap: bool = True) -> None:
        """Start the step's kernels on the current stream."""
        device = torch.cuda.current_device()
        for launch in self.launches:
            defines = self.defines(launch.tuning)
            kernel = nvrtc.function(SOURCE, launch.name, device, launch.shared_bytes, **defines)
            threads = launch.tuning.warps * 32
            nvrtc.launch(kernel, launch.grid, threads, launch.shared_bytes, launch.arguments, overlap)

    def check(self, run: Callable[[Launch], None], after: Callable[[], None]) -> float:
        """Largest relative error of a projection or the head against masked-dense in fp32, over one step.

        `run` executes one launch, `after` waits for it. Every launch gets the buffers the previous ones left, so
        rounding near a threshold can't grow from layer to layer.
        """
        worst = 0.0
        for launch in self.launches:
            expected = launch.reference() if launch.reference else {}
            expected = {k: (out, value, out.clone()) for k, (out, value) in expected.items()}
            run(launch)
            after()
            for out, value, before in expected.values():
                change = before if launch.name.startswith("gather") else torch.zeros_like(before)
                size = float((value - change).norm())
                worst = max(worst, float((out - value).norm()) / size if size else float((out - value).norm()))
        return worst
