"""Tables and the plot of a benchmark record. No torch here: the report shows old records with it."""

from __future__ import annotations

import io


def table(results: dict) -> str:
    """A benchmark record as Markdown."""
    env = results["env"]
    where = env.get("gpu") or f"{env['cpu']}, {env['threads']} thread(s)"
    lines = [
        f"# {results['model']}, random weights, {env['hardware']['dtype']}, {where}",
        "",
        f"Input: {results['input']}. Read bandwidth measured in this run: {results['read_bandwidth_gbs']:.0f} GB/s. "
        f"torch {env['versions'].get('torch')}.",
    ]
    if "projections" in results:
        lines += ["", "## One product", "",
                  "Microseconds with [p10, p90], (speed-up over the faster dense product), [share of the read bandwidth]."
                  " `fused`: as the"
                  " fused step runs it, compaction included; `alone`: a product by itself, bias and rounding included."]  # fmt: skip
        for row in results["projections"]:
            breaking = row["break_even"] if "break_even" in row else row["break_even_sparsity"]  # schema 1
            shown = sorted({v["sparsity"] for v in row["sparse"].values()})
            dense = row["times"][row["dense"]]["median_us"]
            lines += ["", f"**{row['projection']}** {row['m']} x {row['n']}: dense {dense:.1f} us ({row['dense']}, "
                      f"{row['dense_bandwidth_gbs']:.0f} GB/s), break-even {breaks(breaking)}", "",
                      "| kernel | " + " | ".join(f"{s:.0%}" for s in shown) + " |", "|---" * (len(shown) + 1) + "|"]  # fmt: skip
            for kind in sorted({v["kind"] for v in row["sparse"].values()}):
                cells = []
                for s in shown:
                    key = f"{kind}@{s}"
                    value = row["sparse"][key]
                    cells.append(
                        f"{microseconds(row['times'][key])} ({value['speedup']:.2f}x) [{value['of_read_bandwidth']:.0%}]"
                    )
                lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    if "ffn" in results:
        dense = results["ffn"][0]["dense"]["median_us"]
        lines += ["", "## Neuron-sparse FFN, dense gate included", "", f"Dense block: {dense:.1f} us.", "",
                  "| neurons inactive | us | speed-up | share of read bandwidth |", "|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['sparsity']:.0%} | {microseconds(r['sparse'])} | {r['speedup']:.2f}x | {r['of_read_bandwidth']:.0%} |"
            for r in results["ffn"]
        ]
    if "step" in results:
        lines += ["", "## Whole decode step, batch 1", "",
                  "| context | sparsity | dense tokens/s (engine) | sparse tokens/s | speed-up |", "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['context']} | {r['sparsity']:.0%} | {r['dense_tokens_per_s']:.1f} ({r['dense'].partition('/')[2]}) "
            f"| {r['tokens_per_s']:.1f} [{1e3 / r['sparse']['p90_ms']:.1f}, {1e3 / r['sparse']['p10_ms']:.1f}] "
            f"| {r['speedup']:.2f}x |"
            for r in results["step"]
        ]
        for context in sorted({r["context"] for r in results["step"]}):
            engines = next(r for r in results["step"] if r["context"] == context)["dense_engines"]
            lines += ["", f"Dense engines at context {context}: " + ", ".join(
                f"{name.partition('/')[2]} {1e3 / times['median_ms']:.1f} tokens/s" for name, times in engines.items()) + "."]  # fmt: skip
    if "experts" in results:
        lines += expert_lines(results["experts"])
    return "\n".join(lines) + "\n"


def expert_lines(parts: list[dict]) -> list[str]:
    """The lines of Markdown about expert FFNs."""
    lines = ["", "## Expert FFN, router inside the clock", ""]
    for part in parts:
        dense = part["times"][part["dense"]]["median_us"]
        lines += [f"**{part['shape']}**: {part['tokens']} token(s), d = {part['d']}, {part['experts']} experts of "
                  f"{part['size']}, {part['kernel']}; dense {dense:.1f} us ({part['dense']}).", "",
                  "| executed | us | speed-up over dense | of proportional | relative error |", "|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['measured']:.1%} | {r['median_us']:.1f} | {r['speedup']:.2f}x | {r['proportional']:.0%} "
            f"| {r['relative_error']:.1e} |"
            for r in part["rows"]
        ]
        lines.append("")
    return lines


def microseconds(times: dict) -> str:
    """median [p10, p90]."""
    return f"{times['median_us']:.1f} [{times['p10_us']:.1f}, {times['p90_us']:.1f}]"


def breaks(sections: dict[str, dict]) -> str:
    return ", ".join(f"{kind} {shown(each)}" for kind, each in sorted(sections.items()))


def shown(section: dict | float | None) -> str:
    """A break-even sparsity, or why there is none; records of schema 1 hold the figure alone."""
    if not isinstance(section, dict):
        return "never" if section is None else f"{section:.0%}"
    return section["reason"] if section["sparsity"] is None else f"{section['sparsity']:.0%}"


def plot(results: dict) -> bytes:
    """Speed-up against sparsity, with the bytes roofline 1 / (1 - s) drawn in, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a model's name is no mathematics
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for row in results.get("projections", []):
        for kind, style in (("fused", "-"), ("alone", "--")):
            points = sorted((v["sparsity"], v["speedup"]) for v in row["sparse"].values() if v["kind"] == kind)
            if points:
                label = f"{row['projection']} {row['m']}x{row['n']}, {kind}"
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=label)
    for context in sorted({r["context"] for r in results.get("step", [])}):
        points = sorted((r["sparsity"], r["speedup"]) for r in results["step"] if r["context"] == context)
        axes.plot(
            *zip(*points, strict=True),
            "k-" if context < 1000 else "k:",
            linewidth=2,
            label=f"decode step, context {context}",
        )
    if results.get("ffn"):
        points = sorted((r["sparsity"], r["speedup"]) for r in results["ffn"])
        axes.plot(*zip(*points, strict=True), "-.", label="neuron-sparse FFN, dense gate")
    for part in results.get("experts", []):
        points = sorted((1 - r["measured"], r["speedup"]) for r in part["rows"])
        axes.plot(*zip(*points, strict=True), "--", marker="s", markersize=3, label=f"experts, {part['shape']} shape")
    line = [i / 100 for i in range(96)]
    axes.plot(line, [1 / (1 - s) for s in line], color="grey", linewidth=1, label="bytes roofline 1 / (1 - s)")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="sparsity", ylabel="speed-up over dense", yscale="log", ylim=(0.5, 20), xlim=(0, 1))
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    where = results["env"].get("gpu") or results["env"]["cpu"]
    axes.set_title(
        f"{results['model']} shapes, random weights, {results['env']['hardware']['dtype']}, {where}", fontsize=10
    )
    axes.legend(fontsize=7)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    pyplot.close(figure)
    return file.getvalue()
