"""Polar Sparsity: each token attends with some of its heads; ReLU neurons are skipped by a batch's union (arXiv 2505.14884).

Head sparsity saves reads of the KV cache, which every sequence has for itself, so it does not fade as batches grow; the
union of active neurons does. Selection: the largest ||a_h|| of a token's heads (oracle: a bound, simulated), of the token
before it (simulated), a fixed ranking from calibration, or a linear router trained to foresee the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsebench.calibration.histograms import observe
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.methods.polar import budgets, neuron_router
from sparsebench.methods.prosparse import predictor
from sparsebench.modules import heads
from sparsebench.modules.input_sparse import PROMPT_POLICIES
from sparsebench.records.state import State
from sparsebench.sites import Block, find_blocks

UNITS = ("auto", "head", "group")
LEARNING_RATE = 1e-2  # of the linear routers [choice]


@dataclass(kw_only=True)
class Training:
    """How the linear routers are trained."""

    epochs: int = setting(gt=0)
    density: float = setting(gt=0, le=1)


@dataclass(kw_only=True)
class Polar(Method):
    """Settings; `density`, `budget`, `neurons` and `prompt` can be changed without a new fit."""

    name: str = setting(**NAME_PATTERN)
    density: float = setting(gt=0, le=1)
    unit: str = setting(choices=UNITS)
    first_dense: int = setting(ge=0)
    budget: str = setting(choices=("uniform", "energy"))
    router: str = setting(choices=heads.ROUTERS)
    score: str = setting(choices=("norm", "out"))
    neurons: str = setting(choices=("none", "exact", "router"))
    neuron_batch: int | None = setting(gt=0)
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    training: Training
    neuron_router: predictor.Settings
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"density": 1.0, "neurons": "none"}
    operating_point: ClassVar = ("density", "budget", "neurons", "prompt")

    def __post_init__(self):
        if self.neurons == "router":
            self.operating_point = ("density", "budget", "prompt")  # its routers are trained in the fit

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """Statistics of ||a_h|| on data.fit, and the routers where they are asked for.

        Tensors: `norms.<layer>` mean score of each unit; `curve.<layer>` mean shares of squared scores, largest first;
        `router.<layer>.weight` [units, d] and `.bias`; `predictor.<layer>.*` of the neurons (polar/neuron_router.py).
        """
        module, blocks = loaded.module, find_blocks(loaded.module)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        layers = {block.index: Layer(self, module, block) for block in blocks[self.first_dense :]}
        passes = 1 + (self.training.epochs if self.router == "trained" else 0)
        for number in range(passes):
            observers = {}
            for block in blocks[self.first_dense :]:
                layer = layers[block.index]
                observers[block.sites["q" if "q" in block.sites else "qkv"].path] = layer.see_input
                observers[block.sites["o"].path] = layer.see_heads if number == 0 else layer.learn
            observe(module, sequences, observers, work.batch_size)
        state = State(info={"kind": "calibrated", "tokens": sequences.numel()})
        for index, layer in layers.items():
            state.tensors |= {
                f"norms.{index}": layer.norms / layer.tokens,
                f"curve.{index}": layer.curve / layer.tokens,
            }
            if layer.route is not None:
                weight, bias = (t.detach() for t in layer.route)
                state.tensors |= {f"router.{index}.weight": weight / layer.scale, f"router.{index}.bias": bias}
        state.info["extra"] = {"polar": {"units": {i: layer.units for i, layer in layers.items()}}}
        if self.neurons == "router":
            rows = max(1, self.neuron_router.tokens // data.fit.sequence_length)
            tensors, told = neuron_router.fit(
                module, data.fit.sequences(rows), self.neuron_router, self.neuron_batch, work
            )
            state.tensors |= tensors
            state.info["extra"]["polar"]["neurons"] = told
        return state

    def units(self, config: Any) -> tuple[int, int, bool]:
        """(heads, units, whether a unit is a key-value group)."""
        count = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or count
        grouped = self.unit == "group" or (self.unit == "auto" and groups < count)
        return count, groups if grouped else count, grouped

    def kept(self, state: State, config: Any, blocks: list[Block]) -> dict[int, int]:
        """Units kept by layer, for layers that are not left dense."""
        _, units, grouped = self.units(config)
        count = budgets.head_count(units, self.density, grouped)
        sparse = [block.index for block in blocks[self.first_dense :]]
        if self.budget == "uniform" or not sparse:
            return dict.fromkeys(sparse, count)
        curves = [state.tensors[f"curve.{index}"] for index in sparse]
        return dict(zip(sparse, budgets.by_energy(curves, count * len(sparse)), strict=True))

    def apply(self, module, state: State, work: Work):
        """Put head-sparse output projections into all layers but the first, and neuron-sparse FFNs where asked for."""
        blocks, config, kernel = find_blocks(module), module.config, work.hardware.kernel_name
        if "o" not in blocks[0].sites or isinstance(module.get_submodule(blocks[0].sites["o"].path), Conv1D):
            raise ValueError(f"method=polar takes models with a linear output projection, got {type(module).__name__}")
        count, units, _ = self.units(config)
        like = next(module.parameters())
        for index, kept in self.kept(state, config, blocks).items():
            if kept == units:
                continue
            rule = {"ranking": state.tensors[f"norms.{index}"].to(like.device, torch.float32)}
            if self.router == "trained":
                rule["route"] = tuple(state.tensors[f"router.{index}.{name}"].to(like) for name in ("weight", "bias"))
            heads.swap(
                module, blocks[index], count, units, kept, router=self.router, by_output=self.score == "out",
                prompt=self.prompt, kernel=kernel, **rule,
            )  # fmt: skip
        if self.neurons == "exact":
            for block in blocks:
                neuron_router.skip_zeros(module, block, kernel)
        if self.neurons == "router":
            counts = state.info["extra"]["polar"]["neurons"]["per_layer"]
            by_layer = {int(i): each["k"] for i, each in counts.items()} if self.neuron_batch is not None else None
            neuron_router.apply(module, state.tensors, by_layer, kernel)
        return module


class Layer:
    """What one layer's calibration holds: sums over tokens, and its router while it learns."""

    def __init__(self, method: Polar, module: nn.Module, block: Block):
        config, like = module.config, next(module.parameters())
        self.heads, self.units, grouped = method.units(config)
        linear = module.get_submodule(block.sites["o"].path)
        self.weight = linear.weight if method.score == "out" else None
        self.norms = torch.zeros(self.units, dtype=torch.float64, device=like.device)
        self.curve, self.tokens = torch.zeros_like(self.norms), 0
        self.target = budgets.head_count(self.units, method.training.density, grouped)
        self.hidden: torch.Tensor | None = None
        self.route: tuple[torch.Tensor, torch.Tensor] | None = None

    def see_input(self, x: torch.Tensor) -> None:
        self.hidden = x.flatten(0, -2).float()

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, units] of the concatenated heads x [.., heads * size]."""
        return heads.head_scores(x.flatten(0, -2), self.heads, self.units, self.weight)

    def see_heads(self, x: torch.Tensor) -> None:
        scores = self.scores(x).double()
        energy = scores.square()
        shares = energy / energy.sum(-1, keepdim=True).clamp_min(1e-30)
        self.norms += scores.sum(0)
        self.curve += shares.sort(-1, descending=True).values.sum(0)
        self.tokens += len(scores)

    def learn(self, x: torch.Tensor) -> None:
        """One step of weighted logistic regression: which units are among the `target` largest of each token."""
        if self.route is None:
            scale = self.hidden.square().mean().sqrt().clamp_min(1e-6)
            weight = torch.zeros(self.units, self.hidden.shape[1], device=self.hidden.device)
            self.route = nn.Parameter(weight), nn.Parameter(torch.zeros(self.units, device=weight.device))
            self.scale = float(scale)
            self.optimizer = torch.optim.AdamW(self.route, lr=LEARNING_RATE / self.hidden.shape[1] ** 0.5)
        scores = self.scores(x)
        label = torch.zeros_like(scores).scatter_(-1, scores.topk(self.target, -1).indices, 1.0)
        share = self.target / self.units
        balance = torch.where(label > 0, 1.0, share / max(1 - share, 1e-6))
        for hidden, wanted, factor in zip(*(t.split(256) for t in (self.hidden, label, balance)), strict=True):
            with torch.no_grad():
                off = factor * ((hidden / self.scale @ self.route[0].t() + self.route[1]).sigmoid() - wanted)
                self.route[0].grad, self.route[1].grad = off.t() @ hidden / self.scale / len(off), off.mean(0)
            self.optimizer.step()
