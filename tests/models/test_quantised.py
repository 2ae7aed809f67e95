"""Models rounded after loading, through methods and whole runs: what is calibrated is what is run."""

import pytest

from sparsebench import config, runner
from sparsebench.calibration.histograms import observe
from sparsebench.config.compose import compose_all
from sparsebench.measure import sparsity
from sparsebench.models import Loaded
from sparsebench.models.quantised import quantise
from sparsebench.modules.quant_sparse import QuantSparseLinear
from sparsebench.records import record as records
from sparsebench.records import state
from sparsebench.records.record import Record
from sparsebench.records.terminal import table
from sparsebench.sites import find_blocks
from tests.helpers import built, tiny_model, work


def quantised_model(kind):
    model = tiny_model()
    return Loaded(model, None, {"quantisation": quantise(model, kind, 32, "input", "masked_dense")})


@pytest.mark.parametrize("name", ["teal", "wina_plain"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_thresholds_of_the_quantised_model_drop_what_was_asked_for(name, kind, data, tmp_path):
    """Check 9, first half: the realised share on the calibration text is within a point of the target."""
    method, loaded = built("method", f"method={name}", sparsity=0.5), quantised_model(kind)
    fitted = method.fit(loaded, data, work(tmp_path))
    dense = {s.path: 0 for b in find_blocks(loaded.module) for s in b.sites.values()}
    module = method.apply(loaded.module, fitted, work(tmp_path))
    maps = {path: module.get_submodule(path) for path in dense}
    assert all(isinstance(m, QuantSparseLinear) for m in maps.values())
    if name == "teal":
        shares = {}
        plain = quantised_model(kind).module
        limits = {path: float(m.threshold) for path, m in maps.items()}
        observers = {
            path: lambda x, path=path: shares.setdefault(path, []).append(
                float((x.abs() <= limits[path]).float().mean())
            )
            for path in maps
        }
        observe(plain, data.fit.sequences(), observers, 64)
        assert all(abs(sum(s) / len(s) - 0.5) < 0.01 for s in shares.values()) and len(shares) == 14
    with sparsity.counting(module) as counters:
        module(input_ids=data.test.rows[:4])
    measured = sparsity.summarise(module, counters)
    assert all(0.3 < site.sparsity < 0.7 for site in measured.values())


def test_thresholds_of_other_weights_are_refused():
    """Check 9, second half: a state carries how its weights were stored."""
    int4, int8 = ({"bits": b, "group": g, "axis": "inputs"} for b, g in ((4, 128), (8, None)))
    for fitted, present in ((None, int4), (int4, None), (int8, int4), (int4 | {"group": 64}, int4)):
        held = state.State(info={} if fitted is None else {"quantisation": fitted})
        model = {} if present is None else {"quantisation": present}
        with pytest.raises(ValueError, match="thresholds of .* don't serve") as caught:
            state.check_quantisation(held, model)
        assert "\n" not in str(caught.value)
    state.check_quantisation(state.State(info={"quantisation": int4}), {"quantisation": int4})
    state.check_quantisation(state.State(), {})


def settings(text_file, model_folder, tmp_path, *more):
    return compose_all([
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}",
        "dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8", "hardware=cpu",
        "hardware.threads=1", f"output_dir={tmp_path}", "model.quantize=int4", "model.quantize_group=32", *more,
    ])[0]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method=cats"], "method=cats does not run on quantised weights: model.quantize must be none, got int4"),
        (["method=wina"], "method.rotate must be false with model.quantize=int4"),
        (["model.quantize=keep"], "model.quantize=keep: .*is no GGUF file"),
        (["model.quantize=int3"], "model.quantize must be one of none, int8, int4, keep"),
        (["model.quantize_group=0"], "model.quantize_group must be"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(more, message, text_file, model_folder, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        config.build_settings(settings(text_file, model_folder, tmp_path, *more))


def run(configuration, tmp_path):
    record = Record("0" * 64, "quantised", configuration)
    runner.timed_run(configuration, record, tmp_path, lambda row: None)
    record.status = "finished"
    records.write(record, tmp_path / "result.json")
    content, problem = records.read_any(tmp_path / "result.json")
    assert problem is None, problem
    return content


def test_a_run_has_four_corners(text_file, model_folder, tmp_path):
    """Quality of four models on the same windows; the dense figures of the run are those of the quantised model."""
    content = run(settings(text_file, model_folder, tmp_path, "measure.latency=false"), tmp_path)
    nll = content["quality"]["nll"]
    corners = nll["corners"]
    four = corners["nll"]
    assert four["quantised"] == nll["dense"] and four["sparse_quantised"] == nll["sparse"]
    assert len(set(four.values())) == 4
    total = four["sparse_quantised"] - four["quantised"] - four["sparse"] + four["dense"]
    assert corners["interaction"] == pytest.approx(total) and corners["interaction_stderr"] > 0
    memory, about = content["memory"], content["model"]["quantisation"]
    assert memory["dense_weight_bytes"] < memory["unquantised_weight_bytes"] and about["bits"] == 4
    assert content["bytes"]["sparse"] < content["bytes"]["dense"]
    states = sorted((tmp_path / "states").glob("*.safetensors"))
    infos = [state.load(path)[0].info for path in states]
    assert sorted("quantisation" in info for info in infos) == [False, True]
    rows = [str(cell) for cell in table(content).columns[0].cells]
    assert any("not quantised" in row for row in rows) and any("interaction" in row for row in rows)
    again = settings(
        text_file, model_folder, tmp_path, "measure.latency=false", "model.quantize=int8", "method.sparsity=0.4"
    )
    run(again, tmp_path)
    assert len(list((tmp_path / "states").glob("*.safetensors"))) == 3  # the unquantised fit is shared


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_timed_run_has_the_dense_figure_of_before_beside_it(kind, text_file, model_folder, tmp_path):
    more = (
        f"model.quantize={kind}",
        "measure.context=16",
        "measure.prompt=8",
        "measure.samples=30",
        "measure.warmup=3",
    )
    content = run(settings(text_file, model_folder, tmp_path, *more), tmp_path)
    decode = content["latency"]["decode"]
    assert decode["sparse_engine"] == "fused" and content["latency"]["kernel"] == "cpu_packed" and decode["speedup"] > 0
    assert {"dense/eager", "dense/fused", "dense/eager, torch's products"} <= {*decode["engines"]}
    assert decode["unquantised"]["engine"] in ("eager", "fused") and decode["unquantised"]["dtype"] == "float32"
    assert not any(name.startswith("unquantised") for name in decode["engines"])
