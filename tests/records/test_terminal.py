"""What a person sees of a record: spread beside medians, the dense engine by name, nothing that was not measured."""

import io
import json
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from sparsebench.records import record as records
from sparsebench.records import terminal, tracking
from tests.helpers import EVIL_TEXT, made, variants


def times(median, low, high):
    return {"median_ms": median, "p10_ms": low, "p90_ms": high, "samples_ms": [median] * 30}


def record_with(noisy=False, executed=50, memory=None, **decode) -> dict:
    """A finished record with all that the table reads."""
    record = made()
    dense, sparse = times(1.0, 0.9, 1.2), times(0.5, 0.4, 0.6)
    record["macs"] |= {"executed": executed, "overhead": 0}
    record["latency"] = {
        "kernel": "cpu_numba", "device": "cpu", "noisy": noisy, "reasons": ["load average 7.0 on 2 cores"] if noisy else [],
        "decode": {
            "dense": dense, "sparse": sparse, "dense_engine": "fused", "sparse_engine": "eager", "context": 128,
            "engines": {"dense/fused": dense, "dense/eager": times(3.0, 2.9, 3.1), "sparse/eager": sparse},
            "refused": {"compiled": "no compiler"}, "speedup": 2.0, "speedup_p10": 1.5, "speedup_p90": 2.5,
            "break_even": {"sparsity": 0.21, "p10": 0.15, "p90": None, "reason": None, "points": []}, **decode,
        },
        "prefill": {"dense": dense, "sparse": sparse, "tokens": 128, "kernel": "masked_dense"},
    }  # fmt: skip
    record["memory"] = {"weight_bytes": 100, "dense_weight_bytes": 200, "peak_bytes": 7e9, "peak_of": "process"}
    record["memory"] |= memory or {}
    return record


def lines(values: dict) -> list[str]:
    page = io.StringIO()
    Console(file=page, width=220).print(terminal.table(values))
    return page.getvalue().splitlines()


def line(values: dict, word: str) -> str:
    return next(each for each in lines(values) if word in each)


def test_energy_and_the_bytes_limit_stand_where_they_were_measured():
    record = record_with()
    assert not any("energy" in each or "limit" in each for each in lines(record))
    nothing = {"dense": None, "sparse": None, "per": "token", "source": None, "reason": "no counter"}
    record["latency"] |= {"energy": nothing}
    assert not any("energy" in each for each in lines(record))
    both = {"dense": {"joules": 0.02}, "sparse": {"joules": 0.013}}
    record["latency"]["energy"] = {**both, "per": "token", "source": "NVML, the whole card"}
    record["latency"]["limit"] = {"share": {"dense": 0.81, "sparse": 1.2}, "speedup": 2.5}
    energy, limit = line(record, "energy per token, NVML"), line(record, "of the bytes limit")
    assert "20 mJ" in energy and "13 mJ" in energy and "0.650x" in energy
    assert "81.00%" in limit and "120.00% (cached)" in limit and "the bytes allow 2.50x" in limit


def test_medians_stand_with_their_spread_and_the_dense_engine_by_name():
    record = record_with()
    decode = line(record, "decode, context 128")
    assert "1.000" in decode and "0.500" in decode and "speed-up 2.00x" in decode
    below = lines(record)[lines(record).index(decode) + 1]
    assert "0.900 - 1.200" in below and "0.400 - 0.600" in below and "1.50 - 2.50x" in below
    engine = line(record, "dense engine")
    assert "fused" in engine and "eager 3.000" in engine and "no compiled" in engine
    assert "21%" in line(record, "break-even") and "15% - not reached" in line(record, "break-even")


def test_no_break_even_is_said_with_its_reason():
    section = {
        "sparsity": None,
        "p10": None,
        "p90": None,
        "reason": "needs three measured sparsities, got 2",
        "points": [],
    }
    record = record_with(break_even=section)
    assert "none" in line(record, "break-even")
    assert terminal.notes(record) == ["no break-even: needs three measured sparsities, got 2"]


def test_noise_is_one_line_and_goes_into_the_line_of_json():
    assert terminal.notes(record_with()) == []
    (marked,) = terminal.notes(record_with(noisy=True))
    assert marked == "NOISY, times are not to be trusted: load average 7.0 on 2 cores"
    content = json.loads(terminal.headline(record_with(noisy=True), Path("x")))
    assert content["noisy"] is True and content["dense_engine"] == "fused" and content["decode_speedup"] == 2.0
    assert content["decode_dense_ms"] == {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.2}
    assert content["decode_sparse_ms"] == {"median_ms": 0.5, "p10_ms": 0.4, "p90_ms": 0.6}


def test_nothing_executed_where_nothing_was_timed():
    record = record_with(executed=None) | {"latency": None}
    assert "not timed" in line(record, "MACs executed")
    content = json.loads(terminal.headline(record, Path("x")))
    assert content["decode_speedup"] is None and content["decode_dense_ms"] is None and content["noisy"] is None


def test_the_processs_peak_stands_in_no_column_of_a_model():
    cells = [cell.strip() for cell in line(record_with(), "peak of the process").split("\u2502")[1:-1]]
    assert "7 GB" in cells[0] and not any(cells[1:])
    shown = line(record_with(memory={"peaks": {"prefill": {"dense": 4e9, "sparse": 2e9}}}), "peak memory, prefill")
    assert "4 GB" in shown and "2 GB" in shown and "0.500x" in shown


def test_wandb_names_the_dense_engine_and_the_noise():
    flat = tracking.summary(record_with(noisy=True))
    assert flat["latency/decode/dense_engine"] == "fused" and flat["latency/noisy"] is True
    assert flat["latency/decode/dense/p90_ms"] == 1.2 and flat["latency/decode/speedup_p10"] == 1.5


def whole_record() -> dict:
    """A record with every key that the schema asks for."""
    record = record_with(memory={"peaks": {"decode": {"dense": 4e9, "sparse": 2e9}}})
    record["config_hash"] = "ab" * 32
    record["env"] |= {"gpus": [], "versions": {}}
    record["model"] |= {"name": "llama-tiny", "num_parameters": 10}
    record["dataset"] |= {"name": "d", "fit": {}, "dev": {}, "disjoint": True}
    record["fit"] |= {"kind": "calibrated", "tokens": 1, "cached": False, "state_sha256": None}
    errors = dict.fromkeys(("dense_stderr", "sparse_stderr", "ratio_stderr", "difference_stderr"), 0.01)
    sizes = {
        "ratio": 1.2,
        "clusters": {"windows": 4, "documents": 2},
        "tokens": 100,
        "little_text": False,
        "losses": {},
    }
    record["quality"]["perplexity"] |= errors | sizes
    record["sparsity"] |= {
        "sparse_token_fraction": 1.0,
        "baseline": {"model_wide": 0.1, "per_site": {}},
        "more": {"model_wide": "again"},
    }
    record["macs"] |= {"unit": "MACs", "scored": {"dense": 9, "sparse": 4, "unit": "MACs"}}
    record["latency"] |= {"compile_seconds": 0, "warmup_seconds": 0}
    record["estimate"] = {"label": "estimate", "target": "h200", "target_peaks": {}, "fitted_on": {"device": "cpu"}, "cautions": ["old"],
                          "decode": {"dense_ms": 5.0, "sparse_ms": 2.5, "speedup": 2.0}}  # fmt: skip
    return record


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_record_is_refused_or_shown(tmp_path, capsys, count):
    """Before: 42 of 76 such records ended in a traceback. What is accepted fits the schema by jsonschema's account, too."""
    file, shown = tmp_path / "result.json", 0
    check = jsonschema.Draft202012Validator(json.loads(records.SCHEMA_FILE.read_text()))
    assert check.is_valid(whole_record())
    for said, text in variants(whole_record(), count):
        file.write_bytes(text)
        content, problem = records.read_any(file)
        if problem is None:
            assert check.is_valid(content), said
            terminal.show(content, file)
            shown += 1
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == content["status"], said
        else:
            assert "\n" not in problem and problem
    assert count / 10 < shown < count * 4 / 5


@pytest.mark.parametrize("text", EVIL_TEXT)
def test_text_of_a_record_is_no_markup(text, tmp_path, capsys):
    """`[/x]` in a name was an error of rich, `[red]` vanished, an escape code reached the terminal."""
    terminal.show(whole_record() | {"name": f"a{text[:60]}b", "status": "finished"}, tmp_path / "result.json")
    out = capsys.readouterr().out
    assert not {c for c in out if c != "\n" and ord(c) < 32} and "\u202e" not in out and "\ud800" not in out
    if text.isprintable():
        assert f"a{text[:60]}b" in out


def test_the_table_marks_noise_beside_the_speed_up():
    assert "speed-up 2.00x NOISY" in line(record_with(noisy=True), "decode, context 128")
    assert "NOISY" not in line(record_with(), "decode, context 128")


def test_accuracy_of_a_task_is_said_in_points():
    record = record_with()
    record["quality"] |= {
        "piqa/acc": {"dense": 0.75, "sparse": 0.70, "dense_stderr": 0.01, "sparse_stderr": 0.01, "difference_stderr": 0.02,
                     "higher_is_better": True},
        "boolq/acc": {"dense": 0.5, "sparse": 0.5, "higher_is_better": True},
    }  # fmt: skip
    assert "-5 ± 2 points" in line(record, "piqa/acc") and "0.93" not in line(record, "piqa/acc")
    assert "+0.00 points" in line(record, "boolq/acc")
    assert "1.200x" in line(record, "perplexity")


def test_a_finished_run_says_what_to_do_next(capsys):
    terminal.show(record_with(), Path("my outputs/llama-tiny/teal/0123456789/result.json"))
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[-2].startswith("next: sparsebench-report 'my outputs'")
        and json.loads(printed[-1])["status"] == "finished"
    )


def test_a_model_that_ships_with_the_package_is_called_a_toy():
    model = {"source": "builtin:llama-tiny", "num_parameters": 3_673_000}
    assert (
        terminal.toy(model).startswith(" (a toy of 3.67 M parameters") and terminal.toy({"source": "/models/x"}) == ""
    )
