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
    content = record.Record("ab" * 32, "m/t", {"seed": 0})
    content.bytes, content.macs = {"dense": 1e9, "sparse": 4e8}, {"dense": 5e8, "executed": 2e8}
    content.latency = {
        "device": "cpu",
        "decode": {"dense": {"median_ms": dense_ms}, "sparse": {"median_ms": sparse_ms}},
    }
    return content


def test_roofline_is_the_slower_of_bytes_and_arithmetic():
    assert estimate.roofline_ms(1e9, 0, 100.0, 1.0) == pytest.approx(10.0)  # 1 GB at 100 GB/s
    assert estimate.roofline_ms(0, 5e11, 100.0, 1.0) == pytest.approx(1000.0)  # 1 TFLOP at 1 TFLOP/s
    assert estimate.roofline_ms(1e9, 5e11, 100.0, 1.0) == pytest.approx(1000.0)


def test_each_step_keeps_its_own_efficiency():
    """Here 100 GB/s: dense took 20 ms for 10 (50 %), sparse 5 ms for 4 (80 %). There 1 and 0.4 ms at the peak."""
    record = estimate.predict(Target, a_record(20.0, 5.0), 100.0, 10.0)
    assert record["fitted_on"]["efficiency"] == pytest.approx({"dense": 0.5, "sparse": 0.8})
    assert record["decode"] == pytest.approx({"dense_ms": 2.0, "sparse_ms": 0.5, "speedup": 4.0})
    assert (
        "estimate" in record["label"]
        and len(estimate.predict(Target, a_record(5.0, 2.0), 100.0, 10.0)["cautions"]) == 3
    )


def test_the_local_ratio_is_called_so():
    """Both steps bound by reading here and there: whatever the target, the answer is the ratio measured here."""
    content = estimate.predict(Target, a_record(20.0, 5.0), 100.0, 10.0)
    assert content["equals_local_ratio"] and content["decode"]["speedup"] == pytest.approx(20 / 5)
    assert content["cautions"] == ["equals the local ratio: what bounds both steps here bounds both there"]

    class Slow(Target):
        peak_tflops = 0.5  # 1 GMAC takes 2 ms there and reading 1 ms: arithmetic bounds the dense step

    record = a_record(20.0, 5.0)
    record.macs["executed"] = 5e7  # 0.2 ms there: reading its 0.4 GB still bounds the sparse step
    other = estimate.predict(Slow, record, 100.0, 10.0)
    assert not other["equals_local_ratio"] and other["decode"]["speedup"] == pytest.approx(4.0 / 0.5)
    assert not other["cautions"]


def test_another_kind_of_device_is_flagged():
    class Other(Target):
        device = "cuda"

    actual = estimate.predict(Other, with_curve(Device(100.0, 3.0)), 100.0, 10.0)
    assert actual["cautions"][1].startswith("fitted on a cpu device for a cuda target")
    assert actual["equals_local_ratio"]  # a processor's fixed costs say nothing about a GPU's


class Device:
    """A made-up device: so many GB/s of which kernels reach 80 %, and a fixed cost per step."""

    def __init__(self, bandwidth_gbs, fixed_ms):
        self.bandwidth_gbs, self.fixed_ms = bandwidth_gbs, fixed_ms

    def ms(self, num_bytes):
        return self.fixed_ms + num_bytes / (0.8 * self.bandwidth_gbs) / 1e6


def with_curve(device: Device):
    """A record of a step of 1 GB dense and 0.4 GB sparse, timed on `device` at four sparsities in one engine."""
    record = a_record(device.ms(1e9), device.ms(4e8))
    points = [
        {"sparsity": s, "bytes": 1e9 * (1 - s), "median_ms": device.ms(1e9 * (1 - s))} for s in (0, 0.2, 0.4, 0.6)
    ]
    record.latency["decode"] |= {
        "dense_engine": "fused", "sparse_engine": "fused", "sparsity": 0.6, "break_even": {"points": points},
    }  # fmt: skip
    return record


def test_predicts_a_device_it_was_not_fitted_on():
    """Ten times the bandwidth, the same fixed cost: the step's times there come out, and so does another speed-up."""
    here, there = Device(100.0, 3.0), Device(1000.0, 3.0)
    actual = estimate.predict(Target, with_curve(here), 100.0, 10.0)
    dense, sparse = there.ms(1e9), there.ms(4e8)
    assert actual["decode"] == pytest.approx({"dense_ms": dense, "sparse_ms": sparse, "speedup": dense / sparse})
    assert actual["basis"]["fixed_ms"] == pytest.approx({"dense": 3.0, "sparse": 3.0})
    assert actual["basis"]["kernel_bandwidth_gbs"] == pytest.approx(80.0)
    assert not actual["equals_local_ratio"] and not actual["cautions"]
    assert here.ms(1e9) / here.ms(4e8) - actual["decode"]["speedup"] > 0.3  # the local ratio would be wrong by this


def test_no_step_is_faster_than_its_arithmetic():
    class Slow(Target):
        peak_tflops = 0.1

    actual = estimate.predict(Slow, with_curve(Device(100.0, 3.0)), 100.0, 10.0)
    assert actual["decode"]["dense_ms"] == pytest.approx(2 * 5e8 / 0.1e12 * 1e3)


def test_the_line_through_the_points():
    def points(*pairs):
        return [{"bytes": b * 1e6, "median_ms": ms} for b, ms in pairs]

    assert estimate.line(points((10, 3.0), (20, 4.0), (30, 5.0))) == pytest.approx((2.0, 10.0))
    assert estimate.line(points((10, 3.0), (20, 4.0))) is None  # two points say nothing about a third
    assert estimate.line(points((10, 5.0), (20, 4.0), (30, 3.0))) is None  # more bytes, less time: noise
    fixed, bandwidth = estimate.line(points((10, 0.5), (20, 2.0), (30, 3.5)))
    assert fixed == 0 and bandwidth > 0  # never a negative cost


def test_another_engines_fixed_cost_is_not_taken_for_the_dense_steps():
    record = with_curve(Device(100.0, 3.0))
    record.latency["decode"]["dense_engine"] = "eager"
    content = estimate.predict(Target, record, 100.0, 10.0)
    assert content["basis"]["fixed_ms"]["dense"] == 0
    assert content["decode"]["dense_ms"] == pytest.approx(Device(100.0, 3.0).ms(1e9) / 10)


def test_no_decode_step_is_an_error():
    record = a_record(1.0, 1.0)
    record.latency = None
    with pytest.raises(ValueError, match="needs a measured decode step"):
        estimate.predict(Target, record, 1.0, 1.0)


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


def test_a_run_labels_its_estimate(forked, model_folder, text_file, tmp_path):
    process = forked(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}",
        "dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8", "measure.context=8",
        "measure.prompt=8", "measure.samples=30", "measure.warmup=3", "wandb.mode=disabled", "hardware.threads=1",
        "hardware=arm-phone", "hardware.estimate=true",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    content = record_of(process, tmp_path)
    jsonschema.validate(content, json.loads(record.SCHEMA_FILE.read_text()))
    assert content["estimate"]["target"] == "arm-phone" and "not a measurement" in content["estimate"]["label"]
    assert content["latency"]["device"] == "cpu" and content["env"]["cpu"] == content["estimate"]["fitted_on"]["device"]
    (line,) = [line for line in process.stdout.splitlines() if "arm-phone" in line and "(ms)" in line]
    assert "ESTIMATE" in line and "estimated" in line and "~" in line
