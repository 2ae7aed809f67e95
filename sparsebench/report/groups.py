"""Which rows may be ranked together, what they are called, which of them are seeds of one setting, who is on a front.

Two rows share a group only if they scored the same model on the same test text by the same protocol; rows that measured
no sparsity at all (method=dense) join every group of theirs, whatever the prompt policy. A model trained from scratch
is the same model in every seed: its recipe tells it, not the file it was kept in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsebench.config.identity import NOT_IDENTITY, digest
from sparsebench.report.rows import Row, flat

PLACES = ("path", "name", "revision")  # keys that say where something lies, not what it is


@dataclass
class Group:
    """Rows that may be ranked together."""

    protocol: dict
    rows: list[Row]
    apart: str = ""  # what tells it from other groups of the same model, data and metric

    @property
    def title(self) -> str:
        return f"{self.protocol['model']} on {self.protocol['dataset']}, {self.protocol['metric']}{self.apart}"

    @property
    def random(self) -> bool:
        """Whether the model's weights are random, so that its quality says nothing."""
        return bool(self.rows) and self.rows[0].record["config"]["model"].get("weights") == "random"


def worded(key: str) -> str:
    """A key of a protocol in words."""
    return key.replace("_", " ")


def protocol(row: Row) -> dict:
    """What must be equal before two rows are ranked together."""
    settings, quality = row.record["config"], (row.record.get("quality") or {})
    dataset = row.record.get("dataset") or {}
    stated = quality[row.metric].get("protocol") if row.metric else None
    return {
        "model": settings["model"]["name"],
        "weights": weights(row),
        "num_layers": settings["model"].get("num_layers"),
        "dataset": settings["dataset"]["name"],
        "test": (dataset.get("test") or {}).get("fingerprint"),
        "metric": row.metric or "nothing scored",
        **(stated if isinstance(stated, dict) else {"protocol": stated}),
    }


def weights(row: Row) -> str | None:
    """What tells the model's weights: where they come from or, trained here, by which recipe, whatever the seed."""
    settings = row.record["config"]
    if settings["model"].get("weights") != "scratch":
        return (row.record.get("model") or {}).get("source")
    recipe = {k: v for part in ("model", "dataset") for k, v in flat(settings[part], f"{part}.").items()}
    own = {k: v for k, v in recipe.items() if k.rpartition(".")[2] not in PLACES and v is not None}
    return f"trained from scratch, recipe {digest(own)[:8]}"


def groups(rows: list[Row]) -> list[Group]:
    """Rows by protocol, larger groups first; labels and Pareto fronts are set on the way."""
    groups: dict[str, Group] = {}
    plain: list[tuple[dict, Row]] = []
    for row in rows:
        stated = protocol(row)
        if row.method == "dense":
            plain.append(({k: v for k, v in stated.items() if k != "prompt_policy"}, row))
        else:
            groups.setdefault(digest(stated), Group(stated, [])).rows.append(row)
    for stated, row in plain:
        mine = [g for g in groups.values() if {k: v for k, v in g.protocol.items() if k != "prompt_policy"} == stated]
        for group in mine or [groups.setdefault(digest(stated), Group(stated, []))]:
            group.rows.append(row)
    for group in groups.values():
        label(group.rows)
        group.rows.sort(key=lambda r: (r.method, r.sparsity or 0.0, r.label))
        mark_fronts(group.rows)
    ordered = sorted(groups.values(), key=lambda g: -len(g.rows))
    for title in {g.title for g in ordered}:
        alike = [g for g in ordered if g.title == title]
        told = differences(alike)
        short = {k: v for k, v in told.items() if k not in ("fingerprint", "tokens")} or told
        for key, values in short.items():
            for group, value in zip(alike, values, strict=True):
                group.apart += f", {in_title(key, value)}"
    return ordered


def in_title(key: str, value: Any) -> str:
    """A key of a protocol and as much of its value as a title can hold."""
    if value is None:
        return "all layers" if key == "num_layers" else f"{worded(key)} none"
    return f"{worded(key)} {str(value)[:8] if key == 'test' else str(value)[-24:]}"


def label(rows: list[Row]) -> None:
    """Name each row by its method and by the settings in which rows of that method differ; its curve by some of them.

    What the machine's name says (hardware), where data lies and what was measured are not settings of a method. A method
    that ran in several number formats is named with them; rows that still have one name are told apart by what differs
    of their machines (device, threads, context, version of torch).
    """
    for method in {r.method for r in rows}:
        mine = [r for r in rows if r.method == method]
        settings = [r.settings for r in mine]
        keys = [k for k in differing(settings) if tells(k)]
        apart = telling_apart(mine, settings)
        kinds = {dtype_of(row) for row in mine}
        for row, values in zip(mine, settings, strict=True):
            words = [f"{k.removeprefix('method.')}={values[k]}" for k in keys if k in values]
            kind = [dtype_of(row)] if len(kinds) > 1 else []
            row.label = " ".join([method, *words, *kind])
            choices = [(k, values[k]) for k in apart if values.get(k) is not None]
            told = [v if isinstance(v, str) else f"{k.removeprefix('method.')}={v}" for k, v in choices]
            row.series = " ".join([method, *told, *kind])
        for same in by_label(mine).values():
            shared = set.intersection(*(set(row.machine.split(", ")) for row in same))
            for row in same:
                row.label = ", ".join([row.label, *(part for part in row.machine.split(", ") if part not in shared)])


def by_label(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by their names."""
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row.label, []).append(row)
    return named


def dtype_of(row: Row) -> str:
    """The type that a run computed in: the same method in two of them is two curves."""
    return str(((row.record.get("env") or {}).get("hardware") or {}).get("dtype"))


def tells(key: str) -> bool:
    """Whether a setting is one of the method, the model or its training."""
    return not key.startswith(("hardware.", "measure.")) and key.rpartition(".")[2] not in PLACES


def differing(settings: list[dict]) -> list[str]:
    """The keys whose values are not the same everywhere."""
    keys = {k for s in settings for k in s}
    return sorted(k for k in keys if len({repr(s.get(k)) for s in settings}) > 1)


def telling_apart(rows: list[Row], settings: list[dict]) -> list[str]:
    """The settings of one method that tell its curves apart: words and switches and, where a number varies within one
    fit (so that it is what a curve runs along), the numbers that need another fit and that words don't tell already."""
    keys = [k for k in differing(settings) if k.startswith("method.")]
    words = [k for k in keys if any(isinstance(s.get(k), (str, bool)) for s in settings)]
    fits: dict[str | None, list[dict]] = {}
    choices: dict[tuple, list[dict]] = {}
    for row, values in zip(rows, settings, strict=True):
        fits.setdefault((row.record.get("fit") or {}).get("state"), []).append(values)
        choices.setdefault(tuple(values.get(k) for k in words), []).append(values)
    along = {k for same in fits.values() for k in differing(same) if k in keys and k not in words}
    numbers = {k for same in choices.values() for k in differing(same)} - along if along else set()
    return [k for k in keys if k in words or k in numbers]


def pareto(points: list[tuple[float | None, float | None]], higher_is_better: bool) -> list[int]:
    """Indices of the points (cost, metric) that no other point beats in both, by rising cost."""
    sign = -1 if higher_is_better else 1
    ordered = sorted((c, sign * m, i) for i, (c, m) in enumerate(points) if c is not None and m is not None)
    front, best = [], float("inf")
    for _, loss, index in ordered:
        if loss < best:
            front.append(index)
            best = loss
    return front


def mark_fronts(rows: list[Row]) -> None:
    """Say of each row on which fronts it stands: of quality over sparsity, over work, and over time on its machine.

    A model of random weights has no quality, hence no front.
    """
    if rows[0].record["config"]["model"].get("weights") == "random":
        return
    costs: dict[str, Callable[[Row], float | None]] = {
        "sparsity": lambda r: None if r.sparsity is None else -r.sparsity,
        "work": lambda r: r.scored_macs,
    }
    for name, cost in costs.items():
        for i in pareto([(cost(r), r.sparse) for r in rows], rows[0].higher_is_better):
            rows[i].fronts.append(name)
    for machine in {r.machine for r in rows}:
        timed = [r for r in rows if r.machine == machine and r.decode.get("speedup") and not r.noisy]
        for i in pareto([(r.decode["sparse"], r.sparse) for r in timed], rows[0].higher_is_better) if timed else []:
            timed[i].fronts.append("time")


def differences(groups: list[Group]) -> dict[str, list]:
    """The protocol keys in which groups differ: key -> value per group, in the order of the groups."""
    keys = {k: None for g in groups for k in g.protocol}
    values = {k: [g.protocol.get(k) for g in groups] for k in keys}
    return {k: v for k, v in values.items() if len({repr(x) for x in v}) > 1}


def repeats(rows: list[Row], everywhere: bool = False) -> list[list[Row]]:
    """Rows that differ in nothing but the seed, together.

    everywhere: on whatever machine, timed or not, but in one number format; one row of each seed.
    """
    sets: dict[str, list[Row]] = {}
    left_out = (*NOT_IDENTITY, "seed", *(("hardware", "measure") if everywhere else ()))
    for row in rows:
        key = row.once(("repeats", everywhere), lambda row=row: digest(
            [{k: v for k, v in row.record["config"].items() if k not in left_out}, dtype_of(row) if everywhere else row.machine]
        ))  # fmt: skip
        sets.setdefault(key, []).append(row)
    return [of_seeds(same) for same in sets.values()] if everywhere else list(sets.values())


def of_seeds(same: list[Row]) -> list[Row]:
    """One row of each seed, the last: a run made twice (with other versions, say) is no second seed."""
    return list({r.record["config"].get("seed"): r for r in same}.values())


def over_seeds(rows: list[Row]) -> list[dict]:
    """Mean and standard deviation where rows differ in nothing but the seed."""
    summaries = []
    for same in map(of_seeds, repeats(rows)):
        if len(same) < 2 or any(r.sparse is None for r in same):
            continue
        name = " ".join(w for w in same[0].label.split() if not w.startswith("seed="))
        values, shares = [r.sparse for r in same], [r.sparsity or 0.0 for r in same]
        summaries.append({
            "label": name, "seeds": len(same), "mean": statistics.mean(values), "sd": statistics.stdev(values),
            "sparsity": statistics.mean(shares), "sparsity_sd": statistics.stdev(shares),
        })  # fmt: skip
    return summaries


def on_target(row: Row, group: Group) -> Row | None:
    """A measured row of the same settings on the device that `row` estimates, or None."""

    def settings(each: Row) -> dict:
        return {k: v for k, v in each.record["config"].items() if k not in (*NOT_IDENTITY, "hardware")}

    device = row.record["config"]["hardware"]["requires"]
    return next(
        (r for r in group.rows if device and device in r.machine and r.decode and not r.record.get("estimate")
         and digest(settings(r)) == digest(settings(row))), None,
    )  # fmt: skip
