"""What comes from outside is data, never code; secrets stay out of what is written; nothing is written outside output_dir.

(The report's escaping is in test_report.py, `sparsebench.load` on a foreign record in test_api.py.)
"""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from sparsebench.records import state
from tests.helpers import record_of, tiny_tokenizer

SMALL = ("dataset.sequence_length=32", "method.calibration_tokens=512", "eval.text.test_sequences=8",
         "measure.latency=false", "hardware=cpu", "hardware.threads=1")  # fmt: skip
SECRET = "hf_0123456789abcdefghijklmnopqrstuvwxyz"


class Evil:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (exec, (f"open({str(self.mark)!r}, 'w').write('code ran')",))


@pytest.fixture
def evil(tmp_path):
    """(bytes of a malicious pickle, the file that appears when it is executed)."""
    mark = tmp_path / "code-ran"
    content = pickle.dumps(Evil(mark))
    pickle.loads(content)
    assert mark.exists(), "the payload works"
    mark.unlink()
    return content, mark


@pytest.fixture
def arguments(model_folder, text_file):
    return ["model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", *SMALL]


def but(arguments, **changes):
    """`arguments` with the values of some keys replaced."""
    changed = {k.replace("__", "."): v for k, v in changes.items()}
    kept = [a for a in arguments if a.partition("=")[0] not in changed]
    return [*kept, *(f"{k}={v}" for k, v in changed.items()), "wandb.mode=disabled"]


def test_pickle_in_place_of_a_model(forked, arguments, model_folder, evil, tmp_path):
    content, mark = evil
    shutil.copytree(model_folder("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(content)
    refused = forked(*but(arguments, model__path=tmp_path / "model"))
    assert refused.returncode == 2 and "pickle files are not opened: they can run code" in refused.stderr
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    assert forked(*but(arguments, model__path=tmp_path / "model")).returncode == 1
    assert not mark.exists()


def test_pickle_in_place_of_a_data_set(forked, arguments, evil, tmp_path):
    content, mark = evil
    for name in ("data.txt", "data.parquet", "data.jsonl"):
        (tmp_path / name).write_bytes(content)
    names = ",".join(str(tmp_path / n) for n in ("data.txt", "data.parquet", "data.jsonl"))
    process = forked("-m", *but(arguments, dataset__path=names))
    assert process.returncode == 2 and process.stderr.count("error: dataset.path: ") == 3, process.stderr
    assert not mark.exists()


def test_pickle_in_place_of_a_state(forked, arguments, evil, tmp_path):
    content, mark = evil
    command = but(arguments)
    assert forked(*command).returncode == 0
    (cached,) = (tmp_path / "outputs" / "states").glob("*.safetensors")
    cached.write_bytes(content)
    torch.save({"x": Evil(mark)}, tmp_path / "zip.pt")
    assert state.read(tmp_path / "zip.pt") is None
    process = forked(*command, "force=true")
    assert process.returncode == 0 and record_of(process, tmp_path)["fit"]["cached"] is False
    assert not mark.exists()


@pytest.mark.slow
def test_pickle_in_place_of_histograms(forked, arguments, evil, tmp_path):
    content, mark = evil
    for layer in range(2):
        for part in ("self_attn", "mlp"):
            file = tmp_path / "teal" / "histograms" / f"layer-{layer}" / part / "histograms.pt"
            file.parent.mkdir(parents=True)
            torch.save({"h1": Evil(mark)}, file) if layer else file.write_bytes(content)
    process = forked(*but(arguments, method__histograms=tmp_path / "teal"))
    assert process.returncode == 1 and not mark.exists()


@pytest.mark.slow
def test_code_in_a_model_folder_is_not_run(forked, arguments, model_folder, tmp_path):
    """A config.json that names code of the folder is refused as long as trust_remote_code is off."""
    folder, mark = tmp_path / "model", tmp_path / "code-ran"
    shutil.copytree(model_folder("llama"), folder)
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "evil"')
    extra = '"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},'
    (folder / "config.json").write_text(text.replace("{", "{" + extra, 1))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').write('ran')\nclass Config: pass\nclass Model: pass\n")
    tiny_tokenizer().save_pretrained(folder)
    assert forked(*but(arguments, model__path=folder)).returncode == 2
    assert not mark.exists()


def test_secrets_reach_nothing_that_is_written(forked, arguments, model_folder, tmp_path):
    """In a finished run with W&B offline, and in a failing sweep whose very path holds the secret."""
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET[::-1]}
    good = forked(*arguments, env=secrets)
    assert good.returncode == 0, good.stderr
    cut = tmp_path / SECRET / "cut"
    shutil.copytree(model_folder("llama"), cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    rest = [a for a in arguments if not a.startswith("dataset.path")]
    bad = forked("-m", *arguments, f"model.path={cut}", "method.sparsity=0.1", env=secrets)
    wrong = forked(*rest, f"dataset.path=/nowhere/{SECRET}", env=secrets)
    assert bad.returncode == 1 and wrong.returncode == 2
    shown = good.stdout + good.stderr + bad.stdout + bad.stderr + wrong.stdout + wrong.stderr
    written = b"".join(p.read_bytes() for p in (tmp_path / "outputs").rglob("*") if p.is_file())
    for secret in secrets.values():
        assert secret not in shown and secret.encode() not in written


def test_names_can_not_leave_the_output_folder(forked, arguments, tmp_path):
    keys = ("model.name", "method.name", "dataset.name", "hardware.name")
    process = forked(*arguments, *(f"{key}='../../../outside'" for key in keys))
    assert process.returncode == 2
    for key in keys:
        assert f"error: {key} must be a name of letters, digits" in process.stderr
    assert not (tmp_path / "outputs").exists()


def test_everything_a_run_and_a_sweep_write_lies_in_output_dir(sparsebench, arguments, tmp_path):
    (tmp_path / "home").mkdir()
    process = sparsebench(
        "-m", *but(arguments), "method.sparsity=0.2", "output_dir=here/and/there",
        "hydra.sweep.dir=/tmp/elsewhere-of-sparsebench", env={"HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    written = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*") if p.is_file()}
    assert written <= {"here", "home"}  # home: caches of numba and the like, nothing of a run
    assert not list((tmp_path / "home").rglob("result.json"))
    assert not Path("/tmp/elsewhere-of-sparsebench").exists()
