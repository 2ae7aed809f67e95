"""Top-k activation sparsity: Lazy Neuron (arXiv 2210.06313), Q-Sparse (2407.10969), statistical top-k (2506.06644).

`lazy` keeps the k largest gates of each FFN, `stat` about as many by a threshold from mean and deviation, `qsparse` the
k largest inputs of every linear map; `block` counts k per block instead. Without `train` the model is probed as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers.activations import ACT2FN

from sparsebench.config import NAME_PATTERN, setting
from sparsebench.measure import quality
from sparsebench.methods.base import Method, Work
from sparsebench.modules.activations import StatisticalTopK, TopK, activation_of
from sparsebench.modules.input_sparse import replace
from sparsebench.modules.neuron_sparse import ffn_path, last_map, swap
from sparsebench.modules.topk_linear import TopKLinear, TopKTraining, kept_count
from sparsebench.modules.x1 import X1Penalty
from sparsebench.records.state import State
from sparsebench.sites import find_blocks, shape
from sparsebench.training import finetune
from sparsebench.training.loop import Training, train

ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_pytorch_tanh")


@dataclass(kw_only=True)
class TopKSparsity(Method):
    """Settings; k of a group of n is round(keep * n) (count=nearest) or int(keep * n) as public code has it (count=down)."""

    name: str = setting(**NAME_PATTERN)
    variant: str = setting(choices=("lazy", "qsparse", "stat"))
    keep: float = setting(gt=0, le=1)
    count: str = setting(choices=("nearest", "down"))
    activation: str | None = setting(choices=ACTIVATIONS)
    score: str = setting(choices=("value", "abs"))
    block: int | None = setting(gt=1)
    group: str = setting(choices=("token", "layer"))
    backward: str = setting(choices=("mask", "ste"))
    rescale: bool
    anneal: float = setting(ge=0, le=1)
    probe_sequences: int = setting(gt=0)
    train: Training | None
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"keep": 1.0, "activation": None, "train": None}

    def __post_init__(self):
        problems = []
        if self.variant == "stat" and self.activation == "relu2":
            problems.append(
                "activation must be one of relu, silu, gelu, gelu_pytorch_tanh with variant=stat, got relu2"
            )
        if self.variant == "stat" and self.block:
            problems.append(
                f"block must be null with variant=stat (its threshold is of the whole token), got {self.block}"
            )
        if self.group == "layer" and (self.variant != "lazy" or self.block):
            problems.append("group=layer needs variant=lazy and block=null")
        if self.rescale and self.variant != "qsparse":
            problems.append(f"rescale must be false with variant={self.variant}, got true")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def requested(self) -> float | None:
        """Q-Sparse drops the same share at every map; the others act on part of the maps."""
        return 1 - self.keep if self.variant == "qsparse" else None

    def k(self, size: int) -> int:
        """How many of a group of `size` stay (of a block where blocks are counted)."""
        size = self.block or size
        return kept_count(self.keep, size) if self.count == "nearest" else max(1, int(self.keep * size))

    def annealed(self, step: int, size: int) -> int:
        """k of a step counted from 0: falls linearly from the whole group over the first `anneal` of the steps."""
        size, target = self.block or size, self.k(size)
        over = self.anneal * self.train.steps
        return size - round((size - target) * min(1.0, (step + 1) / over)) if over else target

    def activation_of(self, module: nn.Module) -> str:
        """phi by name: the one set, or the model's own."""
        return self.activation or activation_of(module.config)

    def swap(self, module: nn.Module, kernel: str | None) -> list[tuple[nn.Module, int]]:
        """Install the sparse maps, in use (`kernel`) or in training (None). Returns (where k is held, group size)."""
        name, held = self.activation_of(module), []
        for block in find_blocks(module):
            if self.variant != "qsparse":
                size = shape(last_map(module, block))[1]
                if self.variant == "stat":
                    phi = StatisticalTopK(name, self.keep)
                else:
                    phi = TopK(
                        name, self.k(size), score=self.score, block=self.block, backward=self.backward, group=self.group
                    )
                    held.append((phi, size))
                swap(module, block, phi, kernel=kernel)
                continue
            ffn = module.get_submodule(ffn_path(block))
            own = next(n for n, m in ffn.named_children() if n in ("act", "act_fn", "activation_fn"))
            setattr(ffn, own, ACT2FN[name])
            for site in block.sites.values():
                linear = module.get_submodule(site.path)
                size = shape(linear)[1]
                if self.block and size % self.block:
                    raise ValueError(f"method.block must divide the {size} inputs of {site.name}, got {self.block}")
                options = {"block": self.block, "rescale": self.rescale}
                if kernel is not None:
                    sparse = TopKLinear(linear, site.name, self.k(size), kernel=kernel, **options)
                elif isinstance(linear, nn.Linear):
                    sparse = TopKTraining(linear, self.k(size), backward=self.backward, **options)
                else:
                    raise ValueError(
                        f"method.variant=qsparse trains models of nn.Linear maps, got {type(linear).__name__}"
                    )
                held.append((sparse, size))
                replace(module, site.path, sparse)
        return held

    @property
    def changes(self) -> str | None:
        return None if self.train is None else "any weight, trained"

    def fit(self, loaded, data, work: Work) -> State:
        """Train a copy with top-k from the first step (k annealed where asked for). Tensors: `weights.*`.

        info.extra: history, realised share of non-zeros and share of neurons or inputs never selected, per site.
        """
        state = State(info={"kind": "none", "tokens": 0, "extra": {}})
        module = finetune.trainable(loaded.module)
        if self.train is not None:
            held = self.swap(module, None)
            rows = finetune.rows(data.fit, self.train)

            def anneal(step: int) -> None:
                for sparse, size in held:
                    sparse.count = self.annealed(step, size)

            with X1Penalty(module, "mean", lambda step: 0.0) as watch:
                history = train(
                    module, rows, self.train, folder=work.folder, seed=work.seed, penalty=watch, before_step=anneal,
                    track=work.log, label="fit",
                )  # fmt: skip
            state.info |= finetune.facts(history, self.train, rows)
            state.tensors = finetune.weights(module, loaded.module)
            module = finetune.rebuilt(loaded.module, state.tensors)
        module.requires_grad_(False)
        self.swap(module, "masked_dense")
        _, counters = quality.language_quality(module, data.fit, self.probe_sequences, work.batch_size)
        for site, counter in counters.items():
            pairs = counter.kept.numel() * counter.sparse_tokens
            state.info["extra"].setdefault("selection_on_fit", {})[site] = {
                "non_zero": int(counter.kept.sum()) / pairs,
                "never_selected": float((counter.kept == 0).double().mean()),
                "tokens": counter.sparse_tokens,
            }
        return state

    def apply(self, module, state: State, work: Work):
        """The trained weights and the sparse maps."""
        if self.train is not None:
            finetune.load_weights(module, state.tensors)
        self.swap(module, work.hardware.kernel_name)
        return module
