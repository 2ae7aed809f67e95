"""Published claims and what the records say about them: reproduced, not reproduced, not decided, not testable here.

A claim is one file, conf/experiment/claims/<id>.yaml: the experiment that tests it (`sparsebench -m
experiment=claims/<id>` runs it) and, under `claim`, what is claimed and how records decide it:

    claim:
      method: wina                        # the page in docs/methods that it belongs to
      statement: WINA keeps more ...      # in our words
      source: {paper: arXiv ..., where: Table 2, seen: text}          # seen: as in assets/published.yaml
      published: the figures, in words
      setting: {models: [llama2-7b], data: ..., metric: ..., machine: ..., with: {method.prompt: p99}}
      needs: what was not at hand         # optional; said where no record tests the claim
      give: dataset.path=<folder>         # optional: what the command needs beside the experiment
      sides:                              # which runs take part: settings of the record
        wina: {where: {method.name: wina, method.sparsity: 0.5}}
        teal: {where: {method.name: teal}, vary: [method.sparsity]}
                                          # vary: what its curve runs along; ignore: settings without effect on it
    equal: [method.calibration_tokens]  # optional: settings that must be the same on all sides
      tests:                              # the claim holds if all of them do
        - {measure: loss, of: wina, than: teal, along: sparsity, below: 0}

measure   loss: relative loss of quality, of perplexity or accuracy (+0.05 = 5 % worse); perplexity, accuracy: their
          difference; speedup; shape_bias; or a path of the record, or two joined by " / " or " - " (`name` says what it is)
than      another side, or `dense`: the dense model of the same run; absent: the figure itself is tested
along     sparsity, work (share of MACs over the scored tokens), ffn_work: a side with `vary` is a curve over it
at        where curves are read; absent: where `of` lies
below, above   the bound, which must be passed by `errors` (default 2) standard errors; as many on the other side refute
          the claim; in between it is not decided

Runs are compared within one model, text, protocol and machine, and paired by seed. Where a side's runs differ in more
settings than it names, each of these settings has a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from typing import Any

import yaml

from sparsebench.records.wording import uncertain
from sparsebench.report.export import as_markdown
from sparsebench.report.groups import protocol
from sparsebench.report.published import SEEN, same
from sparsebench.report.quantities import Estimate
from sparsebench.report.rows import Row
from sparsebench.report.tables import DASH, Table
from sparsebench.report.trials import AXES, AXIS_WORDS, EQUAL_WORDS, Missing, by_place, machine_of, measured, pools

REPRODUCED, REFUTED, OPEN, UNTESTABLE = "reproduced", "not reproduced", "not decided", "not testable here"
ERRORS = 2.0  # standard errors that a bound must be passed by
TOY = 20_000_000  # parameters below which a model is called a toy, unless the paper is about it
SIDE_KEYS, TEST_KEYS = (
    {"where", "vary", "ignore"},
    {"measure", "of", "than", "along", "at", "below", "above", "errors", "name"},
)


@dataclass(frozen=True)
class Claim:
    """One file of conf/experiment/claims."""

    id: str
    method: str
    statement: str
    source: dict[str, str]
    published: str
    setting: dict[str, Any]
    needs: str | None = None
    give: str | None = None
    sides: dict[str, dict] = field(default_factory=dict)
    equal: list[str] = field(default_factory=list)
    tests: list[dict] = field(default_factory=list)

    @property
    def command(self) -> str:
        return " ".join(filter(None, (f"sparsebench -m experiment=claims/{self.id}", self.give)))

    @property
    def cited(self) -> str:
        return f"{self.source['paper']}, {self.source['where']} ({SEEN[self.source['seen']]})"

    @property
    def timed(self) -> bool:
        return any(test["measure"] == "speedup" for test in self.tests)


@dataclass(frozen=True)
class Line:
    """What one model on one machine says about a claim."""

    claim: Claim
    verdict: str
    why: str = ""
    model: str = DASH
    size: int = 0  # parameters
    machine: str = DASH
    told: dict = field(default_factory=dict)  # settings that may tell lines of one model and machine apart
    setting: str = ""  # those that do, in words
    measured: str = DASH
    holds: str = ""  # what the errors hold
    sure: bool = False  # whether all errors are known
    differs: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def claims(folder: Any = None) -> list[Claim]:
    """Every claim, by the names of their files. folder: of the YAML files; None = those that are shipped."""
    folder = folder or files("sparsebench.conf") / "experiment" / "claims"
    sources = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [parsed(file.name.removesuffix(".yaml"), yaml.safe_load(file.read_text()).get("claim")) for file in sources]


def parsed(name: str, node: Any) -> Claim:
    """The claim of one file. Raises ValueError naming what is wrong with it."""
    known = {f.name for f in fields(Claim)} - {"id"}
    if not isinstance(node, dict) or not node.keys() <= known:
        extra = sorted(node.keys() - known) if isinstance(node, dict) else node
        raise ValueError(f"claims/{name}: claim must have the keys {', '.join(sorted(known))}, got {extra}")
    try:
        claim = Claim(name, **node)
    except TypeError as error:
        raise ValueError(f"claims/{name}: {error}") from error
    wrong = list(problems(claim))
    if wrong:
        raise ValueError(f"claims/{name}: {'; '.join(wrong)}")
    return claim


def problems(claim: Claim) -> Iterator[str]:
    """What is wrong with a claim's data."""
    if claim.source.keys() != {"paper", "where", "seen"} or claim.source.get("seen") not in SEEN:
        yield f"source must have paper, where, seen ({', '.join(SEEN)}), got {claim.source}"
    if not claim.tests and not claim.needs:
        yield "a claim without tests must say what it needs"
    for name, side in claim.sides.items():
        if not SIDE_KEYS >= side.keys() >= {"where"}:
            yield f"sides.{name} must have where, and may have vary and ignore, got {sorted(side)}"
    for test in claim.tests:
        if not TEST_KEYS >= test.keys() >= {"measure", "of"} or ("below" in test) == ("above" in test):
            yield f"a test has measure, of and either below or above; allowed: {', '.join(sorted(TEST_KEYS))}; got {test}"
            continue
        missing = {test["of"], test.get("than", "dense")} - claim.sides.keys() - {"dense"}
        if missing:
            yield f"tests name the side {', '.join(missing)}; there is {', '.join(claim.sides)}"
        if test.get("along", "sparsity") not in AXES:
            yield f"along must be one of {', '.join(AXES)}, got {test['along']}"


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


def decide(estimate: Estimate, test: dict) -> tuple[str, str]:
    """(verdict, why) of one test."""
    bound, sign = (test["below"], -1) if "below" in test else (test["above"], 1)
    margin = sign * (estimate.value - bound)
    if estimate.stderr is None:
        return OPEN, f"no standard error is known ({estimate.holds})"
    errors = estimate.needed(test.get("errors", ERRORS))
    if abs(margin) <= errors * estimate.stderr:
        return OPEN, f"within {errors:.1f} standard errors of the bound"
    return (REPRODUCED if margin > 0 else REFUTED), ""


def verdicts(rows: list[Row], given: list[Claim] | None = None) -> list[Line]:
    """At least one line for every claim, small models first.

    Runs whose error is not known give a line only where no other run of the claim on this model has one.
    """
    places = {timed: by_place(rows, timed) for timed in (False, True)}
    lines = []
    for claim in claims() if given is None else given:
        own = [verdict(claim, *pool) for pool in pools(claim, places[claim.timed])] if claim.tests else []
        tested = [each for each in own if each.verdict != UNTESTABLE]
        sure = {each.model for each in tested if each.sure}
        kept = [each for each in tested if each.sure or each.model not in sure] or own[:1] or [untested(claim)]
        lines += told_apart(sorted(kept, key=lambda each: (each.size, each.model, each.machine)))
    return lines


def untested(claim: Claim) -> Line:
    return Line(claim, UNTESTABLE, f"needs {claim.needs}" if claim.needs else "not run")


def verdict(claim: Claim, sides: dict[str, list[Row]], told: dict[str, Any]) -> Line:
    """The line of one pool of runs."""
    row = next(iter(sides.values()))[-1]
    stated = protocol(row)
    size = (row.record.get("model") or {}).get("num_parameters") or 0
    where = {"model": model_of(claim, row, size), "size": size, "machine": machine_of(row, claim.timed),
             "told": {} if claim.timed else {"windows": stated.get("sequences"), "method.prompt": stated.get("prompt_policy")}}  # fmt: skip
    where["told"] |= told
    try:
        estimates = [measured(claim, test, sides) for test in claim.tests]
    except Missing as reason:
        return Line(claim, UNTESTABLE, str(reason), **where)
    each = [decide(estimate, test) for estimate, test in zip(estimates, claim.tests, strict=True)]
    said = [v for v, _ in each]
    overall = REFUTED if REFUTED in said else OPEN if OPEN in said else REPRODUCED
    return Line(
        claim, overall, "; ".join(dict.fromkeys(why for v, why in each if v == overall and why)),
        measured="; ".join(shown_as(e, t, row.metric) for e, t in zip(estimates, claim.tests, strict=True)),
        holds="; ".join(dict.fromkeys(e.holds for e in estimates)), differs=tuple(differs(claim, sides)),
        sure=all(e.stderr is not None for e in estimates), **where,
    )  # fmt: skip


def model_of(claim: Claim, row: Row, size: int) -> str:
    """The model and its data in words."""
    config = row.record["config"]
    model, words = config["model"], []
    if 0 < size < TOY and model["name"] not in claim.setting.get("models", ()):
        words.append("toy")
    words += [f"{model['num_layers']} layers"] if model.get("num_layers") else []
    words += ["random weights"] if model.get("weights") == "random" else []
    return model["name"] + (f" ({', '.join(words)})" if words else "") + f" on {config['dataset']['name']}"


def told_apart(lines: list[Line]) -> list[Line]:
    """Lines of one model and machine are given the settings in which they differ."""
    named = []
    for each in lines:
        others = [other.told for other in lines if (other.model, other.machine) == (each.model, each.machine)]
        keys = [k for k in each.told if len({repr(told.get(k)) for told in others}) > 1]
        words = ", ".join(f"{k.removeprefix('method.')}={each.told[k]}" for k in keys)
        named.append(replace(each, setting=words))
    return named


def shown_as(estimate: Estimate, test: dict, metric: str | None) -> str:
    """The measured number in words: what of, what it is, its error."""
    plain = {"perplexity": "", "speedup": "x"}
    factor, unit = (1, plain[test["measure"]]) if test["measure"] in plain else (100, " %")
    change = "than" in test or " - " in test["measure"]
    if unit == " %" and change and test["measure"] != "loss":
        unit = " points"
    stderr = factor * estimate.stderr if estimate.stderr else None
    number = uncertain(factor * estimate.value, stderr, unit, "+" if change else "")
    return f"{subject(test, metric)}: {number}"


def subject(test: dict, metric: str | None = None) -> str:
    """What a test measures, in words."""
    name = test.get("name") or (f"{metric or 'quality'} loss" if test["measure"] == "loss" else test["measure"])
    than = f" over {test['than']}" if "than" in test else ""
    there = f" at {test['at']:.0%} {AXIS_WORDS[test['along']]}" if "at" in test else ""
    equal = f" at equal {EQUAL_WORDS[test['along']]}" if "along" in test and not there else ""
    return f"{name.replace('_', ' ')} of {test['of']}{than}{there}{equal}"


def differs(claim: Claim, sides: dict[str, list[Row]]) -> Iterator[str]:
    """What is not as in the paper: model, data, metric, machine, settings."""
    setting, row = claim.setting, next(iter(sides.values()))[-1]
    config = row.record["config"]
    if config["model"]["name"] not in setting.get("models", [config["model"]["name"]]):
        yield f"model instead of {', '.join(setting['models'])}"
    if "data" in setting:
        length = config["dataset"].get("sequence_length")
        yield f"data {config['dataset']['name']}{f' in windows of {length}' if length else ''} instead of {setting['data']}"
    if "metric" in setting:
        yield f"{row.metric} instead of {setting['metric']}"
    if claim.timed and "machine" in setting:
        yield f"machine instead of {setting['machine']}"
    configs = [each.settings for rows in sides.values() for each in rows]
    for key, value in setting.get("with", {}).items():
        others = sorted({str(c[key]) for c in configs if key in c and not same(c[key], value)})
        if others:
            yield f"{key.removeprefix('method.')}={', '.join(others)} instead of {value}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables and the page


HEAD = ["claim", "source", "verdict", "model", "machine", "measured", "the error holds", "what differs"]
NOTE = (
    "± is one standard error of the number before it. A loss is relative to what it is “over”, below 0 is better. Where a "
    "method's runs do not lie at the place asked for, they are interpolated, never beyond what was measured. A verdict "
    "needs 2 standard errors, or as many more as few seeds ask for (Student's t)."
)
GENERATED = (
    "<!-- Generated by scripts/make_docs_tables.py from outputs/reference and conf/experiment/claims. Don't edit. -->"
)
ABOUT = """What the papers of the methods here claim, and what the published records say about it, evaluated by a program: a
claim is a file of `conf/experiment/claims` that holds the claim, its source, a criterion as data, and the experiment that
tests it. To add one, add a file (`sparsebench/report/claims.py` says what stands in it). `sparsebench-report` prints the
same table about any records.

- **reproduced**, **not reproduced**: the measured number passes the bound, or fails it, by more than its error explains.
- **not decided**: it lies within its error, or no error is known, because there is one run whose record does not hold the
  losses of its parts (schema 1).
- **not testable here**: something is missing, which is said.

A model of less than 20 million parameters is called a toy, unless the paper is about it. What holds for a toy may not hold
for a model that people use, so each has a line of its own, and where they disagree both stand."""


def tested(rows: list[Row], given: list[Claim] | None = None) -> list[Line]:
    """The verdicts on those claims that these rows test."""
    return [each for each in verdicts(rows, given) if each.verdict != UNTESTABLE]


def counted(lines: list[Line]) -> str:
    """How many there are of each verdict."""
    said = {verdict: sum(each.verdict == verdict for each in lines) for verdict in (REPRODUCED, REFUTED, OPEN)}
    claims, settings = len({each.claim.id for each in lines}), len(lines)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in said.items() if count)
    return f"{claims} claim{'s' * (claims > 1)} tested in {settings} setting{'s' * (settings > 1)}: {counts}."


def table(lines: list[Line]) -> Table | None:
    """Verdicts, one to a line; None where there are none."""
    body = [
        [f"{each.claim.statement} ({each.claim.cited})", verdict,
         measured + (f" (the error holds: {holds})" if holds != DASH else ""), f"{model}; {machine}", differing_in]
        for each in lines for verdict, model, machine, measured, holds, differing_in in [cells(each)]
    ]  # fmt: skip
    head = ["claim", "verdict", "measured here", "model and machine", "what differs"]
    return Table(head, body, set(), set(), NOTE) if lines else None


def cells(line: Line) -> list[str]:
    return [line.verdict + (f": {line.why}" if line.why else ""), line.model + (f", {line.setting}" if line.setting else ""),
            line.machine, line.measured, line.holds or DASH, "; ".join(line.differs) or DASH]  # fmt: skip


def page(rows: list[Row], given: list[Claim] | None = None) -> str:
    """docs/claims.md: every claim with its verdicts, the criterion and the command."""
    by_claim: dict[str, list[Line]] = {}
    for each in verdicts(rows, given):
        by_claim.setdefault(each.claim.id, []).append(each)
    overview = [[f"[{mine[0].claim.statement}](#{name})", mine[0].claim.source["paper"], *in_short(mine)]
                for name, mine in by_claim.items()]  # fmt: skip
    parts = [GENERATED, "# Claims", ABOUT, "## In short",
             as_markdown(Table(["claim", "paper", "toys", "other models"], overview, set(), set()))]  # fmt: skip
    for name, mine in by_claim.items():
        parts += [f'<a id="{name}"></a>', *section(mine)]
    return "\n\n".join([*parts, NOTE]) + "\n"


def in_short(lines: list[Line]) -> tuple[str, str]:
    """The verdicts on toys and on other models."""
    tested = [each for each in lines if each.model != DASH] or lines
    sides: tuple[dict, dict] = {}, {}
    for each in tested:
        words = each.verdict if each.verdict != UNTESTABLE else f"{each.verdict}: {each.why}"
        sides["toy" not in each.model].setdefault(words, []).append(each.model.partition(" ")[0])
    return tuple("; ".join(w + (f" ({', '.join(dict.fromkeys(m))})" if m[0] != DASH else "") for w, m in side.items()) or DASH
                 for side in sides)  # fmt: skip


def section(lines: list[Line]) -> list[str]:
    """One claim in full."""
    claim = lines[0].claim
    tests = [f"{subject(test)} {'below' if 'below' in test else 'above'} {test.get('below', test.get('above')):g}"
             for test in claim.tests]  # fmt: skip
    facts = [
        f"- Source: {claim.cited}; method [{claim.method}](methods/{claim.method}.md).",
        f"- Published: {claim.published}.",
    ]
    facts += [f"- Criterion: {'; '.join(tests)}."] if tests else []
    facts += [f"- Command: `{claim.command}`."]
    if all(each.verdict == UNTESTABLE for each in lines):
        facts += [f"- {UNTESTABLE.capitalize()}: {lines[0].why}."]
        return [f"## {claim.statement}", "\n".join(facts)]
    return [
        f"## {claim.statement}",
        "\n".join(facts),
        as_markdown(Table(HEAD[2:], list(map(cells, lines)), set(), set())),
    ]
