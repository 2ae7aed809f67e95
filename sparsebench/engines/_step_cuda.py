"""The kernels of one decode step on an NVIDIA GPU in their order, with the buffers they share (kernels/decode.cu).

What surrounds the projections is fused into them: the norm, the rule and the compaction of the kept channels stand in
front of each product, residual adds at its end; a low-rank remainder takes one kernel more per input.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsebench.engines import gate_sparse_of, heads, quantisation, rotary_tables
from sparsebench.engines._launch_cuda import DEFAULTS, DENSE, MAPS, PACKED, Attend, Launch
from sparsebench.kernels import _nvrtc, cuda_packed
from sparsebench.kernels.cuda_gather import (
    SOURCE,
    Gather,
    Pointer,
    Rows,
    Tuning,
    choose_bytes,
    gather_bytes,
    rows_bytes,
)
from sparsebench.modules.gate_sparse import GateSparseFFN
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.rotated_norm import RotatedNorm
from sparsebench.sites import Block, exact_weight, find_blocks


class Step:
    """The kernels of one decode step, in order, with the buffers they share.

    Args:
        module: a causal LM for which `unsupported` is None, with input-sparse linears at every site.
        cache: a transformers StaticCache that holds the prompt; its tensors are used in place.
        processors: multiprocessors to spread over.
        keep_all: a dense step, by kernels that know no thresholds.
        tunings: per kernel kind (qkv, attend, o, gate_up, down, head); else DENSE or DEFAULTS.
        blocks: those that it runs, all on one device; the others' steps come before and after it. None = all.

    What may be tried (scripts/bench_top_k.py times it): `choose`, whether the largest k are chosen `inside` the product's own
    kernel or in one `before` it; `ahead`, how many channels of a CTA's share may be fetched before the choice is known;
    `merges`, whether attention is merged over its splits by its last CTA also where nothing is chosen from it.
    """

    choose, ahead, merges = "inside", 128, False

    def __init__(
        self,
        module: nn.Module,
        cache: Any,
        processors: int,
        keep_all: bool = False,
        tunings: dict | None = None,
        blocks: list[Block] | None = None,
    ):
        self.module, self.cache, self.processors, self.keep_all = module, cache, processors, keep_all
        config = module.config
        every = find_blocks(module)
        self.blocks = blocks or every
        self.begins, self.ends = self.blocks[0].index == every[0].index, self.blocks[-1].index == every[-1].index
        self.packed = quantisation(module, self.blocks)
        self.tunings = (
            (DENSE if keep_all else DEFAULTS) | (PACKED[self.packed.bits] if self.packed else {}) | (tunings or {})
        )
        self.num_heads, self.num_groups, self.head_dim = heads(config)
        self.hidden, self.mid = config.hidden_size, config.intermediate_size
        self.vocabulary = module.get_output_embeddings().weight.shape[0]
        self.dtype = next(module.parameters()).dtype
        self.device = next(module.get_submodule(self.blocks[0].path).parameters()).device
        self.positions = cache.layers[0].keys.shape[2]
        query, group = self.num_heads * self.head_dim, self.num_groups * self.head_dim

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=self.device)

        def integers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self.device)

        turned = self.hidden * any(isinstance(m, RotatedNorm) for m in module.modules())
        self.residual, self.qkv = floats(self.hidden), floats(query + 2 * group + turned)
        self.q, self.k, self.v, into_qkv = self.qkv.split([query, group, group, turned])
        self.top_k = {kind: self.chooses(kind) for kind in MAPS}
        self.merged = self.merges or self.top_k["o"]
        spare = {kind: self.largest_rank(kind) + 2 * len(MAPS[kind]) * self.top_k[kind] for kind in MAPS}
        self.before_down = floats(2 * self.mid + spare["down"])  # cleared together
        self.gate, self.up, down = self.before_down.split([self.mid, self.mid, spare["down"]])
        self.of_attention, self.before_attention = floats(spare["qkv"] + spare["o"]), floats(spare["gate_up"] + turned)
        gate_up, into_gate_up = self.before_attention.split([spare["gate_up"], turned])
        self.turned = {"qkv": into_qkv, "gate_up": into_gate_up}  # what a norm that rotates hands on
        qkv, o = self.of_attention.split([spare["qkv"], spare["o"]])
        # A (x where dropped) of the remainders, then words for what was chosen
        self.inner = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}
        self.guesses = integers(len(self.blocks) * len(MAPS) * 3).view(len(self.blocks), len(MAPS), 3)
        self.guesses.fill_(0x7F800000)  # of the first token: nothing lies above infinity
        self.logits = floats(self.vocabulary)
        self.token, self.position = integers(1), integers(1)
        self.splits = max(1, processors // self.num_groups)
        self.partial = floats(self.num_heads, self.splits, self.head_dim)
        self.softmax = floats(self.num_heads, self.splits, 2)
        self.arrived = integers(1)
        self.whole, self.arrived_heads = (
            floats(query),
            integers(self.num_groups),
        )  # attention, merged where it is chosen from
        self.best, self.best_row = floats(processors * 8), integers(processors * 8)
        self.cosine, self.sine = (table.to(self.device) for table in rotary_tables(module, self.positions))
        self.nothing_dropped, self.nothing_but_zeros = floats() - 1, floats()  # thresholds
        self.launches = list(self.plan())

    def maps(self, block: Block, kind: str) -> list[InputSparseLinear]:
        """The maps of one input; of an FFN whose gate chooses neurons the gate alone."""
        chosen = gate_sparse_of(self.module, block) is not None
        roles = [role for role in MAPS[kind] if not (chosen and role in ("up", "down"))]
        return [self.module.get_submodule(block.sites[role].path) for role in roles]

    def largest_rank(self, kind: str) -> int:
        """Ranks of the remainders of one kind's maps together, in the block that has most."""
        ranks = (sum(m.low_rank[0].shape[1] for m in self.maps(b, kind) if m.low_rank) for b in self.blocks)
        return 0 if self.keep_all else max(ranks)

    def chooses(self, kind: str) -> bool:
        """Whether any map of a kind keeps the largest k."""
        return not self.keep_all and any(m.top_k is not None for b in self.blocks for m in self.maps(b, kind))

    def defines(self, tuning: Tuning) -> dict[str, int]:
        constants = {"WARPS": tuning.warps, "LOADS": tuning.loads, "WIDE": tuning.wide, "HEAD_DIM": self.head_dim}
        constants |= {"GROUP": self.num_heads // self.num_groups, "SPLITS": self.splits}
        constants |= ({"DENSE": 1} if self.keep_all else {}) | ({"BITS": self.packed.bits} if self.packed else {})
        constants |= {"TOPK": 1, "AHEAD": self.ahead} if any(self.top_k.values()) else {}
        return {**constants, "BF16": 1} if self.dtype == torch.bfloat16 else constants

    def plan(self) -> Iterator[Launch]:
        """The launches of one step."""
        base = self.module.base_model
        if self.begins:
            yield Launch(
                "embed", "embed", (8, 1), 0,
                [Pointer(base.get_input_embeddings().weight.data_ptr()), Pointer(self.token.data_ptr()),
                 Pointer(self.residual.data_ptr()), ctypes.c_int(self.hidden)], Tuning(warps=8),
            )  # fmt: skip
        for block in self.blocks:
            layer = self.module.get_submodule(block.path)
            norms = [m for m in layer.children() if hasattr(m, "variance_epsilon")]
            source = yield from self.normed(block, "qkv", norms[0])
            yield from self.gather(block, "qkv", [self.q, self.k, self.v], *source, zero=self.before_down)
            yield self.attend(block)
            mode, source = ("plain", self.whole) if self.merged else ("attention", self.partial)
            yield from self.gather(block, "o", [self.residual], mode, source, second=self.softmax, zero=self.qkv)
            source = yield from self.normed(block, "gate_up", norms[1])
            ffn = gate_sparse_of(self.module, block)
            outs = [self.gate, self.up] if ffn is None else [self.gate]
            yield from self.gather(block, "gate_up", outs, *source, zero=self.of_attention)
            if ffn is not None:
                yield from self.chosen_neurons(block, ffn, *source)
                continue
            behind = {"second": self.up, "zero": self.before_attention}
            yield from self.gather(block, "down", [self.residual], "swiglu", self.gate, **behind)
        if self.ends:
            yield self.head(base)

    def normed(self, block: Block, kind: str, norm: nn.Module) -> Iterator[Launch]:
        """The launch of a rotation behind a norm where there is one; returns (mode, source, norm) of what follows."""
        if not isinstance(norm, RotatedNorm):
            return "norm", self.residual, norm
        out, arguments = self.turned[kind], Gather()
        arguments.set_part(0, norm.rotation, self.residual, out, self.nothing_dropped)
        arguments.norm, arguments.eps = norm.weight.data_ptr(), norm.variance_epsilon
        label = f"{block.index}.{kind}.rotation"
        yield self.spread(
            "gather_norm", label, arguments, self.tunings[kind],
            lambda: {label: (out, out + unit(self.residual, norm) @ norm.rotation.float())},
        )  # fmt: skip
        return "plain", out, None

    def chosen_neurons(self, block: Block, ffn: GateSparseFFN, mode: str, source, norm) -> Iterator[Launch]:
        """The launches of up, by rows of the neurons that the gate chooses, and of down, which drops what is 0 then."""
        rows, tuning = Rows(), Tuning(16, 4, 1, 1.0)
        least = self.nothing_dropped if self.keep_all else ffn.threshold
        rows.weight, rows.input, rows.out = ffn.up.weight.data_ptr(), source.data_ptr(), self.up.data_ptr()
        rows.m, rows.n, rows.active, rows.least = self.mid, self.hidden, self.gate.data_ptr(), least.data_ptr()
        if norm is not None:
            rows.norm, rows.eps = norm.weight.data_ptr(), norm.variance_epsilon
        label = f"{block.index}.gate_up.up"

        def up() -> dict:
            x = source if norm is None else unit(source, norm)
            keep = F.silu(self.gate).abs() >= least
            return {label: (self.up, torch.where(keep, ffn.up.weight.float() @ x, 0))}

        def down() -> dict:
            y = ffn.down.float() @ (F.silu(self.gate) * self.up)
            return {f"{block.index}.down": (self.residual, self.residual + y)}

        ctas = round(self.processors * tuning.per_sm)
        yield Launch("rows", label, (ctas, 1), rows_bytes(self.hidden, tuning), [rows], tuning, up)
        last = Gather()
        last.set_part(
            0, ffn.down.t(), self.gate, self.residual, self.nothing_dropped if self.keep_all else self.nothing_but_zeros
        )
        last.second, last.zero, last.zero_count = (
            self.up.data_ptr(),
            self.before_attention.data_ptr(),
            self.before_attention.numel(),
        )
        yield self.spread("gather_swiglu", f"{block.index}.down", last, self.tunings["down"], down)

    def gather(self, block: Block, kind: str, outs, mode, source, norm=None, *, second=None, zero) -> Iterator[Launch]:
        """The launch of the maps of one input, and one more for their remainders; `zero` is cleared by the first."""
        maps, label, tuning = self.maps(block, kind), f"{block.index}.{kind}", self.tunings[kind]
        thresholds = [self.nothing_dropped if self.keep_all else m.threshold for m in maps]
        whole, rest = cuda_packed.PackedGather() if self.packed else Gather(), Gather()
        for i, (linear, out) in enumerate(zip(maps, outs, strict=True)):
            stored = linear.packed if self.packed else linear.weight.t()
            whole.set_part(i, stored, source, out, thresholds[i], linear.scale)
        arguments = whole.of if self.packed else whole
        hybrid = [] if self.keep_all else [i for i, linear in enumerate(maps) if linear.low_rank]
        factors = [maps[i].low_rank for i in hybrid]
        ranks = [len(b) for _, b in factors]
        inner = self.inner[kind][: sum(ranks)].split(ranks)
        for k, i in enumerate(hybrid):
            (a, b), rule = factors[k], (thresholds[i], maps[i].scale)
            arguments.set_part(len(maps) + k, a, source, inner[k], *rule, complement=True)
            rest.set_part(k, b, inner[k], outs[i], self.nothing_dropped)
        chosen = self.choices(block, kind, arguments, {len(maps) + k: i for k, i in enumerate(hybrid)})
        if second is not None:
            arguments.second = second.data_ptr()
        if norm is not None:
            arguments.norm, arguments.eps = norm.weight.data_ptr(), norm.variance_epsilon
        if zero.numel():
            arguments.zero, arguments.zero_count = zero.data_ptr(), zero.numel()

        def reference() -> dict:
            """Masked-dense in fp32 on the buffers as they are now: what this launch must add to its outputs."""
            x = source
            if mode == "norm":
                x = unit(x, norm)
            elif mode == "swiglu":
                x = F.silu(x) * second
            elif mode == "attention":
                fade = (second[..., :1] - second[..., :1].amax(1, keepdim=True)).exp()
                x = ((x * fade).sum(1) / (second[..., 1:] * fade).sum(1)).flatten()
            expected, keep = {}, [torch.ones_like(x, dtype=torch.bool) if self.keep_all else m.keep(x) for m in maps]
            for i, (linear, out) in enumerate(zip(maps, outs, strict=True)):
                expected[f"{label}[{i}]"] = (out, out + exact_weight(linear) @ torch.where(keep[i], x, 0))
            for k, i in enumerate(hybrid):
                dropped = torch.where(keep[i], 0, x)
                expected[f"{label}[{i}].a"] = (inner[k], inner[k] + dropped @ factors[k][0].float())
            return expected

        def reference_of_rest() -> dict:
            added = {i: inner[k] @ factors[k][1].float() for k, i in enumerate(hybrid)}
            return {f"{label}[{i}].b": (outs[i], outs[i] + value) for i, value in added.items()}

        room = choose_bytes(max(arguments.n), tuning) if chosen else 0
        if chosen and self.choose == "before":
            first = Gather.from_buffer_copy(arguments)
            arguments.top_k[:] = [-1] * len(arguments.top_k)
            yield Launch(f"choose_{mode}", f"{label}.choose", (len(maps), 1), room, [first], tuning)
            room = 0
        if self.packed:
            tiling = cuda_packed.grid([linear.shape[0] for linear in maps], maps[0].packed, tuning, self.processors)
            shared = max(room, cuda_packed.shared_bytes(tuning, self.packed.bits))
            yield Launch(f"gather_packed_{mode}", label, tiling, shared, [whole], tuning, reference)
            return
        yield self.spread(f"gather_{mode}", label, arguments, tuning, reference, room)
        if hybrid:
            yield self.spread("gather_plain", f"{label}.remainder", rest, tuning, reference_of_rest)

    def choices(self, block: Block, kind: str, arguments: Gather, remainders: dict[int, int]) -> bool:
        """Tell a launch which parts keep the largest k: maps of one rule share a word, which the first of them fills.

        remainders: part -> map. Returns whether there is any.
        """
        if self.keep_all:
            return False
        maps, places = self.maps(block, kind), {}
        words = self.inner[kind][-2 * len(maps) :].view(-1, 2)
        guesses = self.guesses[self.blocks.index(block), list(MAPS).index(kind)]
        for part, i in ({i: i for i in range(len(maps))} | remainders).items():
            linear = maps[i]
            if linear.top_k is None:
                continue
            rule = linear.top_k, None if linear.scale is None else linear.scale.data_ptr()
            first = rule not in places
            place = places.setdefault(rule, len(places))
            arguments.choose(part, linear.top_k if first else -1, words[place], guesses[place:])
        return bool(places)

    def spread(self, name: str, label: str, arguments: Gather, tuning: Tuning, reference, room: int = 0) -> Launch:
        """A gather over tiles of outputs and, where there are channels enough for every warp, over shares of them."""
        tiles = sum(-(-m // (256 * tuning.wide)) for m in arguments.m)
        most = -(-max(arguments.n) // (2 * tuning.warps))
        shares = max(1, min(most, round(self.processors * tuning.per_sm / tiles)))
        shared = max(room, gather_bytes(tuning))
        return Launch(name, label, (tiles, shares), shared, [arguments], tuning, reference)

    def attend(self, block: Block) -> Launch:
        tuning, layer = self.tunings["attend"], self.cache.layers[block.index]
        arguments = Attend()
        for name, linear in zip("qkv", self.maps(block, "qkv"), strict=True):
            setattr(arguments, name, getattr(self, name).data_ptr())
            if linear.bias is not None:
                setattr(arguments, f"{name}_bias", linear.bias.data_ptr())
        for name in ("cosine", "sine", "position", "partial", "softmax"):
            setattr(arguments, name, getattr(self, name).data_ptr())
        arguments.positions = self.positions
        arguments.keys, arguments.values = layer.keys.data_ptr(), layer.values.data_ptr()
        arguments.scaling = self.head_dim**-0.5
        if self.merged:
            arguments.whole, arguments.arrived = self.whole.data_ptr(), self.arrived_heads.data_ptr()
        group = self.num_heads // self.num_groups
        shared = group * (self.head_dim + tuning.warps * (self.head_dim + 2)) * 4
        return Launch("attend", f"{block.index}.attend", (self.num_groups, self.splits), shared, [arguments], tuning)

    def head(self, base: nn.Module) -> Launch:
        tuning, weight = self.tunings["head"], self.module.get_output_embeddings().weight
        norm = next(m for m in base.children() if hasattr(m, "variance_epsilon"))
        ctas = round(self.processors * tuning.per_sm)
        arguments = Rows()
        arguments.weight, arguments.input, arguments.norm = (
            weight.data_ptr(),
            self.residual.data_ptr(),
            norm.weight.data_ptr(),
        )
        arguments.out, arguments.eps = self.logits.data_ptr(), norm.variance_epsilon
        arguments.m, arguments.n = weight.shape
        for name in ("token", "position", "best", "best_row"):
            setattr(arguments, name, getattr(self, name).data_ptr())
        arguments.arrived = self.arrived.data_ptr()
        shared = rows_bytes(self.hidden, tuning)

        def reference() -> dict:
            return {"head": (self.logits, weight.float() @ unit(self.residual, norm))}

        return Launch("rows", "head", (ctas, 1), shared, [arguments], tuning, reference)

    def start(self, launch: Launch) -> None:
        """Start one kernel on the current stream; it may begin while the one before it drains."""
        device = torch.cuda.current_device()
        kernel = _nvrtc.function(SOURCE, launch.name, device, launch.shared_bytes, **self.defines(launch.tuning))
        _nvrtc.launch(
            kernel, launch.grid, launch.tuning.warps * 32, launch.shared_bytes, launch.arguments, overlap=True
        )

    def enqueue(self) -> None:
        """Start the whole step."""
        for launch in self.launches:
            self.start(launch)

    def check(self, run: Callable[[Launch], None], after: Callable[[], None]) -> dict[str, float]:
        """Relative error of every projection and the head against masked-dense in fp32, over one step.

        `run` executes one launch, `after` waits for it. Every launch gets the buffers the previous ones left, so
        rounding near a threshold can't grow from layer to layer.
        """
        errors = {}
        for launch in self.launches:
            expected = launch.reference() if launch.reference else {}
            expected = {name: (out, value, out.clone()) for name, (out, value) in expected.items()}
            run(launch)
            after()
            for name, (out, value, before) in expected.items():
                change = before if launch.name.startswith("gather") else torch.zeros_like(before)
                size = float((value - change).norm())
                errors[name] = float((out - value).norm()) / (size or 1.0)
        return errors


def unit(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """RMSNorm of x [n] in fp32."""
    return x * torch.rsqrt(x.square().mean() + norm.variance_epsilon) * norm.weight.float()
