"""The report's tables as plain rows of text, the same in HTML, Markdown and CSV."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsebench.records import archive, terminal, wording
from sparsebench.records.wording import duration, rounded, uncertain
from sparsebench.report.equal_terms import Comparison, Point, Standing
from sparsebench.report.groups import Group, differences, over_seeds, worded
from sparsebench.report.rows import Row

DASH = "–"


@dataclass
class Table:
    """head and rows of text; `numeric` columns stand right; marked rows are set off."""

    head: list[str]
    rows: list[list[str]]
    numeric: set[int]
    marked: set[int]
    note: str = ""
    runs: list[Row] = field(default_factory=list)  # of each line, where lines are runs


def number(value: float | None, form: str = ".4g", suffix: str = "") -> str:
    return DASH if value is None else f"{value:{form}}{suffix}"


EXPLAINED = {  # column of a comparison -> what it says, in the note below
    "front": "front: no other row is better in both quality and measured sparsity, work (MACs over the scored tokens), or time on "
             "its machine.",
    "sparsity": "Sparsity is measured on test tokens and model-wide, asked is what was set.",
    "change": "± is the standard error over the test set; that of the change is paired.",
    "MACs": "MACs are counted and a share of the dense model's per decoded token.",
    "executed": "Executed: MACs as the kernel ran.",
    "bytes": "Bytes: of weights and cache read per decoded token, share of dense.",
    "sparse ms": "Times are medians with p10 and p90 in brackets; dense is the fastest dense engine of the run on the untouched "
                 "model, named before the kernel.",
    "speed-up": "“simulated”: no kernel skipped work, so no speed-up is claimed; “noisy”: spread or load of the machine make "
                "the times worthless.",
    "roofline": "Roofline: the speed-up that the bytes promise.",
    "of limit": "Of limit: how much of the bytes limit of its machine (bytes over read bandwidth, measured in the run) the dense "
                "and the sparse step reached, above 100 % from a cache.",
    "J sparse": "J: joules per token, idle power included.",
    "critical": "Critical: the largest sparsity measured on dev at which the method keeps the demanded share of the dense metric, "
                "with 95 %.",
}  # fmt: skip


def comparison(group: Group) -> Table:
    """The rows of one group, by method and sparsity; those on a front are marked. Columns that no row fills are left out."""
    metric = group.protocol["metric"]
    head = ["run", "front", "asked", "sparsity", "dense", metric, "change", "MACs", "executed", "bytes", "dense ms",
            "sparse ms", "per s", "speed-up", "roofline", "of limit", "J dense", "J sparse", "kernel", "fit s", "critical"]  # fmt: skip
    rows = [
        [
            row.label, ", ".join(row.fronts), number(row.requested, ".0%"), number(row.sparsity, ".1%"),
            known(row.dense, row.dense_stderr), known(row.sparse, row.sparse_stderr), change(row), number(row.macs, ".1%"),
            number(row.executed, ".1%"), number(row.bytes, ".1%"), spread(row.decode, "dense"), spread(row.decode, "sparse"),
            number(row.per_second("sparse"), ".1f"), speedup(row), number(row.roofline, ".2f", "x"), of_limit(row),
            *joules(row), kernels(row.decode), number(row.fit_seconds, ".1f"),
            terminal.critical(row.critical) if row.critical else DASH,
        ]
        for row in group.rows
    ]  # fmt: skip
    marked = {i for i, row in enumerate(group.rows) if row.fronts}
    table = Table(head, rows, {*range(2, 18), 19}, marked, runs=list(group.rows))
    table = without_empty(table, {"run", "sparsity", metric, "change"})
    table.note = " ".join(text for name, text in EXPLAINED.items() if name in table.head)
    return table


def without_empty(table: Table, kept: set[str]) -> Table:
    """The table without the columns that hold nothing in any row, those named in `kept` excepted."""
    there = [
        i for i, name in enumerate(table.head) if name in kept or any(row[i] not in ("", DASH) for row in table.rows)
    ]
    rows = [[row[i] for i in there] for row in table.rows]
    numeric = {place for place, i in enumerate(there) if i in table.numeric}
    return Table([table.head[i] for i in there], rows, numeric, table.marked, table.note, table.runs)


def of_limit(row: Row) -> str:
    """Shares of the bytes limit that the dense and the sparse step reached."""
    return " / ".join(f"{share:.0%}" for share in row.of_limit.values()) or DASH


def joules(row: Row) -> tuple[str, str]:
    """Energy per token or example, dense and sparse."""
    return number(row.joules.get("dense"), ".3g"), number(row.joules.get("sparse"), ".3g")


def known(value: float | None, stderr: float | None) -> str:
    """10.98 ± 0.03, or the figure alone."""
    return DASH if value is None else uncertain(value, stderr)


def change(row: Row) -> str:
    """Sparse over dense with its paired standard error; of accuracy the difference in points."""
    if row.metric is None or row.sparse is None:
        return DASH
    return wording.change(row.metric, row.record["quality"][row.metric])


def spread(time: dict, side: str) -> str:
    """median [p10, p90] in ms."""
    median, low, high = (time.get(key) for key in (side, f"{side}_p10", f"{side}_p90"))
    return number(median, ".3f") + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def kernels(time: dict) -> str:
    """The dense engine and the kernel, where they are known."""
    return " / ".join(filter(None, (time.get("dense_engine"), time.get("kernel")))) or DASH


def speedup(row: Row) -> str:
    if row.decode.get("speedup"):
        return f"{row.decode['speedup']:.2f}x" + (" (noisy)" if row.noisy else "")
    return "simulated" if row.decode.get("kernel") and row.method != "dense" else DASH


def metrics(group: Group) -> Table | None:
    """Every further metric of the group's records, dense and sparse; None where there is only the main one.

    A metric scored by two protocols (task limit, shots, harness) is two columns, named by what tells them apart.
    """
    columns: dict[str, dict] = {}  # of a metric: its protocols as text -> as they stand
    for row in group.rows:
        for name, metric in (row.record.get("quality") or {}).items():
            if name not in (group.protocol["metric"], "nll"):
                columns.setdefault(name, {}).setdefault(repr(metric.get("protocol")), metric.get("protocol"))
    if not columns:
        return None
    places = [(name, key, heading(name, key, told)) for name, told in columns.items() for key in told]
    rows = []
    for row in group.rows:
        quality = row.record.get("quality") or {}
        cells = [
            f"{number(quality[m]['dense'])} → {known(quality[m]['sparse'], quality[m].get('sparse_stderr'))}"
            if m in quality and repr(quality[m].get("protocol")) == key else DASH
            for m, key, _ in places
        ]  # fmt: skip
        rows.append([row.label, *cells])
    return Table(["run", *(title for _, _, title in places)], rows, set(range(1, len(places) + 1)), set())


def heading(name: str, key: str, protocols: dict) -> str:
    """A metric's name and, where it was scored by several protocols, in what this one differs."""
    if len(protocols) == 1:
        return name
    stated = {k: p if isinstance(p, dict) else {"protocol": p} for k, p in protocols.items()}
    keys = sorted({k for p in stated.values() for k in p})
    told = [k for k in keys if len({repr(p.get(k)) for p in stated.values()}) > 1]
    return f"{name} ({', '.join(f'{k} {shown(stated[key].get(k))}' for k in told)})"


def seeds(group: Group) -> Table | None:
    means = over_seeds(group.rows)
    rows = [
        [
            s["label"],
            str(s["seeds"]),
            uncertain(100 * s["sparsity"], 100 * s["sparsity_sd"], " %"),
            uncertain(s["mean"], s["sd"]),
        ]
        for s in means
    ]
    head = ["setting", "seeds", "sparsity, mean ± s.d.", f"{group.protocol['metric']}, mean ± s.d."]
    return Table(head, rows, {1, 2, 3}, set()) if rows else None


def protocols(groups: list[Group]) -> Table | None:
    """What keeps the groups apart; None where there is one group."""
    values = differences(groups)
    rows = [[worded(k), *(shown(v) for v in each)] for k, each in values.items()]
    head = ["protocol", *(f"group {i + 1}" for i in range(len(groups)))]
    return Table(head, rows, set(), set()) if rows else None


def shown(value) -> str:
    text = DASH if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def machines(group: Group) -> list[str]:
    """The machines whose times stand in one table."""
    return list(dict.fromkeys(r.machine for r in group.rows if r.times))


def busy(group: Group) -> str | None:
    """A warning where times were taken on a machine that had more to do than it has cores."""
    loads = [
        (env["load_average"][0], env.get("cores"))
        for env in (r.record.get("env") or {} for r in group.rows if r.times)
        if env.get("load_average") and env.get("cores") and "cuda" not in str((env.get("hardware") or {}).get("device"))
    ]
    over = [(load, cores) for load, cores in loads if load > cores]
    if not over:
        return None
    load, cores = max(over)
    return (
        f"{len(over)} of {len(loads)} runs started on a busy machine (load average up to {load:.1f} on {cores} cores): "
        "their times and speed-ups are not to be trusted."
    )


def failures(failed: list) -> Table:
    rows = [[r["name"], r["status"], (r.get("error") or {}).get("message") or DASH, str(path)] for path, r in failed]
    return Table(["run", "status", "reason", "record"], rows, set(), set())


def totals(rows: list[Row]) -> str:
    """How long the finished runs took together."""
    return duration(sum(r.record["seconds"] for r in rows))


def every_run(groups: list[Group]) -> Table:
    """Every finished run with the figures that people ask for, protocols one after the other."""
    head = ["protocol", "run", "model", "data", "method", "metric", "dense", "sparse", "sparsity", "MACs", "bytes",
            "dense MFLOPs", "sparse MFLOPs", "dense ms", "sparse ms", "dense per s", "sparse per s", "speed-up", "of limit",
            "J dense", "J sparse", "kernel", "machine", "load / cores",
            "weights MB", "peak MB", "fit s", "torch", "sparsebench", "commit", "hash"]  # fmt: skip
    runs = [(i + 1, row) for i, group in enumerate(groups) for row in group.rows]
    numeric = {0, *range(6, 21), *range(23, 27)}
    table = Table(head, [run_cells(i, row) for i, row in runs], numeric, set(), runs=[row for _, row in runs])
    return without_empty(table, {"protocol", "run", "model", "data", "method", "metric", "sparse", "sparsity", "hash"})


def run_cells(number_of_group: int, row: Row) -> list[str]:
    record, env = row.record, row.record.get("env") or {}
    costs, memory, versions = record.get("macs") or {}, record.get("memory") or {}, env.get("versions") or {}
    load, cores = (env.get("load_average") or [None])[0], env.get("cores")
    flops = (number(costs[k] * 2e-6, ".4g") if costs.get(k) is not None else DASH for k in ("dense", "sparse"))
    sizes = (
        number(memory[k] / 1e6, ".4g") if memory.get(k) is not None else DASH for k in ("weight_bytes", "peak_bytes")
    )
    return [
        str(number_of_group), row.label, record["config"]["model"]["name"], record["config"]["dataset"]["name"], row.method,
        row.metric or DASH, known(row.dense, row.dense_stderr), known(row.sparse, row.sparse_stderr),
        number(row.sparsity, ".1%"), number(row.macs, ".1%"), number(row.bytes, ".1%"), *flops,
        spread(row.decode, "dense"), spread(row.decode, "sparse"),
        *(number(row.per_second(side), ".1f") for side in ("dense", "sparse")), speedup(row), of_limit(row), *joules(row),
        kernels(row.decode), row.machine, f"{load:.1f} / {cores}" if load is not None else DASH, *sizes, number(row.fit_seconds, ".1f"),
        str(versions.get("torch") or DASH), str(versions.get("sparsebench") or DASH),
        (env.get("git_commit") or DASH)[:7], archive.key(record)[:10],
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Equal terms


def answer(group: Group, standing: Standing) -> tuple[str, list[str], list[str]]:
    """(the answer in a sentence, what it rests on, curves that are not compared) about the best curve at these terms."""
    best, metric = standing.ranked[0], group.protocol["metric"]
    terms = f"{standing.target * 100:g} % {standing.axis.words}"
    beside = ""
    if standing.dense is not None:
        share = metric == "accuracy"
        beside = f", dense {100 * standing.dense.value:.2f} %" if share else f", dense {standing.dense.value:.4g}"
    lead = f"At {terms} {best.series} has the best {metric}: {at_terms(standing, best)}{beside}. "
    lead += " ".join(against(standing.comparisons))
    lines = [f"{c.sentence} ({c.verdict}; {c.rests_on})" for c in standing.comparisons]
    reasons: dict[str, list[str]] = {}
    for point in standing.refused:
        reasons.setdefault(point.problem, []).append(point.series)
    refused = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lead, lines, refused


def against(comparisons: list[Comparison]) -> list[str]:
    """How the others stand to the best: which are not told apart from it, and the first that is clearly worse."""
    said, by_verdict = [], {c.verdict: [d for d in comparisons if d.verdict == c.verdict] for c in comparisons}
    alike = by_verdict.pop("not told apart", [])
    if alike:
        said.append(f"Not told apart from it: {', '.join(f'{c.worse.series} ({c.amount})' for c in alike)}.")
    worse = by_verdict.pop("a real difference", [])
    for verdict, unsure in by_verdict.items():
        first = unsure[0]
        said.append(f"Whether it beats {first.worse.series} hangs on the interpolation." if verdict.startswith("hangs") else
                    f"{first.worse.series} is worse by {first.amount}; whether that is real is {verdict}.")  # fmt: skip
    if worse:
        which = "The next" if worse[0] is comparisons[0] else "The first that is clearly worse"
        said.append(f"{which}, {worse[0].worse.series}, is worse by {worse[0].amount}: a real difference.")
    return said


def equal_terms(standings: list[Standing]) -> Table:
    """One axis: every curve at every term, the best of each marked ◆ and those not told apart from it ◇; curves that can't be
    had there say why."""
    names = sorted({p.series for s in standings for p in [*s.ranked, *s.refused]})
    rows = []
    for name in names:
        cells, problems = [], {}
        for each in standings:
            point = next(p for p in [*each.ranked, *each.refused] if p.series == name)
            cells.append(DASH if point.problem else at_terms(each, point) + mark(each, point))
            if point.problem:
                problems[point.problem] = None
        rows.append([name, *cells, "; ".join(problems)])
    head = ["curve", *(f"at {s.target:.0%}" for s in standings), "where there is none"]
    note = (
        "In brackets: the difference from the dense model, ± its paired standard error. ◆ best at these terms, ◇ not told "
        "apart from the best."
    )
    return Table(head, rows, set(range(1, len(standings) + 1)), set(), note)


def mark(standing: Standing, point: Point) -> str:
    """◆ for the best of several, ◇ for those that are not told apart from it."""
    if len(standing.ranked) > 1 and point is standing.ranked[0]:
        return " ◆"
    return " ◇" if any(c.worse is point and c.verdict == "not told apart" for c in standing.comparisons) else ""


def at_terms(standing: Standing, point: Point) -> str:
    """A curve's figure with as many digits as its paired difference from dense can bear, and that difference."""
    change = standing.above_dense(point)
    if standing.metric == "accuracy":
        figure = f"{100 * point.value:.2f} %"
        return figure if change is None else f"{figure} ({points_of(*change)})"
    if change is None:
        return uncertain(point.value, point.stderr)
    return f"{rounded(point.value, change[1])} ({uncertain(*change, sign='+')})"


def points_of(difference: float, stderr: float | None) -> str:
    """A difference of shares in points."""
    return uncertain(100 * difference, None if stderr is None else 100 * stderr, " points", "+")


def comparisons(standings: list[Standing]) -> Table | None:
    """The lines that can be quoted: at each term every curve against the best one."""
    rows = [
        [c.sentence, c.verdict, c.rests_on, f"{c.worse.between[0]:.1%} and {c.worse.between[1]:.1%}"]
        for s in standings for c in s.comparisons
    ]  # fmt: skip
    note = (
        "± is the standard error of the difference. A difference of less than two of them is not told apart from none."
    )
    head = ["comparison", "verdict", "rests on", "interpolated between"]
    return Table(head, rows, set(), set(), note) if rows else None
