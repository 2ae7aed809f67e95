"""WiSparse: keep the inputs with the largest |x_i| c_i^a, a searched per map, budgets searched over blocks (arXiv 2602.14452).

c_i is the norm of the weight's column: a = 0 is TEAL, a = 1 WINA without rotation, as thresholds. Budgets go coarse to
fine: evolution over the blocks by the loss of the whole sparse model, then greedy inside each block by its output error on
dense inputs (TEAL, section 4.3). The scheme and the score are published; every constant of the searches is ours [choice].
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sparsebench.calibration import histograms
from sparsebench.calibration.allocation import Greedy, Shares, Table, cost, greedy, keep_table, table_of
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.measure import quality
from sparsebench.methods.base import Method, Work
from sparsebench.methods.rsparse.evolution import evolve
from sparsebench.methods.wina import column_norms
from sparsebench.methods.wisparse import budgets, exponent
from sparsebench.modules.input_sparse import PROMPT_POLICIES, replace, swap
from sparsebench.records.state import State
from sparsebench.sites import Block, Site, find_blocks, weight_of

ALLOCATIONS = ("uniform", "greedy", "blocks", "mixed")
TOP = 0.95  # largest sparsity of a block


@dataclass(kw_only=True)
class WiSparse(Method):
    """Settings of WiSparse; the search over blocks is of one `sparsity`, the other allocations take any without a new fit."""

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    alpha: list[float] = setting(ge=0, le=2)
    alpha_at: float = setting(gt=0, lt=1)
    allocation: str = setting(choices=ALLOCATIONS)
    over_blocks: str = setting(choices=("evolution", "additive"))
    share: str = setting(choices=("projection", "group"))
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    ladder: bool
    greedy: Greedy
    search: budgets.BlockSearch
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0}
    operating_point: ClassVar = ("sparsity", "prompt")

    def __post_init__(self):
        if self.by_blocks:
            self.operating_point = ("prompt",)
        problems = []
        if not self.alpha:
            problems.append("alpha must hold at least one exponent, got []")
        if self.allocation != "uniform" and self.sparsity > self.top:
            problems.append(f"sparsity must be at most {self.top:g} with this method.greedy.stop, got {self.sparsity}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def by_blocks(self) -> bool:
        return self.allocation in ("blocks", "mixed")

    @property
    def top(self) -> float:
        """The largest sparsity of a block: no further than its table goes."""
        return min(TOP, self.greedy.stop)

    # -----------------------------------------------------------------------------------------------------------------
    # Fit

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """Histograms of the scores, `scale.<site>` = c^a where a is not 0, tables inside blocks, `blocks` [L].

        info.extra: exponents, budgets, the search's history and cost, and the ladder from TEAL to the whole on dev text.
        """
        module, blocks = loaded.module, find_blocks(loaded.module)
        rows = max(1, self.calibration_tokens // data.fit.sequence_length)
        sequences = data.fit.sequences(rows)
        norms, costs = self.norms(module, blocks), {}
        alphas = self.exponents(module, blocks, sequences, norms, work, costs)
        scales = {name: norms[name] ** a for name, a in alphas.items() if a != 0}
        state = histograms.collect(module, blocks, sequences, work.batch_size, scales)
        state.tensors |= {f"scale.{name}": scale for name, scale in scales.items()}
        state.info["alpha"] = alphas
        extra = state.info.setdefault("extra", {})
        extra |= {"alpha": {f"{a:g}": n for a, n in sorted(Counter(alphas.values()).items())}, "search_cost": costs}
        if self.allocation != "uniform":
            self.add_tables(module, blocks, sequences, state, scales, work, costs)
        if self.by_blocks:
            text = self.search_text(data, rows)
            extra["search"] = self.search_blocks(module, blocks, state, text, work, costs)
        if self.ladder:
            extra["ladder_on_dev"] = {"sparsity": self.sparsity} | self.climbed(
                module, blocks, state, sequences, norms, data, work
            )
        return state

    def norms(self, module: nn.Module, blocks: list[Block]) -> exponent.Norms:
        """c by site: of its own columns or, with share=group, of those of all maps that read the same tensor."""
        weights = {s.name: weight_of(module.get_submodule(s.path)) for b in blocks for s in b.sites.values()}
        if self.share == "projection":
            return {name: column_norms(weight) for name, weight in weights.items()}
        units = [unit for block in blocks for unit in groups(block)]
        stacked = {unit: column_norms(torch.cat([weights[name] for name in unit])) for unit in units}
        return {name: stacked[unit] for unit in units for name in unit}

    def exponents(self, module, blocks, sequences, norms, work: Work, costs: dict) -> dict[str, float]:
        """The exponent of each site: the only one given, or the one of the grid that loses least at `alpha_at`."""
        if len(self.alpha) == 1:
            return dict.fromkeys(norms, self.alpha[0])
        start = time.perf_counter()
        errors = exponent.errors_by_exponent(
            module, blocks, sequences, norms, self.alpha, self.alpha_at, work.batch_size
        )
        costs["alpha"] = {"forward_passes": 2 + len(self.alpha), "tokens_per_pass": sequences.numel(),
                          "seconds": time.perf_counter() - start}  # fmt: skip
        alone = [(name,) for name in norms]
        units = alone if self.share == "projection" else [unit for block in blocks for unit in groups(block)]
        return exponent.choose(errors, self.alpha, units)

    def add_tables(self, module, blocks, sequences, state: State, scales, work: Work, costs: dict) -> None:
        """The path inside each block: each map alone, maps of one tensor together (share=group), or all of them (blocks)."""
        start = time.perf_counter()

        def units(block: Block) -> dict[str, tuple[str, ...]] | None:
            if self.allocation == "blocks":
                return {"all": tuple(block.sites)}
            return None if self.share == "projection" else {str(i): roles(unit) for i, unit in enumerate(groups(block))}

        tables = greedy(
            module, blocks, sequences, lambda layer, role, p: self.threshold(state, blocks[layer].sites[role], p),
            self.greedy, batch_size=work.batch_size, folder=work.folder, units=units,
            scales={(s.layer, s.role): scales[s.name] for b in blocks for s in b.sites.values() if s.name in scales},
            progress=lambda done, total: work.log({"fit/greedy_blocks_done": done, "fit/greedy_blocks": total}),
        )  # fmt: skip
        for block, table in zip(blocks, tables, strict=True):
            keep_table(state, block.index, table)
        costs["inside"] = cost(tables, sequences, start)

    def search_text(self, data: Any, rows: int) -> torch.Tensor:
        """Windows of the fit split behind those of calibration: what the block search scores."""
        wanted = max(1, self.search.tokens // data.fit.sequence_length)
        text = data.fit.sequences(rows + wanted)[rows:]
        if not len(text):
            raise ValueError(f"method.search: no text of the fit split is left after {rows} calibration windows")
        return text

    def search_blocks(self, module, blocks: list[Block], state: State, text, work: Work, costs: dict) -> dict[str, Any]:
        """Set `blocks` [L], the budget of each block; returns what the search saw."""
        start = time.perf_counter()
        sizes = torch.tensor([sum(size(module, s) for s in b.sites.values()) for b in blocks], dtype=torch.float64)
        tables = [table_of(state, block.index) for block in blocks]
        levels = np.arange(0, self.top + 1e-9, budgets.LEVELS)
        errors = np.array([[relative(table, float(p)) ** 2 for p in levels] for table in tables])
        additive = budgets.additive(errors, sizes, self.sparsity, self.top)
        report: dict[str, Any] = {"budget": self.sparsity}
        with self.swapped(module, blocks, state, work) as set_shares:

            def fitness(p: torch.Tensor) -> float:
                set_shares(dict(zip((b.index for b in blocks), p.tolist(), strict=True)))
                return quality.perplexity(module, text, work.batch_size)["nll"]

            state.tensors["blocks"], evaluations = additive, 2
            if self.over_blocks == "evolution" and self.sparsity > 0:
                generator = torch.Generator().manual_seed(self.search.seed)
                at_budget = torch.tensor([relative(table, self.sparsity) for table in tables])
                rules = (sizes, self.sparsity, self.top, self.search)
                state.tensors["blocks"], report["history"] = evolve(
                    fitness, len(blocks), self.search, work.folder, work.log,
                    first=budgets.first_population(at_budget, *rules, generator),
                    breed=lambda members, g: budgets.children(members, *rules, g),
                )  # fmt: skip
                evaluations += self.search.population * (self.search.generations + 1) + 1
                report["nll"] = fitness(state.tensors["blocks"])
            report |= {
                "nll_additive": fitness(additive),
                "nll_uniform": fitness(torch.full_like(additive, self.sparsity)),
            }
        costs["blocks"] = {"forward_passes": evaluations, "tokens_per_pass": text.numel(),
                           "seconds": time.perf_counter() - start}  # fmt: skip
        return report | {"blocks": state.tensors["blocks"].tolist(), "additive": additive.tolist()}

    @contextmanager
    def swapped(self, module, blocks: list[Block], state: State, work: Work, even: bool = False) -> Iterator[Callable]:
        """Every map input-sparse while it lasts; gives a function that sets the budget of each block by its index.

        even: all maps of a block alike, whatever the allocation.
        """
        sites = [s for b in blocks for s in b.sites.values()]
        dense = {s.path: module.get_submodule(s.path) for s in sites}
        try:
            sparse = {s.name: swap(module, s, 0.0, scale=self.scale(state, s, work)) for s in sites}

            def set_shares(of_block: dict[int, float]) -> None:
                for block in blocks:
                    for role, p in self.inside(state, block, of_block[block.index], even).items():
                        site = block.sites[role]
                        sparse[site.name].threshold.fill_(self.threshold(state, site, p))

            yield set_shares
        finally:
            for path, linear in dense.items():
                replace(module, path, linear)

    def climbed(self, module, blocks, state: State, sequences, norms, data, work: Work) -> dict[str, float]:
        """NLL on dev at `sparsity`, from TEAL to this method: a = 0, a = 1, the grid's, then inside, then over blocks."""
        text = data.dev.sequences(max(1, self.search.tokens // data.dev.sequence_length))
        plain = histograms.collect(module, blocks, sequences, work.batch_size, norms)
        plain.tensors |= {f"scale.{name}": scale for name, scale in norms.items()}
        unscaled = State({k: v for k, v in state.tensors.items() if not k.startswith("scale.")}, state.info)
        uniform = {block.index: self.sparsity for block in blocks}
        steps = {"uniform, a = 0": (unscaled, True, uniform), "uniform, a = 1": (plain, True, uniform),
                 "uniform, a of the grid": (state, True, uniform)}  # fmt: skip
        if self.allocation in ("greedy", "mixed"):
            steps["+ inside blocks"] = (state, False, uniform)
        if self.by_blocks:
            own = dict(zip(uniform, state.tensors["blocks"].tolist(), strict=True))
            steps["+ over blocks"] = (state, False, own)
        nll = {}
        for name, (known, even, of_block) in steps.items():
            with self.swapped(module, blocks, known, work, even) as set_shares:
                set_shares(of_block)
                nll[name] = quality.perplexity(module, text, work.batch_size)["nll"]
        return nll

    # -----------------------------------------------------------------------------------------------------------------
    # What a state says

    def scale(self, state: State, site: Site, work: Work) -> torch.Tensor | None:
        """c^a [n], or None where the score is |x|."""
        scale = state.tensors.get(f"scale.{site.name}")
        return None if scale is None else scale.to(work.hardware.torch_device)

    def threshold(self, state: State, site: Site, p: float) -> float:
        scaled = f"scale.{site.name}" in state.tensors
        return 0.0 if p == 0 else histograms.threshold(state, site, min(p, 1.0), scaled)

    def inside(self, state: State, block: Block, p: float, even: bool = False) -> Shares:
        """Sparsity of each role of a block whose budget is p; even: all alike."""
        if even or self.allocation == "uniform" or p == 0:
            return dict.fromkeys(block.sites, p)
        table: Table = table_of(state, block.index)
        return table.at(p)

    def budget(self, state: State, block: Block) -> float:
        return float(state.tensors["blocks"][block.index]) if self.by_blocks else self.sparsity

    def apply(self, module, state: State, work: Work):
        """Replace every projection whose sparsity is above 0."""
        for block in find_blocks(module):
            for role, p in self.inside(state, block, self.budget(state, block)).items():
                if p > 0:
                    site = block.sites[role]
                    rule = {"scale": self.scale(state, site, work), "prompt": self.prompt}
                    swap(module, site, self.threshold(state, site, p), kernel=work.hardware.kernel_name, **rule)
        return module


def relative(table: Table, p: float) -> float:
    """A block's output error at sparsity p as a part of its output: the residual stream grows with depth, and errors with it."""
    return table.error_at(p) / table.norm


def groups(block: Block) -> list[tuple[str, ...]]:
    """Names of the sites that read one tensor, tensor by tensor."""
    names: dict[str, tuple[str, ...]] = {}
    for site in block.sites.values():
        names[site.group] = (*names.get(site.group, ()), site.name)
    return list(names.values())


def roles(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.partition(".")[2] for name in names)


def size(module: nn.Module, site: Site) -> int:
    """Parameters of a map, by its tensor."""
    return weight_of(module.get_submodule(site.path)).numel()
