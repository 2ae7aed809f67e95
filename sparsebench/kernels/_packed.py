"""Weights in 8 or 4 bits, stored so that one input channel lies together: rounding, packing and what they stand for.

What a packed weight means is `dequantised`, every kernel is held against it. Stored per input channel, in blocks of 64
outputs (padded with zeros), so that a channel that is dropped is a row that is not read:
    int8    q [n, 64 k] int8; one scale per output, scale [1, m] float32, or as int4 along the inputs, without zero
    int4    q [n, 32 k] uint8, as q + 8: a block of 64 is eight little-endian words, nibble j of word l holds output 8 j + l
            axis=input    scale [ceil(n / group), m] float16, shared by `group` inputs of an output
            axis=output   scale [n, ceil(m / group)] float16, shared by `group` outputs of an input
    zero    as scale, in units of the stored nibble; None = 8 (symmetric)
Why: docs/quantisation.md, Scales and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK = 64  # outputs stored together
AXES = ("input", "output")
MIDDLE = 8  # the nibble of a symmetric 0


@dataclass(frozen=True)
class Packed:
    """One quantised weight [m, n]; dtype: that of its inputs and outputs."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    shape: tuple[int, int]
    bits: int
    group: int  # int8: all n inputs
    axis: str
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def row_bytes(self) -> int:
        """Payload of one input channel as stored, padding included."""
        return self.q.shape[1]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.q, self.scale, self.zero) if t is not None]

    @property
    def bytes(self) -> int:
        """Everything that a product with nothing skipped reads."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def read_bytes(self, kept: float, groups: float) -> float:
        """Bytes of a product of one row that keeps `kept` input channels, which touch `groups` groups of inputs.

        The payload of a kept channel, and scales and zeros: of a kept channel (axis=output), of a touched group
        (axis=input), all of them (int8, where anything is kept).
        """
        aside = sum(t[0].numel() * t.element_size() for t in self.tensors[1:])
        times = kept if self.bits == 4 and self.axis == "output" else groups
        return kept * self.row_bytes + times * aside

    @property
    def grouped(self) -> bool:
        """Whether scales are shared by groups, in float16; else there is one per output, in float32."""
        return self.scale.dtype == torch.float16

    @property
    def groups(self) -> int:
        """Groups of input channels that share scales (axis=input)."""
        return -(-self.shape[1] // self.group) if self.grouped else 1

    def group_of(self) -> torch.Tensor:
        """The group of every input channel, int64 [n] (axis=input)."""
        return torch.arange(self.shape[1], device=self.device) // self.group

    def levels(self) -> torch.Tensor:
        """The stored integers [n, m]: int8 in -128..127, or nibbles in 0..15, as uint8."""
        m, n = self.shape
        if self.bits == 8:
            return self.q[:, :m]
        words = self.q.view(n, -1, 8, 4)
        nibbles = torch.stack([words & 15, words >> 4], -1)  # [n, blocks, word, byte, half]
        return nibbles.permute(0, 1, 3, 4, 2).reshape(n, -1)[:, :m]

    def scales(self) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(scale, zero) of every weight, float32, to be broadcast over [n, m]."""
        m, _ = self.shape
        if not self.grouped:
            return self.scale, 0.0

        def spread(t: torch.Tensor) -> torch.Tensor:
            wide = t.float()
            return wide[self.group_of()] if self.axis == "input" else wide.repeat_interleave(self.group, 1)[:, :m]

        middle = float(MIDDLE) if self.bits == 4 else 0.0
        return spread(self.scale), middle if self.zero is None else spread(self.zero)

    def dequantised(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [m, n] it stands for, input channels contiguous; computed in float32, given in its own dtype."""
        scale, zero = self.scales()
        return ((self.levels().float() - zero) * scale).to(dtype or self.dtype).t()


def quantised(weight: torch.Tensor, bits: int, group: int = 128, axis: str = "input") -> Packed:
    """Round a weight [m, n] to the nearest of its levels: symmetric, -127..127 with s = max|w| / 127 per output (int8), or
    -8..7 with s = max|w| / 7 per group (int4). Levels are those of the scale as stored, so no entry is off by more than
    s / 2.
    """
    columns, (m, n) = weight.detach().float().t(), weight.shape
    if bits == 8:
        scale = columns.abs().amax(0, keepdim=True) / 127
        levels = (columns / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127).to(torch.int8)
        return packed(levels, scale, None, 8, n, "input", weight.dtype)
    dimension, size = (0, n) if axis == "input" else (1, m)
    padded = torch.nn.functional.pad(columns, (0, 0, 0, -n % group) if axis == "input" else (0, -m % group))
    largest = padded.abs().unflatten(dimension, (-1, group)).amax(dimension + 1)
    scale = (largest / 7).half()
    scale = torch.where(
        largest > 7.5 * scale.float(), (scale.view(torch.int16) + 1).view(torch.float16), scale
    )  # rounded up
    if not torch.isfinite(scale).all():
        raise ValueError(
            f"model.quantize=int4: a weight of {float(largest.max()):.3g} is too large for scales in float16"
        )
    spread = scale.float().repeat_interleave(group, dimension).narrow(dimension, 0, size)
    levels = (columns / spread.clamp_min(2**-24)).round().clamp(-8, 7) + MIDDLE
    return packed(levels.to(torch.uint8), scale, None, 4, group, axis, weight.dtype)


def packed(
    levels: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int, axis: str, dtype
) -> Packed:
    """Store levels [n, m] (int8, or nibbles 0..15 as uint8) as kernels read them. Shapes of scale and zero: see above."""
    n, m = levels.shape
    middle = MIDDLE if bits == 4 else 0
    whole = torch.nn.functional.pad(levels, (0, -m % BLOCK), value=middle).contiguous()
    if bits == 4:
        nibbles = whole.view(n, -1, 4, 2, 8)  # [n, blocks, byte, half, word]
        whole = (nibbles[:, :, :, 0] | nibbles[:, :, :, 1] << 4).transpose(2, 3).reshape(n, -1)
    aside = [None if t is None else t.contiguous() for t in (scale, zero)]
    return Packed(whole.contiguous(), aside[0], aside[1], (m, n), bits, group, axis, dtype)
