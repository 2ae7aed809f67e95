"""A whole decode step of a Llama-type model on a CPU, dense or sparse, in one compiled call (_step_numba.py).

Nothing of Python runs inside a step. Weights, cache and norms are read where torch keeps them: a table holds their
addresses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import nn

from sparsebench.engines import _step_numba as table
from sparsebench.engines import _step_packed, gate_sparse_of, heads, llama_type, prefilled, quantisation, rotary_tables
from sparsebench.engines._step_numba import step
from sparsebench.kernels import cpu_packed
from sparsebench.kernels.cpu_numba import as_numpy
from sparsebench.modules import storage
from sparsebench.modules.rotated_norm import RotatedNorm
from sparsebench.sites import exact_weight, find_blocks

DTYPES = (torch.float32, torch.bfloat16)
MAPS = ("q", "k", "v", "o", "gate", "up", "down")  # in the order of the table's columns


def unsupported(module: nn.Module) -> str | None:
    """Why this model's step can't be fused, or None."""
    problem = llama_type(module, DTYPES, top_k=True)
    packed = None if problem else quantisation(module, find_blocks(module))
    return problem if packed is None else cpu_packed.unserved(packed)


class Decoder:
    """A fused step with its prompt. The interface of engines.reference.Decoder.

    Raises ValueError for a model that `unsupported` names.
    """

    engine, marked_by = "fused", "the step's own marks, first thread"

    def __init__(self, module: nn.Module, prompt: torch.Tensor, room: int, keep_all: bool = False):
        problem = unsupported(module)
        if problem:
            raise ValueError(f"no fused decode step: {problem}")
        config, self.module, self.lying = module.config, module, storage.lie(module)
        self.length, self.threads = prompt.shape[1], torch.get_num_threads()
        self.cache, self.logits = prefilled(module, prompt, room)
        count, groups, head_dim = heads(config)
        hidden, inner, positions = config.hidden_size, config.intermediate_size, self.length + room
        self.blocks = find_blocks(module)
        self.zero = torch.zeros(())  # the threshold of down behind chosen neurons: those left out are 0
        self.held = []  # tensors whose addresses stand in the table
        self.table = np.zeros((len(self.blocks), table.COLUMNS), np.int64)
        self.fill_all()
        base = module.base_model
        norm = next(m for m in base.children() if hasattr(m, "variance_epsilon"))
        self.pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        widest = max(hidden, inner, count * head_dim)
        cosine, sine = rotary_tables(module, positions)
        self.fixed = (
            self.table, (hidden, inner, count, groups, head_dim, positions), np.float32(norm.variance_epsilon),
            keep_all, as_numpy(base.get_input_embeddings().weight.detach()), as_numpy(norm.weight.detach()),
            as_numpy(module.get_output_embeddings().weight.detach()), cosine.numpy(), sine.numpy(),
            *self.kind_of_weights(),
        )  # fmt: skip
        self.residual = np.zeros(hidden, np.float32)
        self.output = np.zeros(module.get_output_embeddings().weight.shape[0], np.float32)
        self.buffers = (
            self.residual, np.zeros((count + 2 * groups) * head_dim, np.float32), np.zeros(count * head_dim, np.float32),
            np.zeros((2, inner), np.float32), np.zeros(hidden, np.float32), np.zeros((self.threads, positions), np.float32),
            np.zeros((self.threads, hidden), np.float32), np.zeros((self.threads, widest + 1), np.int64),
            np.zeros((self.threads, widest + 1), np.float32), np.zeros((self.threads, widest + 64), np.float32), self.output,
            np.zeros(2, np.int64),
        )  # fmt: skip
        self.position, self.marks = self.length, np.zeros(0, np.int64)
        self.threads = min({1, self.threads}, key=self.seconds_with)  # a small model is faster without a second thread

    def seconds_with(self, threads: int, rounds: int = 15) -> float:
        """Median seconds of a step with so many threads, after the first (which may compile)."""
        self.threads, times = threads, []
        for _ in range(rounds + 3):
            self.rewind()
            start = time.perf_counter()
            self.step(torch.zeros(1, 1, dtype=torch.int64))
            times.append(time.perf_counter() - start)
        self.rewind()
        return statistics.median(times[3:])

    def fill_all(self) -> None:
        """Write down where weights, thresholds and cache lie."""
        self.held.clear()
        for block, row in zip(self.blocks, self.table, strict=True):
            self.fill(block, row)

    def fill(self, block, row: np.ndarray) -> None:
        """Addresses of one layer."""
        layer = self.module.get_submodule(block.path)
        norms = [m for m in layer.children() if hasattr(m, "variance_epsilon")]
        cache, ffn = self.cache.layers[block.index], gate_sparse_of(self.module, block)
        row[table.TOP_K : table.TOP_K + len(MAPS)] = -1
        if ffn is not None:
            row[table.WEIGHT + 5], row[table.WEIGHT + 6] = ffn.up.weight.data_ptr(), ffn.down.data_ptr()
            row[table.THRESHOLD + 6], row[table.CUT] = self.zero.data_ptr(), ffn.threshold.data_ptr()
            self.held.append(ffn)
        for i, role in enumerate(MAPS if ffn is None else MAPS[:5]):
            linear = self.module.get_submodule(block.sites[role].path)
            row[table.WEIGHT + i], row[table.THRESHOLD + i] = (
                self.weight_of(linear, row, i),
                linear.threshold.data_ptr(),
            )
            row[table.TOP_K + i] = -1 if linear.top_k is None else linear.top_k
            row[table.SCALE + i] = linear.scale.data_ptr() if linear.scale is not None else 0
            for column, factor in zip((table.LOW_A, table.LOW_B), linear.low_rank or (), strict=False):
                row[table.RANK + i], row[column + i] = linear.low_rank_a.shape[1], factor.data_ptr()
                self.held.append(factor)
            if linear.bias is not None:
                row[table.BIAS + i] = linear.bias.data_ptr()
            self.held.append(linear)
        for i, norm in enumerate(norms):
            row[table.NORM + i] = norm.weight.data_ptr()
            row[table.ROTATION + i] = norm.rotation.data_ptr() if isinstance(norm, RotatedNorm) else 0
        row[table.KEYS], row[table.VALUES] = cache.keys.data_ptr(), cache.values.data_ptr()
        self.held += [norms, cache]

    def weight_of(self, linear, row: np.ndarray, i: int) -> int:
        """The address of a map's weight; scales and zero points of a quantised one go into the table here."""
        packed = getattr(linear, "packed", None)
        if packed is None:
            return linear.weight.data_ptr()
        row[_step_packed.SCALES + i] = packed.scale.data_ptr()
        row[_step_packed.ZEROS + i] = 0 if packed.zero is None else packed.zero.data_ptr()
        return packed.q.data_ptr()

    def kind_of_weights(self) -> tuple[np.ndarray, int]:
        """(an empty array of the type weights are stored in, their group as `weigh` takes it)."""
        packed = quantisation(self.module, self.blocks)
        if packed is None:
            return as_numpy(self.module.get_output_embeddings().weight.detach()[:0, 0]), 0
        group = packed.group if packed.axis == "input" else -packed.group
        return packed.q.numpy()[:0, 0], group if packed.grouped else 0

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits [1, 1, V] after one more token [1, 1]."""
        dynamic = (int(token), self.position)
        rest = (self.threads, *self.fixed, *dynamic, *self.buffers, self.marks)
        others = [self.pool.submit(step, thread, *rest) for thread in range(1, self.threads)]
        step(0, *rest)
        wait(others)
        for other in others:
            other.result()
        self.position += 1
        return torch.from_numpy(self.output).view(1, 1, -1)

    def rewind(self) -> None:
        """Back to the end of the prompt, with the weights as the step reads them."""
        storage.put(self.lying)
        self.position = self.length

    def marked(self, take: Callable[[], object], steps: int) -> dict[str, float]:
        """Milliseconds of a step by role while `take` takes so many, as the step itself marks them."""
        self.marks = np.zeros(len(table.ROLES), np.int64)
        try:
            take()
            return dict(zip(table.ROLES, (self.marks / 1e6 / steps).tolist(), strict=True))
        finally:
            self.marks = np.zeros(0, np.int64)

    def parity(self, token: torch.Tensor) -> dict[str, float]:
        """{"logits": relative error} against the same step in torch, fp32 and masked-dense, on the same cache."""
        self.rewind()
        expected = reference_step(self, int(token))
        logits = self.step(token.view(1, 1)).flatten()
        self.rewind()
        return {"logits": float((logits - expected).norm() / expected.norm())}


def reference_step(decoder: Decoder, token: int) -> torch.Tensor:
    """The same step in torch operations, fp32 throughout, on the decoder's own cache (which it leaves as it was)."""
    module, config, position = decoder.module, decoder.module.config, decoder.position
    count, groups, head_dim = heads(config)
    keep_all, cosine, sine = decoder.fixed[3], *(torch.from_numpy(t)[position] for t in decoder.fixed[7:9])

    def product(linear, x):
        keep = torch.ones_like(x, dtype=torch.bool) if keep_all else linear.keep(x)
        y = exact_weight(linear) @ torch.where(keep, x, 0)
        if linear.low_rank is not None:
            a, b = (f.float() for f in linear.low_rank)
            y = y + (torch.where(keep, 0, x) @ a) @ b
        return y if linear.bias is None else y + linear.bias.float()

    def norm(layer, x):
        x = x * torch.rsqrt(x.square().mean() + layer.variance_epsilon) * layer.weight.float()
        return x @ layer.rotation.float() if isinstance(layer, RotatedNorm) else x

    def ffn_of(block, maps, h):
        gate, chosen = torch.nn.functional.silu(product(maps["gate"], h)), gate_sparse_of(module, block)
        if chosen is None:
            return product(maps["down"], gate * product(maps["up"], h))
        active = gate if keep_all else torch.where(chosen.keep(gate), gate, 0)
        return chosen.down.float() @ (active * (chosen.up.weight.float() @ h))

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat((-second, first), -1) * sine

    x = module.base_model.get_input_embeddings().weight[token].float()
    for block in decoder.blocks:
        layer = module.get_submodule(block.path)
        norms = [m for m in layer.children() if hasattr(m, "variance_epsilon")]
        maps = {role: module.get_submodule(site.path) for role, site in block.sites.items()}
        cache, h = decoder.cache.layers[block.index], norm(norms[0], x)
        q = turned(product(maps["q"], h).view(count, head_dim))
        k = torch.cat(
            [cache.keys[0, :, :position].float(), turned(product(maps["k"], h).view(groups, head_dim))[:, None]], 1
        )
        v = torch.cat([cache.values[0, :, :position].float(), product(maps["v"], h).view(groups, 1, head_dim)], 1)
        k, v = (t.repeat_interleave(count // groups, 0) for t in (k, v))
        weights = ((k @ q[:, :, None])[..., 0] * head_dim**-0.5).softmax(-1)
        x = x + product(maps["o"], (weights[:, None] @ v).flatten())
        x = x + ffn_of(block, maps, norm(norms[1], x))
    last = next(m for m in module.base_model.children() if hasattr(m, "variance_epsilon"))
    return module.get_output_embeddings().weight.float() @ norm(last, x)
