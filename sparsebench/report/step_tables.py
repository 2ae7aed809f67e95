"""Tables of a protocol's decode steps: role by role, over the batch, and as estimated for machines that are not here."""

from __future__ import annotations

from sparsebench.report.groups import Group, on_target
from sparsebench.report.tables import DASH, Table, number, speedup, spread


def where_time_goes(group: Group) -> Table | None:
    """A decode step role by role, dense and sparse, of each run that took marks."""
    told = [(row, side, each) for row in group.rows for side, each in row.by_kernel.items()]
    roles = list(dict.fromkeys(role for _, _, each in told for role in each["ms"]))
    rows = [
        [row.label, side, str(each.get("engine")), number(each["step_ms"], ".3f"),
         *(number(each["ms"].get(role), ".3f") for role in roles), f"{each['unattributed']:.0%}", str(each.get("how"))]
        for row, side, each in told
    ]  # fmt: skip
    note = (
        "Milliseconds of marked steps, which were taken after the timed ones and may be slower; not attributed is what no "
        "role accounts for (Python, launches, copies, waiting)."
    )
    head = ["run", "model", "engine", "step", *roles, "not attributed", "told by"]
    return Table(head, rows, set(range(3, len(roles) + 5)), set(), note, [row for row, _, _ in told]) if rows else None


def pays(every: list[dict]) -> str:
    """Up to which batch a sparse step is faster by a kernel that skips, from the smallest on."""
    last = None
    for each in sorted(every, key=lambda b: b["batch"]):
        faster = each["dense"] and each["sparse"] and each["sparse"] < each["dense"]
        if not faster or each.get("simulated"):
            break
        last = each["batch"]
    return "nowhere" if last is None else f"up to {last}"


def batches(group: Group) -> Table | None:
    """Decode over the batch, and up to which one skipping pays."""
    rows, runs = [], []
    for row in group.rows:
        every = row.batches if row.latency.get("batches") else []
        for each in every:
            gain = each["dense"] / each["sparse"] if each["dense"] and each["sparse"] else None
            cells = (number(each[side], ".3f") for side in ("dense", "sparse"))
            speed = "simulated" if each.get("simulated") else number(gain, ".2f", "x") + " (noisy)" * bool(row.noisy)
            rows.append([row.label, str(each["batch"]), *cells, speed, number(each.get("union_density"), ".1%"),
                         each["kernel"] or DASH, "noisy" if row.noisy else pays(every)])  # fmt: skip
            runs.append(row)
    note = "Milliseconds of a step of all rows of the batch. Kept by any: channels that at least one of the rows keeps."
    head = ["run", "batch", "dense ms", "sparse ms", "speed-up", "kept by any", "kernel", "pays"]
    return Table(head, rows, set(range(1, 6)), set(), note, runs) if rows else None


def estimates(group: Group) -> Table | None:
    """Predicted times of absent targets, beside the same run measured on the target where the records hold one."""
    rows = []
    for row in group.rows:
        estimate = row.record.get("estimate")
        if not estimate:
            continue
        decode, real = estimate["decode"], on_target(row, group)
        rows.append([
            row.label, estimate["target"], f"≈ {decode['dense_ms']:.3f}", f"≈ {decode['sparse_ms']:.3f}",
            f"≈ {decode['speedup']:.2f}x", estimate["fitted_on"]["device"],
            f"{spread(real.decode, 'dense')}, {spread(real.decode, 'sparse')}, {speedup(real)}" if real else DASH,
            "; ".join(estimate["cautions"]) or DASH,
        ])  # fmt: skip
    head = ["run", "target", "dense ms", "sparse ms", "speed-up", "fitted on", "measured on the target", "caution"]
    note = "Estimates, not measurements: the target's roofline over the efficiency measured on the present device."
    return Table(head, rows, {2, 3, 4}, set(), note) if rows else None
