"""A convolution on the CPU that does no work for zeros of its input map: part of the backend `cpu_numba`.

Each input pixel's non-zero channels are listed once; each listed value times its filter row (all output channels,
contiguous) is added to the outputs it reaches. A linear map is the 1 x 1 case. Output channels come last in memory.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def scatter(x, weight, out, stride, padding, dilation):
    """out[y, x, :] += sum of x[c, h, w] * weight[a, b, c, :] over non-zero x; groups = 1.

    x [C, H, W], weight [kh, kw, C, M], out [OH, OW, M] (holding the bias), stride, padding, dilation (rows, columns).
    """
    channels, height, width = x.shape
    kernel_h, kernel_w, _, outputs = weight.shape
    out_h, out_w, _ = out.shape
    index, values = np.empty(channels, np.int64), np.empty(channels, np.float32)
    for h in range(height):
        for w in range(width):
            count = 0
            for c in range(channels):
                value = x[c, h, w]
                if value != 0:
                    index[count], values[count] = c, value
                    count += 1
            if count == 0:
                continue
            for a in range(kernel_h):
                y = h + padding[0] - a * dilation[0]
                if y < 0 or y % stride[0] or y // stride[0] >= out_h:
                    continue
                for b in range(kernel_w):
                    z = w + padding[1] - b * dilation[1]
                    if z < 0 or z % stride[1] or z // stride[1] >= out_w:
                        continue
                    target, rows = out[y // stride[0], z // stride[1]], weight[a, b]
                    for k in range(count):
                        row, value = rows[index[k]], values[k]
                        for m in range(outputs):
                            target[m] += value * row[m]
