"""Evolutionary search over vectors in [0, 1]: the fittest of parents and children survive; children by differential
mutation, group by group, or as a method breeds them.

A candidate of differential mutation differs from its parent in one group of coordinates: x1 + 0.5 (x2 - x3) of three
members, crossed with the parent coordinate by coordinate. Parents and children compete for the places (mu + lambda), so
the best never gets worse.
After every group of every generation all is written down; a search that was killed goes on from there to the same end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsebench.config import setting
from sparsebench.records import files, state
from sparsebench.records.state import State

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Evolution:
    """Settings of the search."""

    population: int = setting(ge=4)
    generations: int = setting(ge=1)
    group: int = setting(ge=1)  # coordinates changed together
    mutation: float = setting(gt=0, le=2)  # factor of the difference of two members
    crossover: float = setting(gt=0, le=1)  # chance that a coordinate comes from the mutant
    tokens: int = setting(gt=0)  # of the search set
    seed: int = setting(ge=0)


def evolve(
    fitness: Callable[[torch.Tensor], float],
    size: int,
    settings: Any,
    folder: Path,
    track: Callable[[dict], None] = lambda row: None,
    *,
    first: torch.Tensor | None = None,
    breed: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[dict]]:
    """The vector [size] in [0, 1] with the least `fitness` found, and the history [{generation, group, best, mean}].

    settings: Evolution, or any dataclass with population, generations and seed where `breed` makes the children of a
    generation from its members [population, size]. The first population is `first`, else uniform random but for one member
    of all ones. `folder` keeps the search's state until it is done
    and for good: calling again with the same settings answers from it.
    """
    path = folder / "search.safetensors"
    generator = torch.Generator().manual_seed(settings.seed)
    everything = torch.arange(size)
    groups = [everything] if breed else list(everything.split(settings.group))
    known = state.read(path)
    if known is not None and known.info.get("settings") == vars(settings) and known.tensors["members"].shape[1] == size:
        members, scores = known.tensors["members"], known.tensors["scores"]
        generator.set_state(known.tensors["generator"])
        history = known.info["history"]
        log.info("search: resumed after %d of %d rounds", len(history) - 1, settings.generations * len(groups))
    else:
        if first is None:
            first = torch.rand(settings.population, size, generator=generator, dtype=torch.float64)
            first[0] = 1.0
        members = first
        scores = torch.tensor([fitness(x) for x in members], dtype=torch.float64)
        history = []
        note(path, members, scores, generator, history, settings, track, 0, 0)
    for done in range(len(history) - 1, settings.generations * len(groups)):
        generation, group = divmod(done, len(groups))
        children = breed(members, generator) if breed else offspring(members, groups[group], settings, generator)
        born = torch.tensor([fitness(x) for x in children], dtype=torch.float64)
        everyone, all_scores = torch.cat([members, children]), torch.cat([scores, born])
        best = all_scores.argsort(stable=True)[: settings.population]
        members, scores = everyone[best], all_scores[best]
        note(path, members, scores, generator, history, settings, track, generation + 1, group + 1)
    return members[scores.argmin()], history


def offspring(members: torch.Tensor, group: torch.Tensor, settings: Evolution, generator) -> torch.Tensor:
    """One child of each member [population, size], changed in the coordinates of `group` only."""
    children = members.clone()
    for i in range(len(members)):
        others = torch.randperm(len(members), generator=generator)
        a, b, c = others[others != i][:3]
        mutant = (members[a] + settings.mutation * (members[b] - members[c])).clamp(0, 1)
        taken = group[torch.rand(len(group), generator=generator) < settings.crossover]
        children[i, taken] = mutant[taken]
    return children


def note(path: Path, members, scores, generator, history: list, settings: Any, track, generation: int, group: int):
    """Add a row to the history and write everything down."""
    row = {"generation": generation, "group": group, "best": float(scores.min()), "mean": float(scores.mean())}
    history.append(row)
    tensors = {"members": members, "scores": scores, "generator": generator.get_state()}
    state.write(State(tensors, {"settings": vars(settings), "history": history}), path)
    track({f"search/{k}": v for k, v in row.items()})
    log.info("search: generation %d, group %d: best %.6g, mean %.6g", *row.values())


def save(path: Path, names: list[str], values: torch.Tensor) -> None:
    """Write a vector as {name: value} JSON."""
    files.write_atomic(path, json.dumps(dict(zip(names, values.tolist(), strict=True)), indent=1).encode())


def load(path: Path, names: list[str]) -> torch.Tensor:
    """A vector written by `save`. Raises ValueError where a name is missing or a value is outside [0, 1]."""
    try:
        content = json.loads(path.read_text())
        values = torch.tensor([float(content[name]) for name in names], dtype=torch.float64)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no number for every site ({type(error).__name__}: {error})") from error
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{path} must hold numbers in [0, 1], got {float(values.min())} to {float(values.max())}")
    return values
