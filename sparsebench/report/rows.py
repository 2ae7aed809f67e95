"""Records to rows that can be compared: what stands in a table, which rows may be ranked together, who is on the front.

Records come from result.json files and from archives (records/archive.py). Those of older schema versions are shown,
with their configuration under today's names.

Two rows share a group only if they scored the same model on the same test text by the same protocol; rows that measured
no sparsity at all (method=dense) join every group of theirs, whatever the prompt policy. Times are compared only
between rows of one machine, dtype, thread count and context.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsebench.config.identity import NOT_IDENTITY, digest
from sparsebench.records import archive, record
from sparsebench.report.sources import contents
from sparsebench.sweep import main_metric

SCHEMA_1_EVAL = {  # the part of `eval` that a key of schema 1 belongs to now
    **dict.fromkeys(("test_sequences", "dev_sequences", "batch_size"), "text"),
    **dict.fromkeys(("test_examples", "examples_per_batch", "cue_conflict"), "classifier"),
    **dict.fromkeys(("tasks", "task_limit", "task_path"), "lm_eval"),
}
FFN_ROLES = ("gate", "up", "gate_up", "fc1", "down", "fc2")


@dataclass
class Row:
    """One finished record, with what tables and plots ask for. None = not measured."""

    path: Path
    record: dict
    label: str = ""
    series: str = ""  # the curve it belongs to: its method, and what tells the method's curves apart
    method: str = ""
    metric: str | None = None
    dense: float | None = None
    sparse: float | None = None
    higher_is_better: bool = False
    requested: float | None = None
    sparsity: float | None = None
    macs: float | None = None  # sparse / dense, counted, per decoded token (or image, text)
    scored_macs: float | None = None  # the same over the tokens that quality was scored on
    ffn_macs: float | None = None  # sparse / dense of the FFNs' maps alone, routers and predictors included
    executed: float | None = None  # sparse / dense, as the kernel ran
    bytes: float | None = None  # sparse / dense
    times: dict[str, dict] = field(default_factory=dict)  # part -> {dense, sparse, dense_p10, ..., speedup, kernel}, ms
    noisy: bool | None = None  # whether spread or load made the times worthless (measure/clock.py)
    machine: str = ""
    fit_seconds: float | None = None
    on_front: bool = False

    @property
    def decode(self) -> dict:
        """The timing that stands for the row: decode, or the first one there is."""
        return self.times.get("decode") or next(iter(self.times.values()), {})

    @property
    def change(self) -> float | None:
        """sparse / dense of the metric."""
        return self.sparse / self.dense if self.dense and self.sparse is not None else None

    @property
    def roofline(self) -> float | None:
        """The speed-up that the bytes promise: dense / sparse."""
        return 1 / self.bytes if self.bytes else None


@dataclass
class Group:
    """Rows that may be ranked together."""

    protocol: dict
    rows: list[Row]
    apart: str = ""  # what tells it from other groups of the same model, data and metric

    @property
    def title(self) -> str:
        return f"{self.protocol['model']} on {self.protocol['dataset']}, {self.protocol['metric']}{self.apart}"


@dataclass
class Collection:
    """Everything found under the paths given."""

    finished: list[Row] = field(default_factory=list)
    failed: list[tuple[Path, dict]] = field(default_factory=list)
    benches: list[tuple[Path, dict]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)  # and why
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.finished) + len(self.failed) + len(self.benches)

    @property
    def schemas(self) -> Counter:
        """How many runs there are of each schema version."""
        contents = [*(r.record for r in self.finished), *(content for _, content in self.failed)]
        return Counter(content["schema_version"] for content in contents)


def collect(paths: Iterable[Path]) -> Collection:
    """All records below `paths`. One run found twice (copied folders) counts once, the later one."""
    collection, latest = Collection(), {}
    for where, content, reason in contents(paths):
        if reason:
            collection.unreadable.append((where, reason))
            continue
        if record.is_bench(content):
            collection.benches.append((where, content))
            continue
        key = archive.key(content)
        if key in latest:
            collection.repeated += 1
        if key not in latest or rank(content) > rank(latest[key][1]):
            latest[key] = (where, content)
    for where, content in latest.values():
        if content["status"] != "finished":
            collection.failed.append((where, content))
            continue
        try:
            collection.finished.append(make_row(where, content))
        except (KeyError, TypeError, AttributeError) as error:
            collection.unreadable.append((where, f"not a whole record ({type(error).__name__}: {error})"))
    tell_models_apart(collection.finished)
    return collection


def tell_models_apart(rows: list[Row]) -> None:
    """Add where its weights came from to the name of a model that others share; nothing for random or trained ones."""
    models = [row.record["config"]["model"] for row in rows]
    sources = [str((row.record.get("model") or {}).get("source")) for row in rows]
    pretrained = [model.get("weights") == "pretrained" for model in models]
    named: dict[str, set[str]] = {}
    for model, source, own in zip(models, sources, pretrained, strict=True):
        if own:
            named.setdefault(model["name"], set()).add(source)
    shared = {name: several for name, several in named.items() if len(several) > 1}
    for model, source, own in zip(models, sources, pretrained, strict=True):
        if own and model["name"] in shared:
            model["name"] += f" ({ending(source, shared[model['name']])})"


def ending(source: str, others: set[str]) -> str:
    """The last parts of a path, as few as no other one ends with."""
    parts = source.strip("/").split("/")
    endings = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next((e for e in endings if sum(f"/{o}".endswith(f"/{e}") for o in others) == 1), source)


def rank(content: dict) -> tuple[bool, str]:
    return content["status"] == "finished", str(content.get("started_at"))


def todays(config: dict) -> dict:
    """The configuration of a record under the names that keys have now: `eval.batch_size` is `eval.text.batch_size`."""
    moved: dict[str, Any] = {}
    for key, value in (config.get("eval") or {}).items():
        if key in SCHEMA_1_EVAL:
            moved.setdefault(SCHEMA_1_EVAL[key], {})[key] = value
        else:
            moved[key] = value
    return {**config, "eval": moved} if moved else config


def make_row(path: Path, record: dict) -> Row:
    record = {**record, "config": todays(record["config"])}
    quality, costs, traffic = (record.get(k) or {} for k in ("quality", "macs", "bytes"))
    name = main_metric(quality)
    row = Row(path, record, method=record["config"]["method"]["name"], metric=name, machine=machine(record))
    if name:
        row.dense, row.sparse = quality[name]["dense"], quality[name]["sparse"]
        row.higher_is_better = quality[name]["higher_is_better"]
    measured = record.get("sparsity") or {}
    row.requested, row.sparsity = measured.get("requested"), measured.get("model_wide")
    row.macs, row.executed = (share(costs.get(k), costs.get("dense")) for k in ("sparse", "executed"))
    scored = costs.get("scored") or costs  # without a prompt policy, and in older records, the same
    row.scored_macs = share(scored.get("sparse"), scored.get("dense"))
    row.ffn_macs = ffn_share(scored.get("per_site") or {})
    row.bytes = share(traffic.get("sparse"), traffic.get("dense"))
    row.fit_seconds = (record.get("fit") or {}).get("seconds")
    row.times = dict(timings(record.get("latency") or {}))
    row.noisy = (record.get("latency") or {}).get("noisy")
    return row


def share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def ffn_share(sites: dict) -> float | None:
    """Counted over dense products of the sites `<layer>.<role>` of FFNs; None where the model has none."""
    split = ((name.partition("."), site) for name, site in sites.items())
    mine = [site for (layer, _, role), site in split if layer.isdigit() and role in FFN_ROLES]
    return share(sum(s["sparse_macs"] + s.get("overhead_macs", 0) for s in mine), sum(s["dense_macs"] for s in mine))


def timings(latency: dict) -> Iterable[tuple[str, dict]]:
    """(part, {dense, sparse, speedup, kernel}) for every pair of timings in a latency section, however it is nested."""
    for part, content in latency.items():
        if not isinstance(content, dict):
            continue
        if isinstance(content.get("dense"), dict) and "median_ms" in content["dense"]:
            kernel = content.get("kernel", latency.get("kernel"))
            figures = {name: content[name]["median_ms"] for name in ("dense", "sparse")}
            figures |= {
                f"{name}_{cut}": content[name].get(f"{cut}_ms")
                for name in ("dense", "sparse")
                for cut in ("p10", "p90")
            }
            figures |= {key: content.get(key) for key in ("speedup", "context", "dense_engine")}
            yield part, figures | {"kernel": kernel}
        else:
            yield from ((f"{part} {inner}", times) for inner, times in timings(content))


def machine(record: dict) -> str:
    """What must be equal before two times are compared, in words."""
    env, latency = record.get("env") or {}, record.get("latency") or {}
    target = env.get("hardware") or {}
    where = env.get("gpu") if "cuda" in str(target.get("device")) else env.get("cpu")
    parts = [str(where or "unknown machine"), str(target.get("dtype"))]
    if "cuda" not in str(target.get("device")):
        parts.append(f"{target.get('threads')} thread(s)")
    context = (latency.get("decode") or {}).get("context")
    if context is not None:
        parts.append(f"context {context}")
    return ", ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Groups and labels


def protocol(row: Row) -> dict:
    """What must be equal before two rows are ranked together."""
    settings, quality = row.record["config"], (row.record.get("quality") or {})
    dataset = row.record.get("dataset") or {}
    stated = quality[row.metric].get("protocol") if row.metric else None
    weights = (row.record.get("model") or {}).get("source")
    if settings["model"].get("weights") == "scratch" and weights:
        weights = Path(weights).name  # named after what trained it, the same in any output folder
    return {
        "model": settings["model"]["name"],
        "weights": weights,
        "num_layers": settings["model"].get("num_layers"),
        "dataset": settings["dataset"]["name"],
        "test": (dataset.get("test") or {}).get("fingerprint"),
        "metric": row.metric or "nothing scored",
        **(stated if isinstance(stated, dict) else {"protocol": stated}),
    }


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
        front = pareto([(-(r.sparsity or 0.0), r.sparse) for r in group.rows], group.rows[0].higher_is_better)
        for i in front:
            group.rows[i].on_front = True
    ordered = sorted(groups.values(), key=lambda g: -len(g.rows))
    for title in {g.title for g in ordered}:
        alike = [g for g in ordered if g.title == title]
        told = differences(alike)
        short = {k: v for k, v in told.items() if k not in ("fingerprint", "tokens")} or told
        for key, values in short.items():
            for group, value in zip(alike, values, strict=True):
                group.apart += f", {key} {str(value)[-24:] if key != 'test' else str(value)[:8]}"
    return ordered


def flat(node: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; what says where a run is kept is left out."""
    leaves = {}
    for key, value in node.items():
        if (not prefix and key in NOT_IDENTITY) or key == "_target_":
            continue
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def label(rows: list[Row]) -> None:
    """Name each row by its method and by the settings in which rows of that method differ; its curve by some of them."""
    for method in {r.method for r in rows}:
        mine = [r for r in rows if r.method == method]
        settings = [flat(r.record["config"]) for r in mine]
        keys = differing(settings)
        apart = telling_apart(mine, settings)
        for row, values in zip(mine, settings, strict=True):
            words = [f"{k.removeprefix('method.')}={values[k]}" for k in keys if k in values]
            row.label = " ".join([method, *words])
            choices = [(k, values[k]) for k in apart if values.get(k) is not None]
            told = [v if isinstance(v, str) else f"{k.removeprefix('method.')}={v}" for k, v in choices]
            row.series = " ".join([method, *told])


def differing(settings: list[dict]) -> list[str]:
    return sorted({k for s in settings for k in s if len({repr(t.get(k)) for t in settings}) > 1})


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


def differences(groups: list[Group]) -> dict[str, list]:
    """The protocol keys in which groups differ: key -> value per group, in the order of the groups."""
    keys = {k: None for g in groups for k in g.protocol}
    values = {k: [g.protocol.get(k) for g in groups] for k in keys}
    return {k: v for k, v in values.items() if len({repr(x) for x in v}) > 1}


def repeats(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed, together."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        settings = {k: v for k, v in row.record["config"].items() if k not in (*NOT_IDENTITY, "seed")}
        sets.setdefault(digest([settings, row.machine]), []).append(row)
    return list(sets.values())


def over_seeds(rows: list[Row]) -> list[dict]:
    """Mean and standard deviation where rows differ in nothing but the seed."""
    summaries = []
    for same in repeats(rows):
        if len(same) < 2 or any(r.sparse is None for r in same):
            continue
        name = " ".join(w for w in same[0].label.split() if not w.startswith("seed="))
        values, shares = [r.sparse for r in same], [r.sparsity or 0.0 for r in same]
        summaries.append({
            "label": name, "seeds": len(same), "mean": statistics.mean(values), "sd": statistics.stdev(values),
            "sparsity": statistics.mean(shares), "sparsity_sd": statistics.stdev(shares),
        })  # fmt: skip
    return summaries


def sites_by_layer(record: dict) -> dict[str, float]:
    """Sparsity per layer (sites are named `<layer>.<role>` or otherwise stand for themselves), weighted by parameters."""
    sums: dict[str, list[float]] = {}
    for name, site in ((record.get("sparsity") or {}).get("per_site") or {}).items():
        layer, weight = name.partition(".")[0] if name[:1].isdigit() else name, site.get("weight") or 1
        total = sums.setdefault(layer, [0.0, 0.0])
        total[0] += site["sparsity"] * weight
        total[1] += weight
    return {layer: part / weight for layer, (part, weight) in sums.items()}
