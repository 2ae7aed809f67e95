"""What a user gets wrong, and the one line that is the answer: key, value given, what is allowed; exit code 2, no record.

Every row goes through the command's main function in this process; a few, and all of them in the slow suite, through
the installed command.
"""

import json
import logging
import os
import re
import shutil
import sys

import pytest

from sparsebench import cli, config, ranks
from sparsebench.config import compose
from tests.helpers import TEXT, tiny_model, tiny_tokenizer

# `...` in an expected line stands for anything; {name} is the folder or file of that name in `inputs`
LONG = "/usr/" + "a" * 300
HF = "model=hf model.path={llama} dataset=text"
SHORT = "dataset.sequence_length=32 measure.context=16 measure.prompt=16"
TABLE = {
    # values
    "method.sparsity=1.5": "method.sparsity must be a number in [0, 1), got 1.5",
    "method.sparsity=most": "method.sparsity must be a number in [0, 1), got 'most'",
    "method.sparsity=50%": "method.sparsity must be a number in [0, 1), got '50%'",
    "method.sparsity=null": "method.sparsity must be a number in [0, 1), got None",
    "method.prompt=most": "method.prompt must be one of none, half, last10, p99, all, got 'most'",
    "method.allocation=gredy": "method.allocation must be one of uniform, greedy (did you mean greedy?), got 'gredy'",
    "method.calibration_tokens=0": "method.calibration_tokens must be a whole number > 0, got 0",
    "hardware.dtype=fp8": "hardware.dtype must be one of auto, float32, bfloat16, float16, got 'fp8'",
    "hardware.dtype=bf16": "hardware.dtype must be one of ... (did you mean bfloat16?), got 'bf16'",
    "hardware.threads=0": "hardware.threads must be a whole number > 0 or null, got 0",
    "hardware.threads=100000": "hardware.threads must be at most the ... cores of this machine, got 100000",
    "hardware.engine=fussed":
        "hardware.engine must be one of auto, eager, compiled, fused (did you mean fused?), got 'fussed'",
    "hardware.kernel=numba":
        "hardware.kernel must be one of auto, cpu_numba, cpu_packed, ..., masked_dense ..., got 'numba'",
    "hardware=cpu hardware.kernel=cuda_gather": "hardware.kernel=cuda_gather runs on cuda, got device cpu",
    "model.num_layers=0": "model.num_layers must be a whole number > 0 or null, got 0",
    "model.weights=pretraned":
        "model.weights must be one of pretrained, random, scratch (did you mean pretrained?), got 'pretraned'",
    "model.name=a/b": "model.name must be a name of letters, digits, '.', '_' and '-', got 'a/b'",
    "measure.samples=5": "measure.samples must be a whole number >= 30, got 5",
    "measure.latency=fast": "measure.latency must be true or false, got 'fast'",
    "wandb.mode=maybe": "wandb.mode must be one of offline, online, disabled, got 'maybe'",
    "wandb.mode=off": "wandb.mode must be one of offline, online, disabled (did you mean offline?), got 'off'",
    "seed=-1": "seed must be a whole number in [0, 4294967296), got -1",
    "seed=1.5": "seed must be a whole number in [0, 4294967296), got 1.5",
    "eval.text.batch_size=0.5": "eval.text.batch_size must be a whole number > 0, got 0.5",
    "eval.neurons.aggregate=4": "eval.neurons.aggregate must be a list, each element a whole number > 0, got 4",
    "dataset.sequence_length=4": "dataset.sequence_length must be a whole number >= 8, got 4",
    # numbers that no setting takes, and text that says nothing
    "method.sparsity=nan": "method.sparsity must be a number in [0, 1), got nan (not finite)",
    "method.sparsity=1e400": "method.sparsity must be a number in [0, 1), got inf (not finite)",
    "method.sparsity=true": "method.sparsity must be a number in [0, 1), got True",
    "hardware.peak_bandwidth_gbs=inf": "hardware.peak_bandwidth_gbs must be a number > 0 or null, got inf (not finite)",
    "eval.text.test_sequences=1000000000000000":
        "eval.text.test_sequences must be a whole number > 0 or null, got 1000000000000000 (over 15 digits)",
    "measure.samples=1e30": "measure.samples must be a whole number >= 30, got 1e+30",
    "dataset.path=": "dataset.path must be a file or folder or null, got ''",
    "model.path=": "model.path must be a folder, a file or a Hub id or null, got ''",
    "wandb.project=": "wandb.project must be a name without / \\ # ? % :, got ''",
    "wandb.project=a/b": "wandb.project must be a name without / \\ # ? % :, got 'a/b'",
    "output_dir='a\nb'": r"output_dir must be a folder without control characters, got 'a\nb'",
    # keys and options
    "method.sparsty=0.5": "method.sparsty is not a known key (did you mean sparsity?); allowed: ...",
    "sparsity=0.5": "sparsity is not a known key (did you mean method.sparsity?); allowed: ...",
    "eval.test_sequences=4":
        "eval.test_sequences is not a known key (did you mean eval.text.test_sequences?); allowed: ...",
    "eval.tasks=[piqa]": "eval.tasks is not a known key (did you mean eval.lm_eval.tasks?); allowed: ...",
    "modle=gpt2": "modle is not a known key (did you mean model?); allowed: ...",
    "method=teel": "method must be one of cats, ..., wisparse (did you mean teal?), got 'teel'",
    "model=llama7b": "model must be one of ... (did you mean llama2-7b?), got 'llama7b'",
    "experiment=tael":
        "experiment must be one of ... paper/teal, paper/teal_speed, ... (did you mean paper/teal?), got 'tael'",
    "dataset=wikitext": "dataset must be one of ... (did you mean wikitext2?), got 'wikitext'",
    "hardware=gpu": "hardware must be one of a100, ..., rtx4090..., got 'gpu'",
    "+experiment=prosparse": "'+experiment=prosparse': a group is chosen without '+': experiment=prosparse",
    "--method=teal": "'--method=teal' is no option: keys are given without dashes: method=teal",
    "--dry-run": "'--dry-run' is no option: see sparsebench --help",
    "method.sparsity=0.25,0.5": "'method.sparsity=0.25,0.5' lists several values: add -m to sweep over them",
    "-m method=glob(zz*)": "'method=glob(zz*)' matches nothing: method must be one of cats, ...",
    "-m hydra/launcher=jobllib": "hydra/launcher must be one of ..., got 'jobllib'",
    "dataset.path=/a=b":
        """'dataset.path=/a=b' can't be read: quote the value, for Hydra and for the shell: 'dataset.path="/a=b"'""",
    "dataset.path=/a#b": """'dataset.path=/a#b' can't be read: quote the value, ...: 'dataset.path="/a#b"'""",
    "dataset.path=/a(b)[c]":
        """'dataset.path=/a(b)[c]' can't be read: quote the value, ...: 'dataset.path="/a(b)[c]"'""",
    "dataset.path=/a,b":
        """'dataset.path=/a,b' lists several values: add -m ..., or quote what is one value: 'dataset.path="/a,b"'""",
    "method": "'method' can't be read: overrides look like key=value or key=value1,value2 with -m",
    "--explain method.sparsty":
        "method.sparsty is not a known key or option (did you mean method.sparsity?); sparsebench --help lists them",
    "--explain experiment=tael":
        "experiment=tael is not a known key or option (did you mean experiment=paper/teal?); ...",
    "--config-dir nowhere": "--config-dir must be an existing folder, got 'nowhere'",
    "method=null": "method must be one of cats, ..., got 'null'",
    "method=": "method must be one of cats, ..., got ''",
    "-m method=teal,null": "method must be one of cats, ..., got 'null'",
    "experiment=null": "experiment must be one of critical, ..., got 'null'",
    "-m experiment=": "experiment must be one of critical, ..., got ''",
    "hydra/launcher=null": "hydra/launcher must be one of ..., got 'null'",
    "++method=teal": "'++method=teal': a group is chosen without '+': method=teal",
    "method@x=teal": "'method@x=teal': every group has its one place here: method=teal",
    "=5": "'=5' can't be read: overrides look like key=value or key=value1,value2 with -m",
    "seed.x=1": "seed.x is not a known key; seed holds one value",
    # spellings of other programs
    "method.sparsity:0.5": "'method.sparsity:0.5' can't be read: overrides look like key=value or ...",
    "method.sparsity =0.5": "'method.sparsity =0.5': no blank stands before '='",
    "eval=null": "eval must be a mapping of settings, got None",
    "wandb=disabled": "wandb must be a mapping of settings, got 'disabled'",
    "measure=[]": "Error merging override measure=[] (Cannot merge DictConfig with ListConfig)",
    "hydra=5": "'hydra=5': hydra is no setting, it holds Hydra's own: hydra.<key>=<value>",
    "-method=teal": "'-method=teal' is no option: keys are given without dashes: method=teal",
    "method=TEAL": "method must be one of cats, ... (did you mean teal?), got 'TEAL'",
    "method=teal.yaml": "method must be one of cats, ... (did you mean teal?), got 'teal.yaml'",
    "method=teal,wina": "'method=teal,wina' lists several values: add -m to sweep over them",
    "run method=teal": "'run' can't be read: overrides look like key=value or key=value1,value2 with -m",
    "~method": "'~method': no key can be left out; see sparsebench --explain method",
    "~method.sparsity": "'~method.sparsity': no key can be left out; see sparsebench --explain method.sparsity",
    "-j 4": "'-j' is no option: see sparsebench --help",
    "--multirun=2": "argument --multirun/-m: ignored explicit argument '2' (see sparsebench --help)",
    "--config-name other":
        "--config-name is not for this command, whose keys are fixed: options of one's own lie in the folders of --config-dir",
    "-cp /tmp":
        "--config-path is not for this command, whose keys are fixed: options of one's own lie in the folders of --config-dir",
    "--explain": "argument --explain: expected one argument (see sparsebench --help)",
    "--cfg yaml": "argument --cfg/-c: invalid choice: 'yaml' (choose from ...",
    "seed=abc": "seed must be a whole number in [0, 4294967296), got 'abc'",
    "seed=": "seed must be a whole number in [0, 4294967296), got ''",
    "method.sparsity=[0.5]": "method.sparsity must be a number in [0, 1), got [0.5]",
    "method.sparsity=${x}": "Interpolation key 'x' not found full_key: method.sparsity...",
    "eval.neurons.aggregate=[1,a]": "eval.neurons.aggregate must be a list, each element a whole number > 0, got [1, 'a']",
    "output_dir=": "output_dir must be a folder without control characters, got ''",
    "-m method.sparsity=range(0.9,0.1)": "'method.sparsity=range(0.9,0.1)' matches nothing: its range is empty",
    "-m method.sparsity=range(0,1,0)": "'method.sparsity=range(0,1,0)' never ends: its step is 0",
    "-m seed=range(0,1000000000)": "a sweep must be of at most 10,000 runs, got 10,001 or more",
    "-m method.sparsity=0.1,2,0.3": "method.sparsity must be a number in [0, 1), got 2",
    "-m method.sparsity=interval(0.1,0.9)":
        "'method.sparsity=interval(0.1,0.9)' is for a sweeper that searches: add hydra/sweeper=optuna",
    "model.path=~/x":
        "'model.path=~/x' can't be read: the shell puts a home for ~ at the beginning of a word only: write model.path=$HOME...",
    "model=hf dataset=pystdlib model.path=https://huggingface.co/openai-community/gpt2":
        "model.path must be an existing folder or a Hub id like owner/name, got 'https://huggingface.co/openai-community/gpt2'",
    "dataset=text dataset.path=https://example.com/a.txt":
        "dataset.path must be an existing file or folder, got 'https://example.com/a.txt'",
    # what does not go together
    "hardware=h200":
        "hardware=h200 needs an NVIDIA GPU, this machine has none that torch can use; here: ...hardware=cpu",
    "hardware.device=cuda":
        "hardware.device=cuda needs an NVIDIA GPU, this machine has none that torch can use; here: hardware=auto, ...",
    "model=lenet5": "method=teal takes models of kind language, got model=lenet5 (vision)",
    "dataset=digits": "dataset must hold language data for model=llama-tiny, got digits (vision data)",
    "model=lenet5 method=fatrelu eval.lm_eval.tasks=[piqa]":
        "eval.lm_eval.tasks must be [] for model=lenet5 (vision), got ['piqa']",
    "method.allocation=greedy method.sparsity=0.95":
        "method.sparsity must be at most method.greedy.stop=0.9, ...got 0.95...",
    "method.threshold_rule=signed-hist": "method.threshold_rule=signed-hist needs method.histograms=<folder>...",
    "model=lenet5 dataset=digits method=spatial_topk method.sites=[relu1,nope]":
        "method.sites must be among relu1, relu2, relu3, relu4, got 'nope'",
    # models
    "model=hf dataset=pystdlib": "model.path must be a folder, a Hub id or a GGUF file, got null",
    "model=hf dataset=pystdlib model.path=/nowhere/model":
        "model.path must be an existing folder or a Hub id, got '/nowhere/model'",
    "model=hf dataset=pystdlib model.path={empty}":
        "model.path must be a folder with config.json and *.safetensors, got '{empty}' without config.json",
    "model=hf dataset=pystdlib model.path={no_tokenizer}":
        "model.path must be a folder with a tokenizer (e.g. tokenizer.json), got '{no_tokenizer}' without one",
    "model=hf dataset=pystdlib model.path={broken_config}":
        "model.path must hold a config.json that transformers ... knows, got '{broken_config}' (...)",
    "model=hf dataset=pystdlib model.path={encoder}":
        "model=encoder must be a causal language model of transformers, got one of type vit",
    "model=hf dataset=pystdlib model.path={doge}":
        "model=doge: model.layers.0 is a block of an unknown structure; ...",
    f"{HF} dataset.path={{corpus.txt}} {SHORT} model.num_layers=9":
        "model.num_layers must be at most 2 for llama, got 9",
    "model.num_layers=99": "model.num_layers must be at most 4 for llama-tiny, got 99",
    "model.weights=random model.num_layers=99": "model.num_layers must be at most 4 for llama-tiny, got 99",
    "model=gpt2 dataset=pystdlib model.weights=scratch": "model.weights=scratch needs model.train...",
    "model=llama2-7b dataset=pystdlib":
        "model.path=meta-llama/Llama-2-7b-hf is neither a folder nor in the local Hub cache, ...",
    "model.weights=random model.architecture.hidden_size=0":
        "model.architecture.hidden_size must be a whole number > 0, got 0",
    "model.weights=random model.architecture.vocab_size=many":
        "model.architecture.vocab_size must be a whole number > 0, got 'many'",
    "model.weights=random model.architecture.num_attention_heads=7":
        "model.architecture is none of model_type=llama in transformers: ...not a multiple of ...",
    "model.weights=random model.architecture.model_type=lama":
        "model.architecture is none of model_type=lama in transformers: Unrecognized model identifier: lama",
    "model.quantize_group=1000000": "model.quantize_group must be a whole number in (0, 65536], got 1000000",
    "model=lenet5 dataset=digits method=fatrelu model.weights=pretrained model.path={corpus.txt}":
        "model.path must be a file of a state dict ..., got '{corpus.txt}' (it begins like no file of torch.save)",
    # data
    "dataset=text": "dataset.path must name a file or folder of text, jsonl, json, csv or parquet for dataset=text, got null",
    "dataset=text dataset.path=/nowhere/text": "dataset.path must be an existing file or folder, got '/nowhere/text'",
    f"{HF} {SHORT} dataset.path={{empty.txt}}": "dataset.path: {empty.txt} holds no text",
    f"{HF} {SHORT} dataset.path={{binary.txt}}": "dataset.path: {binary.txt} is a binary file, not text",
    f"{HF} {SHORT} dataset.path={{latin.txt}}": "dataset.path: {latin.txt} is not UTF-8 text (byte 3)",
    f"{HF} {SHORT} dataset.path={{short.txt}}":
        "dataset: 1 document(s) can't be split into fit, dev and test; at least 3 are needed",
    "dataset=text dataset.path={empty}":
        "dataset: 0 document(s) can't be split into fit, dev and test; at least 3 are needed",
    "dataset=text dataset.path=/dev/zero":
        "dataset.path must be a file or folder, got '/dev/zero' (a pipe, a device or a socket)",
    "model=hf dataset=pystdlib model.path={pipe}":
        "model.path must be a file or folder, got '{pipe}' (a pipe, a device or a socket)",
    f"{HF} {SHORT} dataset.path={{lines.txt}}":
        "dataset: the test split holds ... tokens, fewer than one sequence of dataset.sequence_length=32",
    f"{HF} {SHORT} dataset.path={{rows.jsonl}}": "dataset.text_field must be one of body, n, got 'text'",
    f"{HF} {SHORT} dataset.path={{corpus.txt}} dataset.sequence_length=1000000":
        "dataset: the test split holds ... tokens, fewer than one sequence of dataset.sequence_length=1000000",
    "dataset=labelled-text model=bert-tiny method=moefication dataset.path={rows.jsonl}":
        "dataset.text_field must be one of body, n, got 'text'",
    # the clock
    f"{HF} dataset.path={{corpus.txt}} dataset.sequence_length=32 measure.context=1500 measure.prompt=16":
        "measure.context must fit the test split of dataset=text, which holds ... tokens in whole windows, got 1500",
    f"{HF} {SHORT} dataset.path={{corpus.txt}} measure.batches=[100000000]":
        "measure.batches must fit the test split of dataset=text, which holds ... tokens in whole windows, got [100000000]",
    "measure.context=100000":
        "measure.context plus the 8 steps after it must be at most 2048, the positions that model=llama-tiny was "
        "made for, got 100008",
    "measure.prompt=100000":
        "measure.prompt must be at most 2048, the positions that model=llama-tiny was made for, got 100000",
    # paths
    "output_dir={corpus.txt}/outputs":
        "output_dir must be a folder that can be written, got '{corpus.txt}/outputs' ({corpus.txt}: Not a directory)",
    "output_dir=/proc/here": "output_dir must be a folder that can be written, got '/proc/here' (/proc: ...)",
    f"output_dir={LONG}":
        "output_dir must be a path that can be opened, got '/usr/aaa...aaa' of 305 characters (File name too long)",
    f"dataset=text dataset.path={LONG}":
        "dataset.path must be a path that can be opened, got ... of 305 characters (File name too long)",
    f"model=hf dataset=pystdlib model.path={LONG}":
        "model.path must be a path that can be opened, got ... of 305 characters (File name too long)",
    f"method.histograms={LONG}":
        "method.histograms must be a path that can be opened, got ... of 305 characters (File name too long)",
    "method.histograms=/nowhere": "method.histograms must be a folder with ..., got '/nowhere'",
}  # fmt: skip
INSTALLED = list(TABLE)[:: len(TABLE) // 4]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """name -> path of the files and folders that the table names."""
    root = tmp_path_factory.mktemp("mistakes")
    tiny_model("llama").save_pretrained(root / "llama")
    for name in ("llama", "broken_config", "encoder", "doge"):
        if name != "llama":
            shutil.copytree(root / "llama", root / name)
        tiny_tokenizer().save_pretrained(root / name)
    tiny_model("llama").save_pretrained(root / "no_tokenizer")
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe")
    (root / "broken_config" / "config.json").write_text('{"model_type": "lama"}')
    (root / "encoder" / "config.json").write_text('{"model_type": "vit"}')
    (root / "doge" / "config.json").write_text(
        '{"model_type": "doge", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320}'
    )
    (root / "corpus.txt").write_text(TEXT)
    (root / "empty.txt").write_text(" \n")
    (root / "short.txt").write_text("a few words only")
    (root / "lines.txt").write_text("one\ntwo\nthree\nfour\n")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (root / "latin.txt").write_bytes("\n".join(f"café à la crème {i}" for i in range(500)).encode("latin-1"))
    (root / "rows.jsonl").write_text("\n".join(json.dumps({"body": f"hello {i}", "n": i}) for i in range(50)))
    return {path.name: str(path) for path in root.iterdir()}


def filled(text: str, inputs: dict[str, str]) -> str:
    for name, path in inputs.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def check(command: str, errors: str, code: int, inputs: dict[str, str]) -> None:
    """Exactly one line of error, the expected one, and the exit code of a wrong configuration."""
    expected = re.escape(filled(TABLE[command], inputs)).replace(re.escape("..."), ".*")
    lines = [line for line in errors.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and re.fullmatch(f"error: {expected}", lines[0]), errors
    assert code == cli.WRONG


@pytest.mark.parametrize("command", TABLE)
def test_a_mistake_is_one_line(command, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparsebench", *filled(command, inputs).split(" ")])
    monkeypatch.setattr(cli, "isolated", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    code = cli.guarded(cli.command)
    check(command, capsys.readouterr().err, code, inputs)
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize("command", [pytest.param(c, marks=() if c in INSTALLED else pytest.mark.slow) for c in TABLE])
def test_through_the_installed_command(command, inputs, sparsebench, tmp_path):
    process = sparsebench(*filled(command, inputs).split(" "))
    check(command, process.stderr, process.returncode, inputs)
    assert not process.stdout and not list(tmp_path.iterdir())


OPTION = "_target_: sparsebench.methods.teal.Teal\nname: mine\n"
FILES = {
    "a\ttab: 1": "line 1: ...",
    "sparsity:\t{": "line 1: ...",
    "a: [1": "line 1: expected ',' or ']', but got '<stream end>'",
    OPTION + "name: other": "line 3: name stands there twice",
    "- a": "it is no mapping of keys to values",
    "teal": "it is no mapping of keys to values",
    "a: &a [*a]": "it is nested without end",
    "a: " + "[" * 3000: "it is nested without end",
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ): "its aliases stand for more than 100,000 values",
    b"name: caf\xe9": "it is not UTF-8 (byte 9)",
    OPTION.encode("utf-16"): "it is not UTF-8 (byte 0)",
    "a: 1\0": "...unacceptable character #x0000...",
    "a: !!python/name:os.system": "line 1: the tag 'tag:yaml.org,2002:python/name:os.system' stands for no value",
}  # fmt: skip


@pytest.mark.parametrize("content", FILES)
def test_an_option_file_that_can_t_be_read_is_named(content, tmp_path):
    """Before: tracebacks of the YAML reader; nine lists of nine aliases each never came to an end."""
    file = tmp_path / "method" / "mine.yaml"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(config.ConfigError) as line:
        compose.plan(["method=mine"], config_dir=str(tmp_path))
    expected = re.escape(f"{file} can't be read as an option: {FILES[content]}").replace(re.escape("..."), ".*")
    assert re.fullmatch(expected, str(line.value))


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_an_option_file_that_can_be_read_is_used(start, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(f"{start}defaults: [teal]\nname: mine\n")
    (planned,) = compose.plan(["method=mine"], config_dir=str(tmp_path)).configurations
    assert planned["method"]["name"] == "mine" and planned["method"]["sparsity"] == 0.5


def test_an_option_that_leads_back_to_itself_is_one_line(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [mine]\n")
    with pytest.raises(config.ConfigError, match="^the defaults of an option lead back to itself$"):
        compose.plan(["method=mine"], config_dir=str(tmp_path))


ENVIRONMENT = {
    ("RANK=one", "WORLD_SIZE=2"): "RANK of the environment must be a whole number, as torchrun sets it, got 'one'",
    ("WORLD_SIZE=0",): "WORLD_SIZE of the environment must be a whole number, as torchrun sets it, got '0'",
    ("RANK=2", "WORLD_SIZE=2"): "RANK of the environment must be below WORLD_SIZE=2, got 2",
}


@pytest.mark.parametrize("given", ENVIRONMENT)
def test_a_mistake_in_the_environment_is_one_line(given, monkeypatch, capsys):
    for name, _, value in (each.partition("=") for each in given):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["sparsebench"])
    assert cli.guarded(cli.command) == cli.WRONG
    assert capsys.readouterr().err == f"error: {ENVIRONMENT[given]}\n"


def test_a_rank_without_others_is_no_follower(monkeypatch):
    """Left behind by a batch system. Before: the run said nothing and left no record."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.first()


def test_what_nobody_foresaw_is_one_line(monkeypatch, capsys):
    def body():
        raise RuntimeError("two\nlines")

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert cli.guarded(body) == cli.FAILED
    assert capsys.readouterr().err == "error: RuntimeError: two lines (HYDRA_FULL_ERROR=1 shows where)\n"
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(RuntimeError):
        cli.guarded(body)


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60
