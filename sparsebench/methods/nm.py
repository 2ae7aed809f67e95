"""N:M activation sparsity: in every group of M consecutive inputs of a token the N of largest score stay, no training.

Sources: arXiv 2509.22166 (2:4 to 16:32, light corrections), arXiv 2508.02128 (Amber: robust column norms, maps left
dense by their sensitivity, prefill only). No threshold: exactly n N / M inputs stay, whatever the token.

A prompt is where it may pay: sparse tensor cores take 2:4 along the reduction axis. So phase=prefill makes calls of
several tokens sparse and leaves one-token calls dense, the reverse of other methods' prompt policies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sparsebench.calibration.histograms import observe
from sparsebench.calibration.sensitivity import planned, sensitivities
from sparsebench.config import NAME_PATTERN, setting
from sparsebench.methods.base import Method, Work
from sparsebench.methods.wina import column_norms
from sparsebench.modules.group_sparse import CORRECTIONS, PHASES, GroupSparseLinear, Selection
from sparsebench.modules.input_sparse import PROMPT_POLICIES, replace
from sparsebench.modules.tokens import follow
from sparsebench.records.state import State
from sparsebench.sites import GROUP_OF, Site, shape, sites, weight_of

SCORES = ("abs", "colnorm", "amber")
CLIPPED = (0.005, 0.995)  # quantiles of a matrix beyond which Amber clips its weights


@dataclass(kw_only=True)
class NM(Method):
    """Settings; `skip`, `coverage`, `phase` and `prompt` can be changed without calibrating again.

    The sensitivities in the state are of one pattern, score and correction, so these are not among them.
    """

    name: str = setting(**NAME_PATTERN)
    n: int | None = setting(gt=0)
    m: int | None = setting(gt=0)
    score: str = setting(choices=SCORES)
    correction: str = setting(choices=CORRECTIONS)
    correction_from: str = setting(choices=("token", "calibration"))
    skip: list[str] = setting(choices=tuple(GROUP_OF))
    coverage: float = setting(ge=0, le=1)
    phase: str = setting(choices=PHASES)
    prompt: str = setting(choices=PROMPT_POLICIES)
    calibration_tokens: int = setting(gt=0)
    kinds: ClassVar = ("language",)
    neutral: ClassVar = {"n": 4, "m": 4}
    operating_point: ClassVar = ("skip", "coverage", "phase", "prompt")

    def __post_init__(self):
        if self.n is None and self.m is not None and self.m % 2:
            raise ValueError(f"m must be even with n=null (half of a group), got {self.m}")
        if self.n is not None and self.m is not None and self.n > self.m:
            raise ValueError(f"n must be at most m={self.m}, got {self.n}")

    @property
    def requested(self) -> float | None:
        """The share dropped where every map is covered by one pattern; with maps left dense there is no such number."""
        if self.skip or self.coverage < 1 or (self.m is None and self.n is not None):
            return None
        return 0.5 if self.n is None else 1 - self.n / self.m

    def pattern(self, width: int) -> tuple[int, int]:
        """(N, M) of a map with so many inputs."""
        m = self.m or width
        n = m // 2 if self.n is None else self.n
        if n > m:
            raise ValueError(f"method.n must be at most the {m} inputs of a map with m=null, got {n}")
        return n, m

    def scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """c [inputs] of the score |x| c of a weight [m, n]; None = 1."""
        if self.score == "abs":
            return None
        return column_norms(weight) if self.score == "colnorm" else amber_factors(weight)

    @property
    def changes(self) -> None:
        return None

    def fit(self, loaded, data, work: Work) -> State:
        """Sensitivity e of every map at this pattern, score and correction (`sensitivity.<site>`), `scale.<site>`, and for
        calibrated corrections `center.<site>` or `gain.<site>`; upstream is dense in every pass.
        """
        module, every = loaded.module, list(sites(loaded.module))
        sequences = data.fit.sequences(max(1, self.calibration_tokens // data.fit.sequence_length))
        state = State(info={"kind": "calibrated", "tokens": sequences.numel()})
        for site in every:
            scale = self.scale(weight_of(module.get_submodule(site.path)))
            if scale is not None:
                state.tensors[f"scale.{site.name}"] = scale.cpu()
        if self.correction != "none" and self.correction_from == "calibration":
            state.tensors |= self.statistics(module, every, state, sequences, work.batch_size)

        def change(site: Site):
            return self.selection(module, site, state).read

        table = sensitivities(module, every, change, sequences, work.batch_size)
        state.tensors |= {f"sensitivity.{name}": torch.tensor(e, dtype=torch.float64) for name, e in table.items()}
        patterns = {self.pattern(shape(module.get_submodule(site.path))[1]) for site in every}
        bits = {f"{n}:{m}": metadata_bits(n, m) for n, m in sorted(patterns)}
        state.info["extra"] = {"sensitivity": table, "metadata_bits_per_input": bits}
        return state

    def selection(self, module: nn.Module, site: Site, state: State, correct: bool = True) -> Selection:
        """The rule of a site, from what the state holds, on the map's device."""
        weight = weight_of(module.get_submodule(site.path))
        n, m = self.pattern(weight.shape[1])
        if weight.shape[1] % m:
            raise ValueError(f"method.m must divide the {weight.shape[1]} inputs of {site.name}, got {m}")
        own = {
            key: state.tensors[f"{key}.{site.name}"].to(weight.device)
            for key in ("scale", "center", "gain")
            if f"{key}.{site.name}" in state.tensors
        }
        gain = float(own.pop("gain")) if "gain" in own else None
        return Selection(n, m, correction=self.correction if correct else "none", gain=gain, **own)

    def statistics(self, module, every: list[Site], state: State, sequences, batch_size: int) -> dict:
        """`center.<site>`: each input's mean over tokens; or `gain.<site>`: root of all energy over that of kept inputs."""
        sums: dict[str, torch.Tensor] = {}

        def observer(site: Site):
            rule = self.selection(module, site, state, correct=False)

            def see(x: torch.Tensor) -> None:
                if self.correction == "shift":
                    rows = x.flatten(0, -2).double()
                    part = torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
                else:
                    part = torch.stack([t.double().square().sum() for t in (x, rule.read(x))])
                sums[site.name] = sums.get(site.name, 0) + part

            return see

        observe(module, sequences, {site.path: observer(site) for site in every}, batch_size)
        if self.correction == "shift":
            return {f"center.{name}": (s[:-1] / s[-1]).float().cpu() for name, s in sums.items()}
        return {f"gain.{name}": (s[0] / s[1]).sqrt().float().cpu() for name, s in sums.items()}

    def apply(self, module, state: State, work: Work):
        """Replace every map of the plan; the others stay untouched."""
        every = list(sites(module))
        table = {site.name: float(state.tensors[f"sensitivity.{site.name}"]) for site in every}
        if self.phase == "prefill":
            follow(module)  # models that flatten their tokens: is this a call of one token?
        for site in planned(module, every, table, self.skip, self.coverage):
            linear = module.get_submodule(site.path)
            rule = self.selection(module, site, state)
            if rule.n < rule.m:
                sparse = GroupSparseLinear(
                    linear, site.name, rule, phase=self.phase, prompt=self.prompt, kernel=work.hardware.kernel_name
                )
                replace(module, site.path, sparse)
        return module


def amber_factors(weight: torch.Tensor) -> torch.Tensor:
    """f [n] of a weight [m, n], at least 1: column norms of the weights clipped at two quantiles and standardised, over the
    smallest of them. Per matrix, quantiles by nearest rank: the paper's exact order is (unverified) [choice].
    """
    wide = weight.float()
    ordered = wide.flatten()
    low, high = (float(ordered.kthvalue(max(1, round(q * ordered.numel()))).values) for q in CLIPPED)
    clipped = wide.clamp(low, high)
    norms = ((clipped - clipped.mean()) / clipped.std().clamp_min(torch.finfo(torch.float32).tiny)).norm(dim=0)
    return norms / norms.min().clamp_min(torch.finfo(torch.float32).tiny)


def metadata_bits(n: int, m: int) -> float:
    """Bits per input that say which n of m are kept, at best: log2 C(m, n) / m."""
    return math.log2(math.comb(m, n)) / m
