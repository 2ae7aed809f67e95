"""sparsebench-bench: the command writes record, table and plot of real times; wrong keys end it before anything is timed."""

import json

import pytest

from sparsebench import bench
from sparsebench.bench import experts, output
from tests.helpers import built


def test_the_command_times_products_blocks_and_steps(forked, tmp_path):
    done = forked(
        "model=llama-tiny", "hardware=cpu", "hardware.threads=1", "parts=[projections,ffn,step]", "sparsities=[0.0,0.9]",
        "contexts=[16]", f"output={tmp_path}", main=bench.main,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    actual = json.loads((tmp_path / "result.json").read_text())
    assert actual["kind"] == "bench" and actual["weights"] == "random" and actual["read_bandwidth_gbs"] > 0
    for part in ("projections", "ffn", "step"):
        assert actual[part], part
    assert (tmp_path / "speedup.png").stat().st_size > 1000
    table = (tmp_path / "table.md").read_text()
    assert "random weights" in table and "Whole decode step" in table and table in done.stdout


@pytest.mark.parametrize(
    "override, message",
    [
        ("samples=3", "samples must be a whole number >= 30, got 3"),
        ("model=lenet5", "model must be a language model, got lenet5"),
        ("histograms=/nowhere", "histograms must be a folder"),
        ("parts=[]", "parts must name something, got []"),
        ("model.num_layers=1000", "model.num_layers must be at most 32 for llama2-7b, got 1000"),
    ],
)
def test_wrong_settings_end_it_at_once(override, message, forked, tmp_path):
    done = forked(override, "hardware=cpu", f"output={tmp_path / 'out'}", main=bench.main)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_expert_times_are_of_the_share_that_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(experts, "ROTATED_BYTES", 1)

    class Settings:
        hardware = built("hardware", "hardware=cpu", "hardware.threads=1", "hardware.dtype=float32")
        seed, samples, warmup = 0, 30, 3

    for shape in (
        {"tokens": 40, "d": 32, "experts": 8, "size": 4, "activation": "relu", "gated": False, "width": 8},
        {"tokens": 1, "d": 32, "experts": 8, "size": 4, "activation": "silu", "gated": True, "width": None},
    ):
        actual = experts.time_shape("small", shape, Settings)
        for row in actual["rows"]:
            assert row["measured"] == pytest.approx(row["executed"], abs=1e-6)
            assert row["relative_error"] < 1e-5
            assert row["speedup"] == pytest.approx(
                actual["times"][actual["dense"]]["median_us"]
                / actual["times"][f"experts@{row['executed']}"]["median_us"]
            )
        assert "Expert FFN" in "\n".join(output.expert_lines([actual]))
