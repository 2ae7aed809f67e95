"""TEAL: magnitude thresholding of the input of every projection, no training (arXiv 2408.14690, section 4).

Keep x_i iff |x_i| > t with P(|x_i| <= t) = p on calibration text. q, k, v share one tensor, gate and up another; under
uniform allocation they share the mask. Embedding and head stay dense. Greedy allocation is section 4.3. Inside experts
the rule is the same, over the pairs of a token and an expert that the router runs (docs/methods/experts.md).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from sparsebench.calibration import expert_pairs
from sparsebench.calibration.allocation import ALLOCATIONS, Greedy, Table, add_tables, check, keep_table, shares
from sparsebench.calibration.histograms import collect, threshold
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.modules.input_sparse import PROMPT_POLICIES, swap
from sparsebench.modules.sparse_experts import INSIDE, swap_experts
from sparsebench.records.state import State
from sparsebench.sites import Block, Site, find_blocks

# Tensor names of the official repository's histogram files, by group.
OFFICIAL = {
    "attn_in": ("self_attn", "h1"),
    "attn_out": ("self_attn", "h2"),
    "mlp_in": ("mlp", "h1"),
    "mlp_mid": ("mlp", "h2"),
}


@dataclass(kw_only=True)
class Teal(Method):
    """Settings of TEAL; `sparsity`, `prompt` and `threshold_rule` can be changed without calibrating again."""

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    allocation: str = setting(choices=ALLOCATIONS)
    prompt: str = setting(choices=PROMPT_POLICIES)
    threshold_rule: str = setting(choices=("abs", "signed-hist"))
    calibration_tokens: int = setting(gt=0)
    histograms: str | None = setting(file="histograms")
    experts: str = setting(choices=INSIDE)
    expert_thresholds: str = setting(choices=expert_pairs.WHERE)
    greedy: Greedy
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0}
    operating_point: ClassVar = ("sparsity", "prompt", "threshold_rule", "experts")
    takes_experts: ClassVar = True
    quantised: ClassVar = True

    def __post_init__(self):
        if self.threshold_rule == "signed-hist" and self.histograms is None:
            raise ValueError(
                "threshold_rule=signed-hist needs method.histograms=<folder>: calibration here counts |x| directly"
            )
        if self.histograms is not None and not (Path(self.histograms) / "histograms").is_dir():
            raise ValueError(
                f"histograms must be a folder with histograms/layer-N/{{mlp,self_attn}}/histograms.pt, got {self.histograms!r}"
            )
        check(self)

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """Histograms of |x| for the four tensors of each block and, for greedy, its table of sparsities per block.

        Tensors: `hist.<layer>.<group>` int64 counts with their first bin in info; `table.<layer>.*` for greedy.
        """
        blocks = find_blocks(loaded.module)
        if self.histograms is not None:
            if any(block.experts for block in blocks):
                raise ValueError(f"method.histograms must be null for a model with experts, got {self.histograms!r}")
            return self.imported(Path(self.histograms), blocks)
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        watch = expert_pairs.watch_of(blocks, work.hardware.torch_device, ("in", "mid"), self.expert_thresholds)
        state = collect(loaded.module, blocks, sequences, work.batch_size, experts=watch)
        add_tables(self, state, loaded.module, blocks, sequences, work, lambda site, p: self.threshold(state, site, p))
        return state

    def imported(self, folder: Path, blocks: list[Block]) -> State:
        """The state from histograms and lookup tables in the official repository's layout (no code in them is run)."""
        state = State(info={"kind": "imported", "tokens": 0, "source": str(folder)})
        missing = [b.index for b in blocks if not (folder / "histograms" / f"layer-{b.index}").is_dir()]
        if missing:
            raise ValueError(
                f"method.histograms: no layer-{missing[0]} in {folder / 'histograms'} ({len(missing)} of {len(blocks)} "
                f"layers missing); model.num_layers=N uses the first N blocks only"
            )
        for block in blocks:
            for group, (part, tensor) in OFFICIAL.items():
                file = folder / "histograms" / f"layer-{block.index}" / part / "histograms.pt"
                content = torch.load(file, weights_only=True, map_location="cpu")
                name = f"signed.{block.index}.{group}"
                state.tensors[f"{name}.counts"] = content[tensor].double()
                state.tensors[f"{name}.centers"] = content[f"{tensor}_centers"].double()
            if self.allocation == "greedy":
                table = folder / "lookup" / f"layer-{block.index}" / "results.csv"
                keep_table(state, block.index, read_lookup(table, list(block.sites)))
        return state

    def threshold(self, state: State, site: Site, p: float) -> float:
        """t for target sparsity p of the tensor that feeds a site; 0 for p = 0."""
        if p == 0:
            return 0.0
        if state.info["kind"] == "calibrated":
            return threshold(state, site, p)
        layer, group = site.layer, site.group
        counts = state.tensors[f"signed.{layer}.{group}.counts"]
        centers = state.tensors[f"signed.{layer}.{group}.centers"]
        rule = signed_quantile if self.threshold_rule == "signed-hist" else abs_quantile
        try:
            return rule(centers, counts, (1 + p) / 2 if rule is signed_quantile else p)
        except ValueError as error:
            raise ValueError(f"method.histograms: {site.name} at sparsity {p:g}: {error}") from error

    def apply(self, module, state: State, work: Work):
        """Replace every projection whose sparsity is above 0 by an input-sparse one."""
        for block in find_blocks(module):
            for role, share in shares(self, state, block).items():
                if share > 0:
                    site = block.sites[role]
                    threshold = self.threshold(state, site, share)
                    swap(module, site, threshold, prompt=self.prompt, kernel=work.hardware.kernel_name)
            if block.experts is not None and self.experts != "off" and self.sparsity > 0:
                into, mid = self.expert_rules(state, block)
                swap_experts(module, block, into, mid, prompt=self.prompt, kernel=work.hardware.kernel_name)
        return module

    def expert_rules(self, state: State, block: Block) -> tuple[dict | None, dict | None]:
        """The rules at the input and at the middle of a block's experts.

        All experts of a token read one input, so its threshold is the layer's: one mask serves them all.
        """
        p, where = self.sparsity, self.expert_thresholds
        into = {"threshold": expert_pairs.threshold(state, block, "in", p)} if self.experts != "mid" else None
        mid = {"threshold": expert_pairs.threshold(state, block, "mid", p, where)} if self.experts != "input" else None
        return into, mid


def signed_quantile(centers: torch.Tensor, counts: torch.Tensor, q: float) -> float:
    """Quantile q of a signed histogram, linear between bin centres: what the official code computes with q = (1+p)/2.

    Right only for a distribution symmetric about 0. Raises ValueError where q lies in the outermost bins, which hold all
    that lies beyond the inner ones.
    """
    cumulative = counts.cumsum(0)
    target = q * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target))
    if index in (0, len(counts) - 1, len(counts)):
        raise ValueError(f"beyond the last inner bin, which reaches {float(cumulative[-2] / cumulative[-1]):.2%}")
    low, high = float(cumulative[index - 1]), float(cumulative[index])
    return float(centers[index - 1] + (target - low) / (high - low) * (centers[index] - centers[index - 1]))


def abs_quantile(centers: torch.Tensor, counts: torch.Tensor, p: float) -> float:
    """The t with P(|x| <= t) = p of a signed histogram, values spread evenly over each inner bin.

    The outermost bins hold all that lies beyond the inner ones, so nothing is known of where. Raises ValueError where t
    would lie there.
    """
    inner = centers[1:-1].double()
    middles = (inner[:-1] + inner[1:]) / 2
    ends = inner[[0, -1]] + torch.stack([inner[0] - inner[1], inner[-1] - inner[-2]]) / 2
    edges = torch.cat([ends[:1], middles, ends[1:]]).numpy()
    below = torch.cat([counts[:1], counts[1:-1]]).double().cumsum(0).numpy() / float(counts.sum())  # P(x <= edge)
    reach = min(-edges[0], edges[-1])
    tried = np.unique(np.clip(np.abs(np.append(edges, 0.0)), 0, reach))  # between these P(|x| <= t) is linear in t
    shares = np.interp(tried, edges, below) - np.interp(-tried, edges, below)
    if p > shares[-1]:
        raise ValueError(f"beyond the last inner bin, which reaches {shares[-1]:.2%}")
    return float(np.interp(p, shares, tried))


def read_lookup(file: Path, roles: list[str]) -> Table:
    """A lookup table of the official repository (results.csv). Raises ValueError where columns are missing."""
    try:
        with file.open(newline="") as lines:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]
        columns = [
            [row["Effective Sparsity"] for row in rows],
            [row["Activation Error"] for row in rows],
            [row["Baseline Error"] for row in rows],
            [[row[role] for role in roles] for row in rows],
        ]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"method.histograms: {file} is no lookup table of the official layout ({error})") from error
    return Table(roles, *map(torch.tensor, columns))
