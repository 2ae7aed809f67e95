"""R-Sparse: channels above a threshold exactly, the rest through a truncated SVD (arXiv 2504.19449, section 3.4, Eq. 3).

y = W x_s + U_r S_r V_r^T (x - x_s) + b. Of a map's budget (1 - s) m n, the share rho goes to channels and the rest to
the low rank, so rho = 1 is TEAL and rho = 0 a static truncated SVD. From the published maths only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from sparsebench.calibration import histograms
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.measure import quality
from sparsebench.methods.base import Method, Work
from sparsebench.methods.rsparse import evolution
from sparsebench.methods.rsparse.low_rank import cached
from sparsebench.methods.wina import column_norms
from sparsebench.modules.input_sparse import PROMPT_POLICIES, InputSparseLinear, replace, swap
from sparsebench.records.progress import shown
from sparsebench.records.state import State
from sparsebench.sites import Block, Site, find_blocks, weight_of


@dataclass(frozen=True)
class Split:
    """What a budget buys at one map [m, n]."""

    channels: int  # C, kept at full precision on average
    rank: int  # r of the remainder
    mask_sparsity: float  # share of inputs below the threshold


def split(m: int, n: int, sparsity: float, rho: float) -> Split:
    """C m + r (m + n) <= (1 - s) m n with the true m and n; no rank is left over at rho = 1.

    [choice] C = max(floor(n (1 - s) rho), 1) as published, but never above the budget, and a rank may be 0.
    """
    if rho == 1:
        return Split(int(n * (1 - sparsity) + 1e-9), 0, sparsity)
    budget = (1 - sparsity) * m * n
    channels = min(max(int(n * (1 - sparsity) * rho + 1e-9), 1), int(n * (1 - sparsity) + 1e-9))
    return Split(channels, max(int((budget - channels * m) / (m + n) + 1e-9), 0), 1 - (1 - sparsity) * rho)


@dataclass(kw_only=True)
class RSparse(Method):
    """Settings of R-Sparse; `sparsity` is that of the budget: the mask's own is 1 - (1 - s) rho."""

    name: str = setting(**NAME_PATTERN)
    sparsity: float = setting(ge=0, lt=1)
    score: str = setting(choices=("abs", "abs_colnorm"))
    rho: float = setting(ge=0, le=1)
    rho_from: str = setting(choices=("uniform", "search", "file"))
    rho_file: str | None = setting(file="any")
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    search: evolution.Evolution
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"sparsity": 0.0, "rho": 1.0}
    operating_point: ClassVar = ("prompt",)

    def __post_init__(self):
        if (self.rho_from == "file") != (self.rho_file is not None):
            raise ValueError(f"rho_file must be a file for rho_from=file and null otherwise, got {self.rho_file!r}")
        if self.rho_file is not None and not Path(self.rho_file).is_file():
            raise ValueError(f"rho_file must be an existing file, got {self.rho_file!r}")

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """Histograms of the scores, `rho` [sites] and the factors `a.<site>`, `b.<site>`; searched where asked.

        The search set follows the calibration rows of the fit split. The SVDs lie in <output_dir>/states/svd, the
        searched rho also in rho.json of this fit's folder, ready for method.rho_file.
        """
        module, blocks = loaded.module, find_blocks(loaded.module)
        sites = [s for b in blocks for s in b.sites.values()]
        length = data.fit.sequence_length
        rows = max(1, self.calibration_tokens // length)
        weights = {s.name: weight_of(module.get_submodule(s.path)) for s in sites}
        scales = {name: column_norms(w) for name, w in weights.items()} if self.score == "abs_colnorm" else {}
        state = histograms.collect(module, blocks, data.fit.sequences(rows), work.batch_size, scales)
        state.tensors |= {f"scale.{name}": scale for name, scale in scales.items()}
        folder, names = work.output_dir / "states" / "svd", [s.name for s in sites]
        if self.rho_from == "search":
            wanted = max(1, self.search.tokens // length)
            search_rows = data.fit.sequences(rows + wanted)[rows:]
            if not len(search_rows):
                raise ValueError(f"method.search: no text of the fit split is left after {rows} calibration windows")
            rho, findings = self.searched(module, sites, state, search_rows, folder, work)
            evolution.save(work.folder / "rho.json", names, rho)
            state.info["extra"] = {"search": findings}
        elif self.rho_from == "file":
            rho = evolution.load(Path(self.rho_file), names)
        else:
            rho = torch.full((len(sites),), self.rho, dtype=torch.float64)
        state.tensors["rho"], state.info["sites"] = rho, names
        for site, share in shown(zip(sites, rho.tolist(), strict=True), len(sites), "decomposing maps"):
            rank = split(*weights[site.name].shape, self.sparsity, share).rank
            if rank:
                a, b = cached(weights[site.name], folder)
                state.tensors[f"a.{site.name}"], state.tensors[f"b.{site.name}"] = a[:, :rank], b[:rank]
        state.info.setdefault("extra", {})["budget"] = self.budget(weights, rho)
        return state

    def budget(self, weights: dict[str, torch.Tensor], rho: torch.Tensor) -> dict[str, float]:
        """Sums over all maps of what the budget allows and what C and r take, and the mean rho."""
        allowed = taken = 0.0
        for weight, share in zip(weights.values(), rho.tolist(), strict=True):
            m, n = weight.shape
            part = split(m, n, self.sparsity, share)
            allowed += (1 - self.sparsity) * m * n
            taken += part.channels * m + part.rank * (m + n)
        return {"allowed": allowed, "taken": taken, "rho_mean": float(rho.mean()), "rho_min": float(rho.min())}

    def scale_of(self, state: State, site: Site, rho: float) -> torch.Tensor | None:
        """c [n] where the site is scored by |x| c: in hybrid maps only, so that rho = 1 is TEAL."""
        return state.tensors[f"scale.{site.name}"] if self.score == "abs_colnorm" and rho < 1 else None

    def threshold(self, state: State, site: Site, part: Split, scaled: bool) -> float:
        return histograms.threshold(state, site, part.mask_sparsity, scaled) if part.mask_sparsity else 0.0

    def searched(self, module, sites: list[Site], state: State, rows, folder: Path, work: Work):
        """(rho [sites], findings): the evolutionary search (section 3.5) for the least perplexity on `rows`.

        A candidate costs one pass over the search set: thresholds are read off the histograms and ranks cut out of
        factors that are already there. The dense maps are put back afterwards.
        """
        dense = {s.path: module.get_submodule(s.path) for s in sites}
        device = work.hardware.torch_device
        parts: dict[str, tuple[InputSparseLinear, torch.Tensor, torch.Tensor]] = {}
        for site in sites:
            a, b = (f.to(device) for f in cached(weight_of(dense[site.path]), folder))
            top = split(b.shape[1], a.shape[0], self.sparsity, 0.0).rank
            parts[site.name] = (swap(module, site, 0.0), a[:, :top].contiguous(), b[:top].contiguous())

        def perplexity(rho: torch.Tensor) -> float:
            for site, share in zip(sites, rho.tolist(), strict=True):
                self.set_rho(state, site, share, *parts[site.name])
            return quality.perplexity(module, rows, work.batch_size)["perplexity"]

        try:
            rho, history = evolution.evolve(perplexity, len(sites), self.search, work.folder, work.log)
            thresholding, best = perplexity(torch.ones_like(rho)), perplexity(rho)
        finally:
            for path, linear in dense.items():
                replace(module, path, linear)
        return rho, {"history": history, "rho=1": thresholding, "best": best, "search_tokens": rows.numel()}

    def set_rho(self, state: State, site: Site, rho: float, sparse: InputSparseLinear, a, b) -> None:
        """Make a swapped map that of `rho`; a, b: its factors at the largest rank."""
        part = split(*sparse.weight.shape, self.sparsity, rho)
        scale = self.scale_of(state, site, rho)
        sparse.scale = None if scale is None else scale.to(a.device)
        sparse.threshold.fill_(self.threshold(state, site, part, scale is not None))
        sparse.low_rank = (a[:, : part.rank], b[: part.rank]) if part.rank else None

    def apply(self, module: nn.Module, state: State, work: Work):
        """Replace every projection; at s = 0 and rho = 1 there is nothing to skip and the map stays."""
        rho = dict(zip(state.info["sites"], state.tensors["rho"].tolist(), strict=True))
        device, dtype = work.hardware.torch_device, work.hardware.torch_dtype
        blocks: list[Block] = find_blocks(module)
        for site in (s for b in blocks for s in b.sites.values()):
            share = rho[site.name]
            part = split(*weight_of(module.get_submodule(site.path)).shape, self.sparsity, share)
            if part.mask_sparsity == 0:
                continue
            scale, low_rank = self.scale_of(state, site, share), None
            if part.rank:
                low_rank = tuple(state.tensors[f"{n}.{site.name}"].to(device, dtype) for n in "ab")
            swap(
                module, site, self.threshold(state, site, part, scale is not None),
                scale=None if scale is None else scale.to(device), low_rank=low_rank,
                prompt=self.prompt, kernel=work.hardware.kernel_name,
            )  # fmt: skip
        return module
