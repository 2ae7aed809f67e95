"""What names a run: content of exactly the files that are read, source code, machine; nothing else."""

import builtins
import dataclasses
import functools
import importlib
import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sparsebench
from sparsebench import cache
from sparsebench.config import digests, inputs, setting
from sparsebench.config.compose import compose_all
from sparsebench.config.identity import contents, identity_of, package
from sparsebench.data import hub as hub_library
from sparsebench.records import machine
from tests.helpers import built, tiny_model, tiny_tokenizer

MACHINE = {"cpu": "a", "gpus": [], "cores": 2, "processes": 1, "versions": {"torch": "1"}}
FILE_LIKE = re.compile(r"path|file|folder|dir\b|_dir|histograms|cue_conflict|checkpoint_at|images\b")
NO_INPUT = {  # settings whose names look like it, but that read nothing of this machine
    ("Settings", "output_dir"): "where to write",
    ("Text", "hub_files"): "a pattern of file names on the Hub",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "known", {})


@functools.cache
def composed(*overrides: str) -> dict:
    return compose_all(list(overrides))[0]


def identity(*overrides, machine=MACHINE, **groups):
    return identity_of({**composed(*overrides), **groups}, machine)


def edited_unseen(file: Path, content: bytes) -> None:
    """Other content of the same size, and the modification time put back."""
    before = file.stat()
    assert len(content) == before.st_size
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def settle(folder: Path) -> None:
    """Wait until digests of new files are remembered on disk, too."""
    time.sleep(digests.SETTLED_SECONDS + 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Settings that name files


def settings_classes() -> list[type]:
    """Every dataclass of the package that the configuration can build."""
    values = {}
    for module in pkgutil.walk_packages(sparsebench.__path__, "sparsebench."):
        if module.name.split(".")[1] in ("conf", "__main__", "kernels", "engines", "report", "bench"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if (
                isinstance(value, type)
                and dataclasses.is_dataclass(value)
                and value.__module__.startswith("sparsebench")
            ):
                values[value] = any("choices" in f.metadata for f in dataclasses.fields(value))
    return [cls for cls, is_setting in values.items() if is_setting]


def uncovered(classes: list[type]) -> list[str]:
    """Settings that look like a file and are not found as one; settings marked by a word that no rule knows."""
    problems = []
    for cls in classes:
        static = inputs.file_fields(f"{cls.__module__}.{cls.__name__}")
        for field in dataclasses.fields(cls):
            kind = field.metadata.get("file")
            if kind != static.get(field.name) or (kind is not None and kind not in inputs.KINDS):
                problems.append(f"{cls.__name__}.{field.name}: marked {kind}, found {static.get(field.name)}")
            looks = FILE_LIKE.search(field.name) and "str" in str(field.type)
            if (looks or field.metadata.get("exists")) and not kind and (cls.__name__, field.name) not in NO_INPUT:
                problems.append(f"{cls.__name__}.{field.name} names a file but is not marked")
    return problems


def test_every_setting_that_names_a_file_is_covered():
    classes = settings_classes()
    assert len(classes) > 25 and uncovered(classes) == []
    marked = {(c.__name__, f) for c in classes for f in inputs.file_fields(f"{c.__module__}.{c.__name__}")}
    assert {("CausalLM", "path"), ("Encoder", "path"), ("Vision", "path"), ("Text", "path"), ("Texts", "path"),
            ("Images", "path"), ("Teal", "histograms"), ("RSparse", "rho_file"), ("Harness", "task_path"),
            ("ClassifierEvaluation", "cue_conflict")} <= marked  # fmt: skip


def test_the_list_notices_a_setting_that_is_not_marked():
    @dataclasses.dataclass
    class Mine:
        weights_file: str | None = setting()
        other_folder: str | None = setting(file="model")  # marked, but nested here where the finder can't see it

    problems = uncovered([Mine])
    assert "Mine.weights_file names a file but is not marked" in problems
    assert "Mine.other_folder: marked model, found None" in problems


def test_nested_settings_hold_no_file():
    """Files are looked for in the node of a group: a class inside another one must not name any."""
    for cls in settings_classes():
        for field in dataclasses.fields(cls):
            inner = [c for c in settings_classes() if re.search(rf"\b{c.__name__}\b", str(field.type))]
            if cls.__name__ not in ("Settings", "Evaluation"):
                assert not any(f.metadata.get("file") for c in inner for f in dataclasses.fields(c))


# ---------------------------------------------------------------------------------------------------------------------
# Files: content, of what is read


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama", layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_identity_of_a_model_folder(model):
    overrides = ("model=hf", f"model.path={model}", "dataset=digits")
    base = identity(*overrides)
    os.utime(model / "config.json", (1, 1))
    (model / "README.md").write_text("A model.")
    (model / "pytorch_model.bin").write_bytes(b"never read")
    (model / "consolidated.safetensors").write_bytes(b"never read where model.safetensors is there")
    (model / "sub").mkdir()
    (model / "sub" / "model.safetensors").write_bytes(b"another model")
    assert identity(*overrides) == base  # nothing that is read changed
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (model / name).read_bytes()
        edited_unseen(model / name, content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        assert identity(*overrides) != base, name
        (model / name).write_bytes(content)
        assert identity(*overrides) == base
    (model / "generation_config.json").unlink()
    assert identity(*overrides) != base


def test_shards_are_those_the_index_lists(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "m", max_shard_size="100KB")
    shards = set(json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"].values())
    (tmp_path / "m" / "stray.safetensors").write_bytes(b"")
    actual = set(inputs.read_files(str(tmp_path / "m"), "model", {}))
    assert len(shards) > 1 and actual == {
        *shards,
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }


def test_what_a_model_reads_is_what_counts(model, monkeypatch):
    """Loading a tokenizer opens no file of the folder whose content is not in the identity (weights are mapped, not opened)."""
    opened = opened_below(model, monkeypatch)
    loaded = built("model", "model=hf", path=str(model))
    import transformers

    transformers.AutoTokenizer.from_pretrained(loaded.location)
    transformers.AutoConfig.from_pretrained(loaded.location)
    assert opened and opened <= set(inputs.read_files(str(model), "model", {}))


def opened_below(folder: Path, monkeypatch) -> set[str]:
    """Names of the files below `folder` that Python opens from now on."""
    actual: set[str] = set()

    def watching(real):
        def watch(file, *arguments, **named):
            if isinstance(file, (str, os.PathLike)) and Path(file).is_relative_to(folder) and Path(file).is_file():
                actual.add(Path(file).relative_to(folder).as_posix())
            return real(file, *arguments, **named)

        return watch

    monkeypatch.setattr(builtins, "open", watching(builtins.open))
    monkeypatch.setattr(io, "open", watching(io.open))
    return actual


@pytest.mark.parametrize("source", ["wikitext", "pystdlib", "files"])
def test_what_a_text_data_set_reads_is_what_counts(tmp_path, monkeypatch, source):
    folder = tmp_path / "data"
    names = {"wikitext": ("train.txt", "valid.txt", "test.txt"), "files": ("a.txt", "sub/b.txt", "README.md"),
             "pystdlib": tuple(f"p{i}/m{i}.py" for i in range(60))}[source]  # fmt: skip
    strays = {"wikitext": "notes.txt", "pystdlib": "test/test_m.py", "files": None}
    for name in (*names, strays[source]) if strays[source] else names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"Line {i} of {name}.\n\n" for i in range(40)))
    options = {"wikitext": "wikitext2", "pystdlib": "pystdlib", "files": "text"}
    data = built("dataset", f"dataset={options[source]}", path=str(folder))
    opened = opened_below(folder, monkeypatch)
    data.load(0)
    assert opened == set(names) == set(inputs.read_files(str(folder), "text", {"source": source}))


def test_text_images_tasks_and_histograms(tmp_path):
    """An edit that keeps size and modification time is seen for every kind of file; what is not read is not."""
    for name in ("images/train/a/1.png", "images/val/a/1.PNG", "cues/cat1-dog1.png", "tasks/t.yaml", "tasks/f.py",
                 "rows.jsonl", "hist/histograms/layer-0/mlp/histograms.pt", "hist/lookup/layer-0/results.csv",
                 "images/train/notes.md", "images/extra/a/1.png", "tasks/t.md", "hist/README.md", "rho.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content 1")
    (tmp_path / "tasks" / "t.yaml").write_text(
        f"a: !function f.g\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
    )
    overrides = ("dataset=imagefolder", f"dataset.path={tmp_path}/images", "dataset.size=32",
                 f"eval.classifier.cue_conflict={tmp_path}/cues", f"eval.lm_eval.task_path={tmp_path}/tasks",
                 "method=teal", f"method.histograms={tmp_path}/hist")  # fmt: skip
    base = identity(*overrides)
    for name in ("images/train/notes.md", "images/extra/a/1.png", "tasks/t.md", "hist/README.md"):
        (tmp_path / name).write_text("content 2, longer")
    assert identity(*overrides) == base
    for name in ("images/train/a/1.png", "images/val/a/1.PNG", "cues/cat1-dog1.png", "tasks/f.py", "rows.jsonl",
                 "hist/histograms/layer-0/mlp/histograms.pt", "hist/lookup/layer-0/results.csv"):  # fmt: skip
        edited_unseen(tmp_path / name, b"content 2")
        assert identity(*overrides) != base, name
        edited_unseen(tmp_path / name, b"content 1")
    assert identity(*overrides) == base
    rho = ("method=rsparse", f"method.rho_file={tmp_path}/rho.json")
    base = identity(*rho)
    edited_unseen(tmp_path / "rho.json", b"content 2")
    assert identity(*rho) != base


def test_links_and_unreadable_folders(tmp_path):
    """A link to a folder is read as that folder, twice where it stands twice; a circle ends."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a.txt").write_text("a")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub")
    (tmp_path / "data" / "sub" / "circle").symlink_to(tmp_path / "data")
    assert set(inputs.read_files(str(tmp_path / "data"), "text", {})) == {"sub/a.txt", "again/a.txt"}
    assert inputs.read_files(str(tmp_path / "nowhere"), "text", {}) == {}


def test_names_that_stand_for_files(tmp_path, monkeypatch):
    """A Hub id stands for the commit in the local cache, torchvision's weights for their published digest."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    hub = ("model=hf", "model.path=owner/name", "dataset=text", f"dataset.path={__file__}")
    missing = identity(*hub)
    folder = tmp_path / "hub" / "models--owner--name"
    for commit in ("a" * 40, "b" * 40):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    first = identity(*hub)
    (folder / "refs" / "main").write_text("b" * 40)
    second = identity(*hub)
    assert len({missing, first, second}) == 3
    assert identity(*hub, "model.revision=" + "a" * 40) not in (first, second)  # the revision itself is a setting
    assert hub_library.commit("owner/name", None) == "b" * 40  # what is loaded is what the identity says
    assert hub_library.commit("elsewhere/name", "v1") == "v1" and hub_library.commit(None, None) is None
    weights = ("model=resnet18", "model.weights=pretrained", "model.path=null", "model.stem=imagenet", "dataset=digits")
    base = identity(*weights)
    file = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-9a0364b9.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"published")  # sha256 2f8ab72e...
    published = file.with_name(f"resnet18-{digests.of_file(file)[:8]}.pth")
    file.rename(published)
    assert identity(*weights) == base  # downloaded since: the same run
    published.write_bytes(b"edited")
    assert identity(*weights) != base


# ---------------------------------------------------------------------------------------------------------------------
# Source code and machine


@pytest.fixture
def user_method(tmp_path, monkeypatch):
    """A method of the user's in a folder on Python's path, with helpers that it imports in several ways."""
    folder = tmp_path / "user"
    (folder / "mine" / "deep").mkdir(parents=True)
    for name, text in {
        "mine/__init__.py": "", "mine/method.py": "import helper\nfrom . import near\nclass M:\n    pass\n",
        "mine/near.py": "from .deep.far import x\n", "mine/deep/__init__.py": "", "mine/deep/far.py": "x = 1\n",
        "helper.py": "import json\ny = 1\n", "unrelated.py": "z = 1\n",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_source_of_a_users_method(user_method):
    group = {"_target_": "mine.method.M", "name": "m"}
    base = identity(method=group)
    assert set(inputs.own_source({"method": group})) == {
        "mine", "mine.method", "mine.near", "mine.deep", "mine.deep.far", "helper",
    }  # fmt: skip
    (user_method / "unrelated.py").write_text("z = 2\n")
    os.utime(user_method / "helper.py", (1, 1))
    assert identity(method=group) == base
    for name in ("mine/method.py", "mine/near.py", "mine/deep/far.py", "helper.py"):
        before = (user_method / name).read_bytes()
        edited_unseen(user_method / name, before[:-1] + b"#")
        assert identity(method=group) != base, name
        (user_method / name).write_bytes(before)
    assert identity(method=group) == base
    assert not {"mine", "helper"} & set(sys.modules)  # read, never imported


def test_a_foreign_target_is_not_followed_into_installed_code():
    actual = inputs.own_source({"method": {"_target_": "yaml.loader.Loader"}})
    assert {n.split(".")[0] for n in actual} == {"yaml"} and "yaml.loader" in actual
    assert set(inputs.own_source({"method": {"_target_": "shutil.copy"}})) == {"shutil"}
    assert inputs.own_source({"method": {"_target_": "nowhere.at.All"}, "model": {"_target_": "x"}}) == {}


def test_source_of_this_package(tmp_path, monkeypatch):
    """Edited source under the same version is another run; what only shows records is not."""
    copy = tmp_path / "sparsebench"
    shutil.copytree(inputs.PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__", "conf"))
    base = package()
    monkeypatch.setattr(inputs, "PACKAGE", copy)
    assert package() == base
    (copy / "report" / "plots.py").write_text("# other colours")
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "x.py").write_text("")
    assert package() == base
    for name in ("kernels/decode.cu", "methods/teal.py", "cli.py"):
        file = copy / name if (copy / name).exists() else next((copy / name).parent.glob("*.cu"))
        before = file.read_bytes()
        edited_unseen(file, before[:-1] + b" ")
        assert package() != base, name
        file.write_bytes(before)


def test_machine_is_cores_and_everything_that_computes(monkeypatch):
    actual = machine.machine()
    assert {"cpu", "gpus", "cores", "processes", "versions"} == set(actual)
    assert {"python", "torch", "numpy", "scipy", "scikit-learn", "tokenizers", "datasets", "accelerate", "safetensors",
            "numba", "llvmlite", "transformers"} <= set(actual["versions"])  # fmt: skip
    base = identity()
    for key, value in (("cores", 1), ("processes", 2), ("versions", {"torch": "1", "numpy": "2"})):
        assert identity(machine={**MACHINE, key: value}) != base
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert machine.machine()["processes"] == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_taskset_is_another_run():
    allowed = os.sched_getaffinity(0)
    try:
        both = machine.machine()["cores"]
        os.sched_setaffinity(0, {min(allowed)})
        assert (machine.machine()["cores"], both) == (1, len(allowed))
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------------------------------------------------------------
# Digests


def test_digests_are_remembered_and_never_stale(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    read = []
    real = digests.of_file
    monkeypatch.setattr(digests, "of_file", lambda path: read.append(path) or real(path))
    first = digests.of_files([file])
    edited_unseen(file, b"two")  # at once: the first digest must not have been kept
    second = digests.of_files([file])
    assert first != second and len(read) == 2
    settle(tmp_path)
    assert digests.of_files([file]) == second and len(read) == 3
    digests.known.clear()  # as another process
    assert digests.of_files([file, file]) == second * 2 and len(read) == 3
    edited_unseen(file, b"six")
    assert digests.of_files([file]) not in (first, second)
    assert digests.of_files([tmp_path / "nowhere"]) == [digests.UNREADABLE]


def test_a_damaged_or_unwritable_table_only_costs_time(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    expected = digests.of_files([file])
    os.utime(file, (1, 1))
    settle(tmp_path)
    table = cache.folder() / "digests.sqlite3"
    table.write_bytes(b"no database" * 1000)
    assert digests.of_files([file]) == expected
    digests.known.clear()
    monkeypatch.setattr(digests, "of_file", lambda path: "read again")
    assert digests.of_files([file]) == expected  # the new table knew it
    table.unlink()
    table.mkdir()
    digests.known.clear()
    assert digests.of_files([file]) == ["read again"]


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBENCH_CACHE", str(tmp_path / "mine"))
    assert cache.folder() == tmp_path / "mine"
    monkeypatch.delenv("SPARSEBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "sparsebench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "home" / ".cache" / "sparsebench"
    (tmp_path / "file").write_text("")
    for home in (str(tmp_path / "file"), None):  # can't be made; not even set
        monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert cache.folder().parent == tmp_path and cache.folder().is_dir()


def test_identity_needs_no_torch():
    """Two starts of a program that asks for the identity of the default run: torch is in neither."""
    code = (
        "import sys, sparsebench.cli as c; from sparsebench.config.compose import compose_all;"
        "print(c.location(compose_all([])[0])[1]); assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    values = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert values[0].stdout == values[1].stdout != "" and not values[0].stderr, values[0].stderr


def test_the_shipped_model_and_the_library_are_part_of_the_default_run():
    actual = contents(compose_all([])[0])
    assert "model.safetensors" in actual["model.path"][0]
    assert len(actual["dataset.source stands for"][1]) > 500
