"""The integers inside GGUF's simplest block types, for kernels that read them: Q4_0, Q4_1 and Q8_0, 32 inputs to a scale.

Layout: ggml's block_q4_0 (scale, 16 bytes: inputs 0..15 below, 16..31 above), block_q4_1 (scale, minimum, 16 bytes) and
block_q8_0 (scale, 32 bytes); scales and minima are float16.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sparsebench.models.gguf.header import File, Tensor

GROUP = 32
KEPT = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)


def read(file: File, tensor: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
    """(levels [m, n], scale [m, n / 32] float16, zero in levels likewise or None, bits) of a tensor [m, n].

    A weight is scale * (level - zero); zero None: 8 for nibbles, 0 for int8. A zero of Q4_1 is -minimum / scale, rounded to
    float16.
    """
    rows, columns = tensor.shape
    width = GGML_QUANT_SIZES[tensor.type][1]
    data = np.memmap(file.path, np.uint8, "r", tensor.start, (tensor.elements // GROUP * width,))
    blocks = data.reshape(rows, columns // GROUP, width)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    if tensor.type == GGMLQuantizationType.Q8_0:
        return blocks[..., 2:].view(np.int8).reshape(rows, columns), scale, None, 8
    halves = blocks[..., -16:]
    levels = np.concatenate([halves & 15, halves >> 4], -1)
    if tensor.type == GGMLQuantizationType.Q4_0:
        return levels.reshape(rows, columns), scale, None, 4
    minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
    flat = scale == 0  # every weight of the block is its minimum: one level above 8, by a scale of that size
    zero = np.where(flat, 8, -minimum / np.where(flat, 1, scale.astype(np.float32))).astype(np.float16)
    levels = np.where(flat[..., None], np.uint8(9), levels)
    return levels.reshape(rows, columns), np.where(flat, minimum.astype(np.float16), scale), zero, 4
