"""Records to rows: what tables and charts ask of a finished run, and what tells its machine from another.

Records come from result.json files and from archives (records/archive.py). Those of older schema versions are shown,
with their configuration under today's names. Times are compared only between rows of one machine, dtype, thread count,
context and torch version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sparsebench.config.identity import NOT_IDENTITY
from sparsebench.records import archive, record
from sparsebench.report.sources import contents
from sparsebench.sweep import main_metric

SCHEMA_1_EVAL = {  # the part of `eval` that a key of schema 1 belongs to now
    **dict.fromkeys(("test_sequences", "dev_sequences", "batch_size"), "text"),
    **dict.fromkeys(("test_examples", "examples_per_batch", "cue_conflict"), "classifier"),
    **dict.fromkeys(("tasks", "task_limit", "task_path"), "lm_eval"),
}
T = TypeVar("T")
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
    dense_stderr: float | None = None
    sparse_stderr: float | None = None
    difference_stderr: float | None = None  # paired
    higher_is_better: bool = False
    requested: float | None = None
    sparsity: float | None = None
    macs: float | None = None  # sparse / dense, counted, per decoded token (or image, text)
    scored_macs: float | None = None  # the same over the tokens that quality was scored on
    ffn_macs: float | None = None  # sparse / dense of the FFNs' maps alone, routers and predictors included
    executed: float | None = None  # sparse / dense, as the kernel ran
    bytes: float | None = None  # sparse / dense, read per decoded token
    scored_bytes: float | None = None  # the same over the tokens that quality was scored on
    times: dict[str, dict] = field(default_factory=dict)  # part -> {dense, sparse, dense_p10, ..., speedup, kernel}, ms
    noisy: bool | None = None  # whether spread or load made the times worthless (measure/clock.py)
    machine: str = ""
    fit_seconds: float | None = None
    fronts: list[str] = field(default_factory=list)  # sparsity, work, time: where no other row is better in both
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what was worked out before: `once`

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, worked out only the first time: of a row, tables and charts ask the same many times."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]  # type: ignore[no-any-return]

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings as dotted keys (see `flat`)."""
        return self.once("settings", lambda: flat(self.record["config"]))

    @property
    def critical(self) -> dict:
        """What a search for critical sparsity left (measure/critical.py), or nothing."""
        return (self.record.get("extra") or {}).get("critical") or {}

    @property
    def decode(self) -> dict:
        """The timing that stands for the row: decode, or the first one there is."""
        return self.times.get("decode") or next(iter(self.times.values()), {})

    def per_second(self, side: str) -> float | None:
        """Tokens, images or texts per second of the timing that stands for the row."""
        median = self.decode.get(side)
        return 1000 * (self.decode.get("batch") or 1) / median if median else None

    @property
    def change(self) -> float | None:
        """sparse / dense of the metric."""
        return self.sparse / self.dense if self.dense and self.sparse is not None else None

    @property
    def latency(self) -> dict[str, Any]:
        return self.record.get("latency") or {}

    @property
    def roofline(self) -> float | None:
        """The speed-up that the bytes promise, dense / sparse: of the timed step where its own were counted."""
        return (self.latency.get("limit") or {}).get("speedup") or (1 / self.bytes if self.bytes else None)

    @property
    def of_limit(self) -> dict[str, float]:
        """Share of the bytes limit of its machine that each step reached, as `of_limit_<side>`."""
        return {f"of_limit_{side}": v for side, v in ((self.latency.get("limit") or {}).get("share") or {}).items()}

    @property
    def joules(self) -> dict[str, float]:
        """Energy per token or example by side, where it was measured."""
        energy = self.latency.get("energy") or {}
        return {side: energy[side]["joules"] for side in ("dense", "sparse") if energy.get(side)}

    @property
    def by_kernel(self) -> dict[str, dict]:
        """Where a step's time goes: what was told of each side, where anything was."""
        section = (self.latency.get("decode") or {}).get("by_kernel") or {}
        return {side: section[side] for side in ("dense", "sparse") if (section.get(side) or {}).get("ms")}

    @property
    def batches(self) -> list[dict[str, Any]]:
        """Times in ms over the batch: {batch, dense, sparse, kernel} of forward passes, or of decode with what any row keeps."""
        decode = [
            {**row, "dense": row.get("dense_ms"), "sparse": row.get("sparse_ms"), "kernel": row.get("kernel")}
            for row in self.latency.get("batches") or []
        ]
        return decode or [times for times in self.times.values() if times.get("batch")]


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
        row.dense_stderr, row.sparse_stderr = (quality[name].get(f"{side}_stderr") for side in ("dense", "sparse"))
        row.difference_stderr = quality[name].get("difference_stderr")
    measured = record.get("sparsity") or {}
    row.requested, row.sparsity = measured.get("requested"), measured.get("model_wide")
    row.macs, row.executed = (share(costs.get(k), costs.get("dense")) for k in ("sparse", "executed"))
    scored = costs.get("scored") or costs  # without a prompt policy, and in older records, the same
    row.scored_macs = share(scored.get("sparse"), scored.get("dense"))
    row.ffn_macs = ffn_share(scored.get("per_site") or {})
    row.bytes = share(traffic.get("sparse"), traffic.get("dense"))
    read = traffic.get("scored") or traffic
    row.scored_bytes = share(read.get("sparse"), read.get("dense"))
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
            figures |= {k: content.get(k) for k in ("speedup", "speedup_p10", "speedup_p90", "context", "dense_engine",
                                                    "sparse_engine", "batch")}  # fmt: skip
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
    version = (env.get("versions") or {}).get("torch")
    if version:
        parts.append(f"torch {version}")
    return ", ".join(parts)


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


def sites(record: dict) -> list[tuple[str, str, float]]:
    """(layer, role, sparsity) of every map; one that is not named `<layer>.<role>` stands for itself, without a role."""
    places = []
    for name, site in ((record.get("sparsity") or {}).get("per_site") or {}).items():
        layer, _, role = name.partition(".") if name[:1].isdigit() else (name, "", "")
        places.append((layer, role, site["sparsity"]))
    return places
