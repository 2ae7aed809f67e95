"""Neuron metrics of an FFN model, switched on by eval.neurons: zeros of x1, unions over tokens, CETT and PPL-p%.

x1 [.., f] is the input of an FFN's last map W_d [d, f]; the output of neuron i is n_i = W_d[:, i] x1_i, with
||n_i|| = |x1_i| ||W_d[:, i]||. A neuron counts as inactive for a token
    x1_zero        where x1_i == 0, in the dtype the model runs in;
    aggregate(t)   where x1_i == 0 for all of t tokens in a row: what a step over t tokens can skip;
    PPL-p%         where ||n_i|| < epsilon of its layer, the epsilons at one CETT level for all layers, the level at which
                   perplexity on dev is (1 + p/100) times the dense one (arXiv 2411.02335, Sec. 2.2 and 4).
CETT(epsilon) = mean over tokens of ||sum of the dropped n_i|| / ||sum of all n_i|| (a plain FFN's bias stays out).
All shares are means over tokens, then the plain mean over layers. Thresholds come from dense inputs of each layer.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import nn

from sparsebench.config.settings import NeuronMetrics
from sparsebench.data.text import batches
from sparsebench.measure import quality
from sparsebench.measure.bisection import furthest
from sparsebench.modules.neuron_sparse import last_map, neuron_norms, product
from sparsebench.modules.x1 import watching
from sparsebench.records.progress import shown
from sparsebench.sites import find_blocks

CANDIDATES = 1 << 20  # thresholds tried per layer at most: more distinct norms than these are thinned evenly
PRECISION = 1e-4  # of the perplexity ratio: closer than this the search stops
SMALLEST_STEP = 1e-6  # of CETT: the published code's tolerance


def zeros(module: nn.Module, sequences: torch.Tensor, batch_size: int, spans: list[int]) -> dict:
    """x1_zero and aggregate(t) for t in spans over windows [N, T]; a span counts whole groups of a window only."""
    zero: dict[int, int] = {}
    seen: dict[int, int] = {}
    union = {t: dict.fromkeys((b.index for b in find_blocks(module)), 0) for t in spans}
    groups = dict.fromkeys(spans, 0)

    def see(layer: int, x1: torch.Tensor) -> None:
        off = x1 == 0
        zero[layer] = zero.get(layer, 0) + int(off.sum())
        seen[layer] = seen.get(layer, 0) + off.numel()
        for t in spans:
            whole = off[:, : off.shape[1] // t * t].unflatten(1, (-1, t)).all(2)
            union[t][layer] += int(whole.sum())
            groups[t] += whole.numel() if layer == 0 else 0

    with watching(module, see):
        for batch in shown(batches(sequences, batch_size, module), -(-len(sequences) // batch_size), "neurons"):
            module.base_model(input_ids=batch, use_cache=False)
    per_layer = {layer: zero[layer] / seen[layer] for layer in sorted(seen)}
    aggregate = {
        t: sum(union[t].values()) / len(union[t]) / groups[t] if groups[t] else None for t in spans
    }  # None: windows shorter than t
    return {"x1_zero": mean(per_layer.values()), "per_layer": per_layer, "aggregate": aggregate}


class Layer:
    """x1 [M, f] of one layer on a sample of tokens, and the CETT of dropping its weak neurons."""

    def __init__(self, last: nn.Module, norms: torch.Tensor, x1: torch.Tensor, chunk: int = 4096):
        self.last, self.norms, self.x1, self.chunk = last, norms, x1, chunk
        self.lengths = torch.cat([self.output(part, None) for part in x1.split(chunk)])  # ||FFN(x)|| [M]
        values = torch.cat([self.strength(part).flatten().cpu() for part in x1.split(chunk)]).unique()
        kept = values if len(values) <= CANDIDATES else values[:: -(-len(values) // CANDIDATES)]
        ends = torch.cat([values[:2], values[-1:], torch.tensor([math.inf])])
        self.candidates = torch.cat([kept, ends]).unique()

    def strength(self, x1: torch.Tensor) -> torch.Tensor:
        """||n_i|| [M, f]."""
        return x1.to(self.norms).abs() * self.norms

    def output(self, x1: torch.Tensor, epsilon: float | None) -> torch.Tensor:
        """||sum of n_i|| [M] over neurons below epsilon, or over all."""
        x1 = x1.to(self.norms)
        if epsilon is not None:
            x1 = torch.where(self.strength(x1) < epsilon, x1, 0)
        weight_dtype = self.last.weight.dtype
        return torch.linalg.vector_norm(product(self.last, x1.to(weight_dtype)).float(), dim=-1)

    def cett(self, epsilon: float) -> float:
        """Mean over tokens; a token whose FFN output is exactly 0 has nothing to lose and counts as 0."""
        dropped = torch.cat([self.output(part, epsilon) for part in self.x1.split(self.chunk)])
        return float(torch.where(self.lengths > 0, dropped / self.lengths, 0).double().mean())

    def largest(self, level: float, low: int, high: int) -> int:
        """Index of the largest candidate with CETT <= level, known to lie in [low, high]; CETT is taken as rising."""
        while low < high:
            middle = (low + high + 1) // 2
            if self.cett(float(self.candidates[middle])) <= level:
                low = middle
            else:
                high = middle - 1
        return low


def sample(module: nn.Module, sequences: torch.Tensor, batch_size: int, tokens: int) -> list[Layer]:
    """The layers with x1 of the first `tokens` tokens, from one dense pass (kept on the CPU in the model's dtype)."""
    blocks = find_blocks(module)
    outputs: dict[int, list] = {b.index: [] for b in blocks}
    count = -(-tokens // sequences.shape[1])
    with watching(module, lambda layer, x1: outputs[layer].append(x1.flatten(0, -2).cpu())):
        for batch in batches(sequences[:count], batch_size, module):
            module.base_model(input_ids=batch, use_cache=False)
    with torch.no_grad():
        return [
            Layer(last_map(module, b), neuron_norms(module, b), torch.cat(outputs[b.index])[:tokens]) for b in blocks
        ]


def dropped(module: nn.Module, epsilons: list[float], sequences: torch.Tensor, batch_size: int) -> tuple[float, float]:
    """(token-mean NLL, share of neurons dropped) with neuron i off where ||n_i|| < epsilon of its layer."""
    blocks = find_blocks(module)
    norms = [neuron_norms(module, block) for block in blocks]
    off, seen = [0] * len(blocks), [0] * len(blocks)

    def see(layer: int, x1: torch.Tensor) -> torch.Tensor:
        drop = x1.float().abs() * norms[layer] < epsilons[layer]
        off[layer] += int(drop.sum())
        seen[layer] += drop.numel()
        return torch.where(drop, 0, x1)

    with ExitStack() as stack:
        stack.enter_context(watching(module, see))
        nll = quality.perplexity(module, sequences, batch_size)["nll"]
    return nll, mean(o / s for o, s in zip(off, seen, strict=True))


def search(module: nn.Module, sequences: torch.Tensor, batch_size: int, settings: NeuronMetrics) -> dict:
    """The CETT level and epsilons at which perplexity over `sequences` is (1 + increase %) of the dense one, by bisection.

    `reached` is false where no level gives a ratio within 1e-3 of it (the nearest one below is returned).
    """
    layers = sample(module, sequences, batch_size, settings.tokens)
    dense = quality.perplexity(module, sequences, batch_size)["nll"]
    target = 1 + settings.increase / 100

    def at(level: float, low: list[int], high: list[int]) -> tuple[list[int], list[float]]:
        with torch.no_grad():
            index = [layer.largest(level, a, b) for layer, a, b in zip(layers, low, high, strict=True)]
        return index, [float(layer.candidates[i]) for layer, i in zip(layers, index, strict=True)]

    lowest, highest = [0] * len(layers), [len(layer.candidates) - 1 for layer in layers]
    below, epsilons = at(0.0, lowest, highest)  # neurons without any effect
    above = highest
    nll, share = dropped(module, epsilons, sequences, batch_size)
    point = {"cett": 0.0, "ratio": math.exp(nll - dense), "epsilon": epsilons, "sparsity": share}

    def passes(level: float) -> bool:
        nonlocal below, above, point
        index, epsilons = at(level, below, above)
        nll, share = dropped(module, epsilons, sequences, batch_size)
        ratio = math.exp(min(nll - dense, 700.0))
        if ratio >= target and abs(ratio - target) > PRECISION:
            above = index
            return False
        below = index
        point = {"cett": level, "ratio": ratio, "epsilon": epsilons, "sparsity": share}
        return True

    def close(low: float, high: float) -> bool:
        return high - low <= SMALLEST_STEP or abs(point["ratio"] - target) <= PRECISION

    if settings.increase > 0:
        furthest(passes, 0.0, 1.0, close)
    return point | {"target": target, "reached": abs(point["ratio"] - target) <= 1e-3}


def measure(module: nn.Module, data, settings) -> dict:
    """All metrics: zeros on test, thresholds searched on dev, their sparsity and perplexity ratio on test.

    settings: eval of the configuration.
    """
    text, neurons = settings.text, settings.neurons
    batch_size = text.batch_size
    test, dev = data.test.sequences(text.test_sequences), data.dev.sequences(text.dev_sequences)
    result = zeros(module, test, batch_size, neurons.aggregate)
    result["cett"] = on_dev = search(module, dev, batch_size, neurons)
    nll, share = dropped(module, on_dev["epsilon"], test, batch_size)
    dense = quality.perplexity(module, test, batch_size)["nll"]
    on_dev["test"] = {"sparsity": share, "act_ratio": 1 - share, "ratio": math.exp(min(nll - dense, 700.0))}
    result["definition"] = (
        f"x1_zero: x1 == 0, test; aggregate: zero for all of t tokens, test; cett: PPL-{neurons.increase:g}% on dev, "
        f"1 - |dropped|/f; means over tokens, then over layers"
    )
    return result


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
