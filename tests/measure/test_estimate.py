"""Estimates: the arithmetic by hand, agreement with a device that behaves like its peaks, the label wherever it is shown."""

import json

import jsonschema
import pytest
import torch

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.measure import estimate
from sparsebench.records import machine, record
from tests.helpers import record_of

TARGETS = ("a100", "a6000", "h100", "h200", "rtx4090", "arm-phone", "cpu-2core")


class Target:
    name, device, peak_bandwidth_gbs, peak_tflops = "there", "cpu", 1000.0, 10.0


def a_record(dense_ms, sparse_ms):
    found = record.Record("ab" * 32, "m/t", {"seed": 0})
    found.bytes, found.macs = {"dense": 1e9, "sparse": 4e8}, {"dense": 5e8, "executed": 2e8}
    found.latency = {"device": "cpu", "decode": {"dense": {"median_ms": dense_ms}, "sparse": {"median_ms": sparse_ms}}}
    return found


def test_roofline_is_the_slower_of_bytes_and_arithmetic():
    assert estimate.roofline_ms(1e9, 0, 100.0, 1.0) == pytest.approx(10.0)  # 1 GB at 100 GB/s
    assert estimate.roofline_ms(0, 5e11, 100.0, 1.0) == pytest.approx(1000.0)  # 1 TFLOP at 1 TFLOP/s
    assert estimate.roofline_ms(1e9, 5e11, 100.0, 1.0) == pytest.approx(1000.0)


def test_each_step_keeps_its_own_efficiency():
    """Here 100 GB/s: dense took 20 ms for 10 (50 %), sparse 5 ms for 4 (80 %). There 1 and 0.4 ms at the peak."""
    found = estimate.predict(Target, a_record(20.0, 5.0), 100.0, 10.0)
    assert found["fitted_on"]["efficiency"] == pytest.approx({"dense": 0.5, "sparse": 0.8})
    assert found["decode"] == pytest.approx({"dense_ms": 2.0, "sparse_ms": 0.5, "speedup": 4.0})
    assert "estimate" in found["label"] and not found["cautions"]
    assert len(estimate.predict(Target, a_record(5.0, 2.0), 100.0, 10.0)["cautions"]) == 2  # faster than memory


def test_another_kind_of_device_is_flagged():
    class Other(Target):
        device = "cuda"

    (caution,) = estimate.predict(Other, a_record(20.0, 5.0), 100.0, 10.0)["cautions"]
    assert caution.startswith("fitted on a cpu device for a cuda target")


def test_predicts_a_device_it_was_not_fitted_on():
    """Two made-up devices of equal efficiency and different peaks: the one gives the other's time exactly."""
    fast = estimate.predict(Target, a_record(12.5, 5.0), 100.0, 10.0)  # 80 % of 100 GB/s
    assert fast["decode"]["dense_ms"] == pytest.approx(1e9 / (0.8 * 1000e9) * 1e3)


def test_no_decode_step_is_an_error():
    found = a_record(1.0, 1.0)
    found.latency = None
    with pytest.raises(ValueError, match="needs a measured decode step"):
        estimate.predict(Target, found, 1.0, 1.0)


def test_rates_of_this_machine_are_plausible():
    bandwidth, arithmetic = estimate.rates(torch.device("cpu"), torch.float32)
    assert 0.5 < bandwidth < 2000 and 0.001 < arithmetic < 50


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_can_be_estimated_anywhere(name, monkeypatch):
    monkeypatch.setattr(machine, "gpu_names", list)
    settings = config.build_settings(compose_all([f"hardware={name}", "hardware.estimate=true"])[0])
    assert settings.hardware.present_device == "cpu"


def test_what_can_not_be_estimated_is_said(monkeypatch):
    monkeypatch.setattr(machine, "gpu_names", list)

    def problems(*overrides):
        with pytest.raises(config.ConfigError) as error:
            config.build_settings(compose_all(list(overrides))[0])
        return error.value.problems

    assert "hardware=h200 needs a device named" in " ".join(problems("hardware=h200", "hardware.device=auto"))
    assert problems("hardware=cpu", "hardware.estimate=true") == [
        "hardware.estimate=true needs hardware.peak_bandwidth_gbs and hardware.peak_tflops, which cpu leaves null"
    ]
    (line,) = problems("hardware=h200", "hardware.estimate=true", "measure.latency=false")
    assert line.startswith("hardware.estimate=true needs a run with measure.latency=true")


def test_a_run_labels_its_estimate(sparsebench, model_folder, text_file, tmp_path):
    process = sparsebench(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}",
        "dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8", "measure.context=8",
        "measure.prompt=8", "measure.samples=30", "measure.warmup=3", "wandb.mode=disabled", "hardware.threads=1",
        "hardware=arm-phone", "hardware.estimate=true",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = record_of(process, tmp_path)
    jsonschema.validate(found, json.loads(record.SCHEMA_FILE.read_text()))
    assert found["estimate"]["target"] == "arm-phone" and "not a measurement" in found["estimate"]["label"]
    assert found["latency"]["device"] == "cpu" and found["env"]["cpu"] == found["estimate"]["fitted_on"]["device"]
    (line,) = [line for line in process.stdout.splitlines() if "arm-phone" in line and "(ms)" in line]
    assert "ESTIMATE" in line and "estimated" in line and "~" in line
