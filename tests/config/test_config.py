"""Every YAML composes and has exactly the fields of its class; identities; the list of all keys is a decision."""

import copy
import dataclasses
import functools
import importlib
import sys
from pathlib import Path

import pytest
import yaml

import sparsebench.conf
from sparsebench import config
from sparsebench.config.compose import GROUPS, compose_all
from sparsebench.config.identity import digest, identity_of

CONF = Path(sparsebench.conf.__path__[0])
FILES = sorted(p for group in (*GROUPS, "train") for p in (CONF / group).rglob("*.yaml"))
KEYS = Path(__file__).with_name("keys.txt")


def choice(file: Path) -> str:
    group, _, name = file.relative_to(CONF).with_suffix("").as_posix().partition("/")
    return f"{group}={name}"


def test_all_yaml_files_are_covered():
    assert len(FILES) == len(list(CONF.rglob("*.yaml"))) - 2  # all but config.yaml and bench.yaml
    assert len(FILES) >= 20


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name not in ("train", "claims")], ids=choice)
def test_composes(file):
    assert compose_all([choice(file)])


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name not in ("experiment", "paper", "claims", "train")], ids=choice
)
def test_yaml_keys_are_the_fields_of_the_class(file):
    content = yaml.safe_load(file.read_text())
    content.pop("defaults", None)
    module, _, name = content.pop("_target_").rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert set(content) == {f.name for f in dataclasses.fields(cls) if f.init}


@pytest.mark.parametrize("file", FILES, ids=choice)
def test_starts_with_a_comment_that_says_what_it_is_for(file):
    assert file.read_text().startswith("# ")


def test_keys_changed_on_purpose():
    """tests/config/keys.txt lists every key of the default configuration and of each group; a new key is a visible change."""

    def walk(prefix, node):
        for key, value in sorted(node.items()):
            if isinstance(value, dict) and key not in ("architecture", "hydra"):
                yield from walk(f"{prefix}{key}.", value)
            else:
                yield f"{prefix}{key}"

    actual = set()
    for file in [*FILES, CONF / "config.yaml", CONF / "bench.yaml"]:
        content = yaml.safe_load(file.read_text())
        for other in ("defaults", "claim"):  # Hydra's, and what stands beside an experiment
            content.pop(other, None)
        group = f"{file.parent.name}." if file.parent != CONF and "experiment" not in file.parts else ""
        group = "bench." if file.stem == "bench" else group
        actual |= set(walk(group, content))
    assert sorted(actual) == KEYS.read_text().split(), "update tests/config/keys.txt if the change is meant"


def test_a_model_names_its_data_and_an_explicit_choice_wins():
    assert compose_all(["model=llama2-7b"])[0]["dataset"]["name"] == "wikitext2"
    assert compose_all(["model=llama2-7b", "dataset=c4"])[0]["dataset"]["name"] == "c4"
    assert compose_all(["dataset=c4", "model=llama2-7b"])[0]["dataset"]["name"] == "c4"


def test_all_problems_are_said_together():
    with pytest.raises(config.ConfigError) as error:
        compose_all(["method=taal", "model=lama", "dataset=pystdlib", "seed=x,1"])
    assert len(error.value.problems) == 3
    with pytest.raises(config.ConfigError) as error:
        compose_all(["method.sparsty=0.5", "evaluate.batch_size=3", "seed=3"])
    assert error.value.problems[0].startswith("method.sparsty is not a known key (did you mean sparsity?); allowed: ")
    assert error.value.problems[1].startswith(
        "evaluate.batch_size is not a known key (did you mean eval.text.batch_size"
    )
    with pytest.raises(config.ConfigError) as error:
        config.build_settings(
            compose_all(["method.sparsity=1.5", "seed=-1", "hardware.threads=two", "eval.text.batch_size=0.5"])[0]
        )
    assert error.value.problems == [
        "seed must be a whole number in [0, 4294967296), got -1",
        "method.sparsity must be a number in [0, 1), got 1.5",
        "hardware.threads must be a whole number > 0 or null, got 'two'",
        "eval.text.batch_size must be a whole number > 0, got 0.5",
    ]


def test_bounds_are_those_that_are_said():
    """[0, 1) holds 0 and not 1, > 0 holds no 0, (0, 1] holds 1 and not 0."""
    for given, line in (
        ("method.sparsity=0", None),
        ("method.sparsity=1", "method.sparsity must be a number in [0, 1), got 1"),
        ("hardware.threads=1", None),
        ("hardware.threads=0", "hardware.threads must be a whole number > 0 or null, got 0"),
        ("method.greedy.error_tokens=1", None),
        ("method.greedy.error_tokens=0", "method.greedy.error_tokens must be a number in (0, 1], got 0"),
    ):
        problems = []
        config.build(compose_all([given, "method=teal", "hardware=cpu"])[0], "", problems, config.Settings)
        assert problems == ([line] if line else [])


def test_sweeps_expand_to_every_combination():
    actual = compose_all(["method.sparsity=0.25,0.5", "seed=range(3)"], sweep=True)
    assert {(c["method"]["sparsity"], c["seed"]) for c in actual} == {(s, i) for s in (0.25, 0.5) for i in range(3)}


MACHINE = {"cpu": "a", "gpus": [], "versions": {"torch": "1"}}


def identity(*overrides, machine=MACHINE):
    return identity_of(compose_all(list(overrides))[0], machine)


def test_identity_is_what_affects_the_numbers():
    base = identity()
    assert identity("method.sparsity=0.50") == base and identity("seed=0") == base
    assert identity("output_dir=elsewhere", "force=true", "wandb.mode=disabled") == base
    others = {
        identity("method.sparsity=0.4"),
        identity("seed=1"),
        identity("measure.samples=31"),
        identity("hardware=cpu"),
    }
    others |= {identity(machine={**MACHINE, "cpu": "b"}), identity(machine={**MACHINE, "versions": {"torch": "2"}})}
    assert len(others | {base}) == 7


def test_identity_follows_the_content_of_local_files(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one")
    before = identity("dataset=text", f"dataset.path={file}")
    file.write_text("two, longer")
    assert identity("dataset=text", f"dataset.path={file}") != before


def test_canonical_form():
    assert digest({"a": 1, "b": [1.0, True]}) == digest({"b": [1, True], "a": 1.0})
    assert digest({"a": True}) != digest({"a": 1})


def test_an_experiment_brings_its_own_sweep():
    """`-m experiment=training_free` is a whole table; an axis named on the command line replaces the experiment's."""
    actual = compose_all(["experiment=training_free", "method.sparsity=0.5", "seed=1"], sweep=True)
    assert len({c["method"]["name"] for c in actual}) == len(actual) == 10
    seeds = compose_all(["experiment=training_free", "method=teal", "method.sparsity=0.5"], sweep=True)
    assert [c["seed"] for c in seeds] == [0, 1, 2]
    narrowed = compose_all(["experiment=training_free", "seed=4", "method=teal,wina"], sweep=True)
    assert {(c["method"]["name"], c["seed"]) for c in narrowed} == {("teal", 4), ("wina", 4)} and len(narrowed) == 8
    assert {c["method"]["calibration_tokens"] for c in actual} == {20480} and {
        c["method"]["prompt"] for c in actual
    } == {"all"}
    assert len(compose_all(["experiment=training_free"])) == 1
    with pytest.raises(config.ConfigError, match="experiment must be one of"):
        compose_all(["experiment=training_fre"], sweep=True)


def test_options_of_an_own_folder(tmp_path):
    """--config-dir adds options to the groups; a folder that is not there is said."""
    (tmp_path / "method").mkdir()
    source = (CONF / "method" / "teal.yaml").read_text().replace("sparsity: 0.5", "sparsity: 0.33")
    (tmp_path / "method" / "mine.yaml").write_text(source)
    assert compose_all(["method=mine"], config_dir=str(tmp_path))[0]["method"]["sparsity"] == 0.33
    with pytest.raises(config.ConfigError, match="method must be one of .*, mine, .*, got 'yours'"):
        compose_all(["method=yours"], config_dir=str(tmp_path))
    with pytest.raises(config.ConfigError, match="--config-dir must be an existing folder, got 'nowhere'"):
        compose_all([], config_dir="nowhere")


@functools.cache
def composed():
    return compose_all([])[0]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "os is part of Python"),
        ("subprocess.Popen", "subprocess is part of Python"),
        ("antigravity.x", "antigravity is part of Python"),
        ("sparsebench.hardware.Hardware", "it has no kinds, operating_point, fit(loaded, data, work), apply"),
        ("sparsebench.models.language.CausalLM", "it has no kinds, operating_point, fit(loaded, data, work), apply"),
        ("sparsebench.cli.main", "no dataclass"),
        ("sparsebench.cli.hydra", "no dataclass"),
        ("sparsebench.methods.base.Method", "no dataclass"),
        ("sparsebench.methods.teal.Nothing", "sparsebench.methods.teal has no Nothing"),
        ("nowhere.at.All", "nowhere.at can't be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("faulty.X", "faulty can't be imported: ZeroDivisionError: division by zero"),
        ("leaving.X", "leaving can't be imported: SystemExit: 3"),
        ("x", "not a dotted name"),
        ("..x", "not a dotted name"),
        ("rm -rf /.x", "not a dotted name"),
        ("", "not a dotted name"),
        ("own.Slim", None),
        ("own.Wrong", "it has no fit(loaded, data, work)"),
    ],
)
def test_a_target_is_a_class_of_its_group(tmp_path, monkeypatch, target, said):
    """Before: method._target_=os.system imported the module and ended in a traceback of dataclasses."""
    (tmp_path / "faulty.py").write_text("1 / 0")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom sparsebench.methods.base import Method\n"
        "@dataclass(kw_only=True)\nclass Slim(Method):\n    name: str\n    kinds = ('language',)\n"
        "class Wrong(Slim):\n    def fit(self, everything): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    configuration = composed() | {"method": {"_target_": target, "name": "mine"}}
    before = set(sys.modules)
    if said is None:
        assert type(config.build_settings(configuration).method).__name__ == "Slim"
        return
    with pytest.raises(config.ConfigError) as error:
        config.build_settings(configuration)
    (line,) = error.value.problems
    assert line.startswith(f"method._target_ must name the class of a method, got {target!r} (") and said in line
    assert target.partition(".")[0] not in set(sys.modules) - before - {"faulty", "leaving", "own"}


def test_a_model_is_no_dataset():
    configuration = copy.deepcopy(composed())
    targets = configuration["model"]["_target_"], configuration["dataset"]["_target_"]
    configuration["dataset"]["_target_"], configuration["model"]["_target_"] = targets
    with pytest.raises(config.ConfigError) as error:
        config.build_settings(configuration)
    assert len(error.value.problems) == 2 and all("it has no load(" in line for line in error.value.problems)
