"""The compiled loop of decode attention over kept key-value groups: what a sequence drops is not read."""

from __future__ import annotations

import numpy as np
from numba import njit

from sparsebench.kernels._gather_numba import narrow, widen


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"})
def attend(q, keys, values, pairs, lengths, scaling, out, lo, hi):
    """Heads of the listed (sequence, group) pairs lo..hi-1. q and out [B, groups, G, D]; keys, values [B, groups, P, D].

    Each position's key and value are read once for the G heads of a group; sums are fp32.
    """
    shared, size = q.shape[2], q.shape[3]
    query, scores = np.empty((shared, size), np.float32), np.empty((shared, keys.shape[2]), np.float32)
    mixed = np.empty((shared, size), np.float32)
    for each in range(lo, hi):
        b, group = pairs[each, 0], pairs[each, 1]
        length = lengths[b]
        for g in range(shared):
            for d in range(size):
                query[g, d], mixed[g, d] = widen(q[b, group, g, d]) * scaling, 0
        for p in range(length):
            key = keys[b, group, p]
            for g in range(shared):
                own, total = query[g], np.float32(0)
                for d in range(size):
                    total += widen(key[d]) * own[d]
                scores[g, p] = total
        for g in range(shared):
            top, weight = scores[g, 0], np.float32(0)
            for p in range(length):
                top = max(top, scores[g, p])
            for p in range(length):
                scores[g, p] = np.exp(scores[g, p] - top)
                weight += scores[g, p]
            for p in range(length):
                scores[g, p] /= weight
        for p in range(length):
            value = values[b, group, p]
            for g in range(shared):
                own, share = mixed[g], scores[g, p]
                for d in range(size):
                    own[d] += share * widen(value[d])
        for g in range(shared):
            for d in range(size):
                out[b, group, g, d] = narrow(mixed[g, d], out)
