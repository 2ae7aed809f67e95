"""sparsebench.run and sparsebench.load: a finished run's folder, wherever it lies, gives back the very same sparse model."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch

import sparsebench
from sparsebench import config
from sparsebench.measure import quality
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.records import record, state
from sparsebench.report import page, rows
from tests.helpers import laid, made, record_of, tiny_model, tiny_tokenizer

SMALL = ("dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8",
         "measure.latency=false", "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1")  # fmt: skip


@pytest.fixture(scope="module")
def finished(model_folder, text_file, tmp_path_factory):
    """(record, folder) of one run made through the Python API."""
    root = tmp_path_factory.mktemp("api")
    overrides = ["model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL]
    actual = sparsebench.run([*overrides, f"output_dir={root}/outputs"])
    return actual, next((root / "outputs").glob("*/teal/*")), overrides


def test_run_returns_the_record_of_the_command(finished):
    record, folder, overrides = finished
    assert record == json.loads((folder / "result.json").read_text()) and record["status"] == "finished"
    again = sparsebench.run([*overrides, f"output_dir={folder.parents[2]}"])
    assert again["started_at"] == record["started_at"]  # answered from the record


def test_run_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"method.sparsity must be a number in \[0, 1\), got 2"):
        sparsebench.run(["method.sparsity=2"])


def test_run_that_fails_raises_with_its_record(finished, forked, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsebench.api.subprocess.run", lambda command, **options: forked(*command[3:]))
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    overrides = [o for o in finished[2] if not o.startswith("model.path")]
    with pytest.raises(sparsebench.RunFailed, match="not finite") as error:
        sparsebench.run([*overrides, f"model.path={tmp_path}/m", f"output_dir={tmp_path}/o"])
    assert error.value.record["status"] == "failed"


def test_loaded_model_is_the_one_that_was_scored(finished, text_file):
    record, folder, _ = finished
    module = sparsebench.load(folder)
    settings = config.build(record["config"]["dataset"], "dataset", [])
    text = settings.load(0)
    text.set_tokenizer(module.tokenizer)
    scored, _ = quality.language_quality(module, text.test, 8, 8)
    assert scored["perplexity"] == pytest.approx(record["quality"]["perplexity"]["sparse"], rel=1e-6)


def test_loaded_model_generates_with_the_fast_kernel(finished):
    module = sparsebench.load(finished[1] / "result.json")
    kernels = {m.kernel_name for m in module.modules() if isinstance(m, InputSparseLinear)}
    assert kernels == {"cpu_numba"}
    ids = module.tokenizer("Paragraph 3. word", return_tensors="pt")["input_ids"]
    written = module.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for m in module.modules():
        if isinstance(m, InputSparseLinear):
            m.kernel_name = "masked_dense"
    assert torch.equal(written, module.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert written.shape[1] == ids.shape[1] + 6


def test_the_folder_alone_is_the_artifact(finished, tmp_path):
    folder = finished[1]
    assert {"result.json", state.FILE} <= {p.name for p in folder.iterdir()}
    shutil.copytree(folder, tmp_path / "elsewhere")
    here, there = sparsebench.load(folder), sparsebench.load(tmp_path / "elsewhere")
    ids = torch.arange(12)[None]
    assert torch.equal(here(input_ids=ids).logits, there(input_ids=ids).logits)


def changed(folder, target, **changes):
    """A copy of a run's folder with other entries in its record's config."""
    shutil.copytree(folder, target)
    content = json.loads((folder / "result.json").read_text())
    for key, value in changes.items():
        group, _, name = key.partition("__")
        content["config"][group][name] = value
    (target / "result.json").write_text(json.dumps(content))
    return target


def test_load_refuses_what_it_should(finished, tmp_path):
    folder = finished[1]
    with pytest.raises(ValueError, match="can't be loaded: there is no such file"):
        sparsebench.load(tmp_path)
    with pytest.raises(ValueError, match="not part of sparsebench: import it first"):
        sparsebench.load(changed(folder, tmp_path / "a", method___target_="evil_package.Method"))
    with pytest.raises(ValueError, match=r"trust_remote_code is set in the record"):
        sparsebench.load(changed(folder, tmp_path / "b", model__trust_remote_code=True))
    with pytest.raises(ValueError, match=r"hardware must be one of .*, got 'h999'"):
        sparsebench.load(folder, hardware="h999")
    damaged = changed(folder, tmp_path / "c")
    (damaged / state.FILE).write_bytes(b"junk")
    with pytest.raises(ValueError, match="is damaged .* run with force=true"):
        sparsebench.load(damaged)


def test_nothing_of_a_strangers_folder_is_imported(tmp_path, monkeypatch):
    """Not by a `_target_` anywhere in a record's config, be the module importable or not; nor by the report."""
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Method: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for nested in (
        {"_target_": "stranger.Method"},
        {"part": {"_target_": "stranger.Method"}},
        {"p": [{"_target_": "stranger.M"}]},
    ):
        with pytest.raises(ValueError, match=r"method\..*_target_ is in stranger, which is not part of sparsebench"):
            sparsebench.api.check_trusted({"method": nested}, True)
    content = made()
    content["config"]["method"]["_target_"] = "stranger.Method"
    page.write(rows.collect([laid(tmp_path, content)]), tmp_path / "report", "t")
    assert not (tmp_path / "ran").exists() and "stranger" not in sys.modules


def test_a_target_that_is_absent_loads_on_this_machine(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsebench.records.machine.gpu_names", list)
    target = changed(finished[1], tmp_path / "d", hardware__device="cuda", hardware__requires="H200")
    assert next(sparsebench.load(target).parameters()).device.type == "cpu"


def test_keep_replaces_an_older_state(tmp_path):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    state.write(state.State({"a": torch.zeros(2)}), first)
    state.write(state.State({"a": torch.ones(2)}), second)
    state.keep(first, tmp_path)
    state.keep(first, tmp_path)
    assert torch.equal(state.read(tmp_path / state.FILE).tensors["a"], torch.zeros(2))
    state.keep(second, tmp_path)
    assert torch.equal(state.read(tmp_path / state.FILE).tensors["a"], torch.ones(2))
    assert not list(tmp_path.glob(".*partial")) and record.read(tmp_path / state.FILE) is None


def test_load_tells_what_is_wrong_with_a_folder(finished, tmp_path):
    """A path that is not there, another schema, a failed run, a damaged state and that of another run: each its line."""
    _, folder, _ = finished
    with pytest.raises(ValueError, match=r"nowhere can't be loaded: there is no such file"):
        sparsebench.load(tmp_path / "nowhere")

    def variant(name, change):
        shutil.copytree(folder, tmp_path / name)
        content = json.loads((folder / "result.json").read_text())
        change(content)
        (tmp_path / name / "result.json").write_text(json.dumps(content))
        return tmp_path / name

    with pytest.raises(ValueError, match="schema 1, this version reads 2"):
        sparsebench.load(variant("old", lambda r: r.update(schema_version=1)))
    with pytest.raises(ValueError, match="does not fit schema 2: quality"):
        sparsebench.load(variant("odd", lambda r: r["quality"].update(perplexity={"dense": 1})))
    with pytest.raises(ValueError, match="is of a run that failed, not of a finished one"):
        sparsebench.load(variant("failed", lambda r: r.update(status="failed")))
    with pytest.raises(ValueError, match="can't be loaded: it has no fit"):
        sparsebench.load(variant("part", lambda r: r.update(fit=None)))
    with pytest.raises(ValueError, match="can't be loaded: it has no seed in its config"):
        sparsebench.load(variant("seedless", lambda r: r["config"].update(seed="x")))
    flipped = variant("flipped", lambda r: None) / state.FILE
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(ValueError, match="state.safetensors is damaged .its SHA-256 is .* run with force=true"):
        sparsebench.load(flipped.parent)
    other = variant("other", lambda r: None)
    state.write(state.State({"a": torch.ones(2)}), other / state.FILE)
    with pytest.raises(ValueError, match="is the state of another run"):
        sparsebench.load(other)


def test_load_needs_no_lm_eval(finished, tmp_path, monkeypatch):
    """Neither the package nor the tasks' folder: the model doesn't depend on what it was scored with."""
    content = json.loads((finished[1] / "result.json").read_text())
    harness = {**content["config"]["eval"]["lm_eval"], "tasks": ["hellaswag"], "task_path": "/nowhere"}
    target = changed(finished[1], tmp_path / "e", eval__lm_eval=harness)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    assert sparsebench.load(target) is not None


SCRATCH = {
    "lenet5": ("model=lenet5", "dataset=digits", "method=fatrelu", "model.train.steps=3", "model.train.warmup=1",
               "model.train.batch_size=32", "model.train.micro_batch=32", "eval.classifier.test_examples=32"),
    "bert": ("model=bert-tiny", "dataset=pystdlib-packages", "dataset.num_classes=2", "dataset.per_class=40",
             "dataset.max_tokens=16", "method=dense", "model.train.steps=2", "model.train.warmup=1",
             "model.train.batch_size=8", "model.train.micro_batch=8", "eval.classifier.test_examples=8"),
}  # fmt: skip
SMALLEST = ("measure.latency=false", "wandb.mode=disabled", "hardware=cpu", "hardware.threads=1")


@pytest.mark.parametrize("name", SCRATCH)
def test_load_of_a_model_trained_from_scratch_never_trains_and_never_writes(forked, tmp_path, name):
    process = forked(*SCRATCH[name], *SMALLEST, f"output_dir={tmp_path}/outputs")
    actual = record_of(process, tmp_path)
    folder = next(p.parent for p in (tmp_path / "outputs").rglob("result.json"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    module = sparsebench.load(folder)
    assert sum(p.numel() for p in module.parameters()) == actual["model"]["num_parameters"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    shutil.move(tmp_path / "outputs" / "models", tmp_path / "gone")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(
        ValueError, match=rf"trained from scratch, and neither .* make it with: sparsebench {SCRATCH[name][0]}"
    ):
        sparsebench.load(folder)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
