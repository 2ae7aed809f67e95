"""What README and docs/ say is what the program does: examples run, options are named, pages are up to date."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebench import config
from sparsebench.config import explain
from sparsebench.config.compose import compose_all
from sparsebench.kernels import masked_dense
from sparsebench.records.record import SCHEMA_FILE
from tests.helpers import KINDS, QUICK_RUN, record_of, work

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def page(name: str) -> str:
    return (DOCS / name).read_text()


EXTENDING = page("extending.md")


def block(text: str, first_line: str) -> str:
    """The fenced block that begins with this line."""
    return next(b for b in re.findall(r"```\w*\n(.*?)```", text, re.S) if b.startswith(first_line))


def script(name: str):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# The examples


def test_the_added_method_runs(model_folder, text_file, tmp_path):
    (tmp_path / "fixed.py").write_text(block(README, "# fixed.py"))
    (tmp_path / "extra" / "method").mkdir(parents=True)
    (tmp_path / "extra" / "method" / "fixed.yaml").write_text(block(README, "# extra/method/fixed.yaml"))
    given = [a for a in QUICK_RUN if not a.startswith("method.")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.run(
        [sys.executable, "-m", "sparsebench", "--config-dir", "extra", "method=fixed", "model=hf",
         f"model.path={model_folder('llama')}", f"dataset.path={text_file}", *given],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    record = record_of(process, tmp_path)
    assert record["sparsity"]["requested"] is None and 0 < record["sparsity"]["model_wide"] < 1
    assert record["latency"]["decode"]["speedup"] > 0


@pytest.fixture
def example(tmp_path, monkeypatch):
    """example(group, name, *overrides): the object that an example of a page describes, from its Python and its YAML."""
    monkeypatch.syspath_prepend(tmp_path)

    def build(group, name, *overrides, text=EXTENDING):
        if group != "hardware":
            (tmp_path / f"{name}.py").write_text(block(text, f"# {name}.py"))
            monkeypatch.delitem(sys.modules, name, raising=False)
        folder = tmp_path / "extra" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(block(text, f"# extra/{group}/{name}.yaml"))
        problems: list[str] = []
        (composed,) = compose_all([f"{group}={name}", *overrides], config_dir=str(tmp_path / "extra"))
        actual = config.build(composed[group], group, problems)
        assert not problems, problems
        return actual

    return build


EXAMPLES = {
    "fixed": (README, []),
    "quantile": (EXTENDING, ["method.calibration_tokens=512"]),
    "relufied": (EXTENDING, ["method.train.steps=3", "method.train.warmup=1"]),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_method_keeps_the_contract(name, example, tmp_path):
    """Neutral changes nothing, the method drops something, and its sparse model needs the state only."""
    (text, quick), kind = EXAMPLES[name], KINDS["language"]
    rows, dense = kind.inputs(3), kind.logits(kind.loaded().module, kind.inputs(3))

    def sparse(method, state=None):
        state = state or method.fit(kind.loaded(), kind.data(), work(tmp_path))
        return method.apply(kind.loaded().module, state, work(tmp_path)), state

    neutral = type(example("method", name, *quick, text=text)).neutral
    given = [f"method.{k}={'null' if v is None else v}" for k, v in neutral.items()]
    assert torch.equal(kind.logits(sparse(example("method", name, *quick, *given, text=text))[0], rows), dense)
    method = example("method", name, *quick, text=text)
    model, state = sparse(method)
    assert 0 < kind.measured(model) < 1
    if method.requested:
        assert kind.measured(model) == pytest.approx(method.requested, abs=0.05)
    assert torch.equal(kind.logits(sparse(method, state)[0], rows), kind.logits(model, rows))


def test_the_example_data_set_keeps_the_contract(example, tmp_path):
    (tmp_path / "fables").mkdir()
    for i in range(40):
        (tmp_path / "fables" / f"{i}.txt").write_text(f"Fable {i}. " + "The fox and the grapes. " * (i + 20))
    data = example("dataset", "fables", f"dataset.folder={tmp_path / 'fables'}").load(0)
    data.check_disjoint()
    data.set_tokenizer(KINDS["language"].loaded().tokenizer)
    assert all(getattr(data, split).sequences(2).shape == (2, 64) for split in ("fit", "dev", "test"))
    assert {"name", "fit", "dev", "test", "disjoint"} <= data.describe().keys()


def test_the_example_target_can_be_built(example):
    assert example("hardware", "laptop", "method=dense").present_device == "cpu"


def test_the_example_kernel_equals_masked_dense():
    namespace: dict = {}
    exec(block(EXTENDING, "# cpu_columns.py"), namespace)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 1, 24), torch.randn(16, 24), torch.randn(16)
    low_rank = torch.randn(24, 3), torch.randn(3, 16)
    for rule in ({"threshold": 0.6}, {"threshold": 0.6, "scale": torch.rand(24)}, {"keep": x > 0}, {"threshold": 99.0}):
        for factors in (None, low_rank):
            got = namespace["input_sparse_linear"](x, weight, bias, **rule, low_rank=factors)
            torch.testing.assert_close(
                got, masked_dense.input_sparse_linear(x, weight, bias, **rule, low_rank=factors), rtol=1e-5, atol=1e-5
            )
    assert namespace["unsupported"](torch.randn(2, 24), weight) and not namespace["unsupported"](x, weight)


def commands() -> list[tuple[str, str]]:
    """(page, line) of every `sparsebench` command in a fenced block that stands for one by itself."""
    values = []
    for file in PAGES:
        if file.parent.name == "experiments":
            continue
        for fenced in re.findall(r"^ *```\n(.*?)```", file.read_text(), re.S | re.M):
            for line in fenced.replace("\\\n", " ").splitlines():
                if re.match(r"sparsebench( |$)", line.strip()) and "hydra/" not in line and "--config-dir" not in line:
                    values.append((file.name, line.strip()))
    return values


@pytest.mark.parametrize(("name", "line"), commands())
def test_a_printed_command_composes(name, line):
    words = shlex.split(re.sub(r"<[^>]*>", "x", line), comments=True)[1:]
    overrides = [w for w in words if not w.startswith("-") and w != "job"]
    assert compose_all(overrides, sweep="-m" in words)


# ---------------------------------------------------------------------------------------------------------------------
# Everything is named


def test_every_record_key_is_explained():
    table = page("concepts.md")
    for key in json.loads(SCHEMA_FILE.read_text())["properties"]:
        assert f"`{key}`" in table, key


def test_every_option_is_named():
    where = {"model": "models-and-data.md", "dataset": "models-and-data.md", "method": "methods/index.md",
             "hardware": "hardware-and-kernels.md"}  # fmt: skip
    for group, name in where.items():
        for option in explain.options(group):
            assert f"`{option.name}`" in page(name), f"{group}={option.name} in docs/{name}"


def test_the_matrix_is_what_the_classes_take():
    """README's methods x kinds of models; vision transformer and CNN are both of kind `vision`."""
    rows = re.findall(r"^\| [^|]*\| (`[^|]*`) \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", README, re.M)
    said = {
        name: [bool(cell.strip()) for cell in cells] for names, *cells in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert said.keys() == {option.name for option in explain.options("method")}
    for option in explain.options("method"):
        module, _, name = option.target.rpartition(".")
        kinds = getattr(importlib.import_module(module), name).kinds
        language, texts, transformer, network = said[option.name]
        assert (language, texts, transformer or network) == tuple(
            kind in kinds for kind in ("language", "classification", "vision")
        ), option.name


def test_every_key_has_a_meaning():
    actual = explain.entries()
    assert not [e.key for e in actual if not e.meaning]
    known = {e.key if e.group != "bench" else f"bench.{e.key}" for e in actual}
    listed = set((ROOT / "tests" / "config" / "keys.txt").read_text().split())
    left_out = {k for k in listed if k.endswith("._target_") or k in ("hydra", "bench.hydra")}
    assert not {k for k in listed - left_out if k not in known and not any(e.startswith(f"{k}.") for e in known)}


def test_what_is_allowed_comes_from_the_classes():
    (entry,) = [e for e in explain.find("method.sparsity") if e.option == "teal"]
    assert (entry.default, entry.allowed) == (0.5, "a number in [0, 1)")
    lr = {e.option: e for e in explain.find("method.train.lr")}
    assert lr["prosparse"].allowed == "a number > 0" and "3e-5" in lr["prosparse"].note
    assert lr["topk"].default != "???" and lr["topk"].meaning == "peak learning rate"


def test_meanings_are_read_without_torch():
    code = "import sys; from sparsebench.config import explain; explain.entries(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_dependency_has_a_word():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    text = page("getting-started.md").partition("## Dependencies")[2]
    for requirement in [*project["dependencies"], *extras["test"], *extras["docs"]]:
        name = re.match(r"[\w.-]+", requirement).group()
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name
    assert all(f"`{extra}`" in text for extra in extras)


def test_every_make_target_is_named_and_in_a_group():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.M))
    for target in targets - {"help"}:
        assert f"`{target}`" in page("getting-started.md"), target
    assert re.findall(r"^##@ (\w+)", makefile, re.M) == ["run", "test", "docs", "bench", "release"]
    assert set(re.findall(r"^([a-z-]+):.*##", makefile.partition("##@")[2], re.M)) == targets - {"help"}


# ---------------------------------------------------------------------------------------------------------------------
# The pages


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_headline_figures_are_those_of_the_records():
    picture = script("make_docs_picture")
    speed, cost = dict(picture.speed("bench_h200", "float16")), picture.quality()
    dense = next(r["quality"]["perplexity"]["dense"] for r in picture.records("real_models"))
    at_half = {name: min(points, key=lambda p: abs(p[0] - 0.5))[1] * dense for name, points in cost.items()}
    summary = README.partition("## Results in short")[2]
    for figure in (f"{speed[0.5]:.2f}x", f"dense {dense:.2f}", f"LaRoSA {at_half['larosa']:.1f}",
                   f"TEAL {at_half['teal']:.1f}", f"WINA {at_half['wina']:.1f}"):  # fmt: skip
        assert figure in summary, figure


def test_configuration_page_is_up_to_date():
    assert page("configuration.md") == script("make_docs_configuration").page(), "make docs writes it"


def test_links_from_the_root_lead_somewhere():
    for file in PAGES[:3]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text()):
            if not target.startswith("https://") and not target.startswith("docs/experiments/"):
                assert (ROOT / target).exists(), f"{file.name}: {target}"


def test_files_and_tests_named_in_docs_exist():
    tests = {n for f in (ROOT / "tests").rglob("*.py") for n in re.findall(r"def (test_\w+)", f.read_text())}
    for file in PAGES:
        if file.parent.name == "experiments":
            continue
        text = file.read_text()
        for name in re.findall(r"`((?:sparsebench|tests|conf|scripts)/[\w./-]*)`", text):
            assert (ROOT / name).exists(), f"{file.name}: {name}"
        assert set(re.findall(r"`(test_\w+)`", text)) <= tests, file.name


def test_pages_cited_in_the_code_exist():
    for folder, suffix in (("sparsebench", "py"), ("tests", "py"), ("conf", "yaml")):
        for file in (ROOT / folder).rglob(f"*.{suffix}"):
            for cited in re.findall(r"docs/[\w/-]+\.md", file.read_text()):
                assert (ROOT / cited).exists() or "experiments/" in cited, f"{file.name}: {cited}"
            if folder != "tests":
                assert not re.search(r"\(README[,)]", file.read_text()), f"{file.name} cites README, see docs/"


def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    pytest.importorskip("material", reason="needs the docs extra")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
    )  # fmt: skip
    for file in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^"\s>]+)', file.read_text())
        loaded += re.findall(
            r'<link[^>]*rel="?(?:stylesheet|preconnect|icon)"?[^>]*href="?([^"\s>]+)', file.read_text()
        )
        outside = [link for link in loaded if re.match(r"(https?:)?//", link)]
        assert not outside, f"{file.name}: {outside}"
