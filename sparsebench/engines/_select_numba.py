"""The k largest |x| c of a token, exactly: a radix select over the bits of float32, in three passes (numba).

Magnitudes are ordered as their bits are. Each pass counts the values that share the digits known so far by their next
digit (11, 11 and 10 bits), so no sorting is needed for the k-th largest; of values equal to it the first ones are kept.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sparsebench.kernels._gather_numba import bits_of

DIGIT = 11  # bits
BINS = 1 << DIGIT


@njit(nogil=True, cache=True)
def largest(bits, k):
    """(bits of the k-th largest, how many that equal it belong to the k largest); 1 <= k <= len(bits)."""
    counts = np.zeros(BINS, np.int64)
    prefix, mask = np.uint32(0), np.uint32(0)
    for shift in (21, 10, 0):
        digit = np.uint32(BINS - 1 if shift else (1 << 10) - 1)
        counts[:] = 0
        for i in range(bits.shape[0]):
            if (bits[i] & mask) == prefix:
                counts[(bits[i] >> np.uint32(shift)) & digit] += 1
        place = np.int64(digit)
        while counts[place] < k:
            k -= counts[place]
            place -= 1
        prefix |= np.uint32(place) << np.uint32(shift)
        mask |= digit << np.uint32(shift)
    return prefix, k


@njit(nogil=True, cache=True)
def compact_largest(x, k, scale, index, values):
    """Channels of x [n] with the k largest |x| c and their values, in order; zeros are dropped. Returns the count.

    scale: c [n] or empty; index [n + 1], values [1, n + 1].
    """
    n = x.shape[0]
    if k == 0:
        return 0
    bits = np.empty(n, np.uint32)
    for i in range(n):
        bits[i] = bits_of(abs(x[i]) * scale[i] if scale.size else abs(x[i]))
    limit, ties = largest(bits, min(k, n))
    count = 0
    for i in range(n):
        kept = bits[i] > limit
        if bits[i] == limit and ties > 0:
            ties -= 1
            kept = True
        index[count] = i
        values[0, count] = x[i]
        count += kept and x[i] != 0
    return count
