"""sparsebench from Python: `load` rebuilds the sparse model of a finished run, `run` makes a run and returns its record.

A run's folder (result.json + state.safetensors) is the artifact: copied elsewhere it still loads, as long as the dense
model it names can be had. `run` is the installed command in a process of its own, so a run from Python is the same run.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sparsebench import cli, config
from sparsebench.config.compose import compose_all
from sparsebench.config.settings import HardwarePart, MethodPart, ModelPart
from sparsebench.records import record

if TYPE_CHECKING:
    from torch import nn

    from sparsebench.records.state import State


class RunFailed(RuntimeError):
    """A run that did not finish; `record` is what it left, or None where none could be written."""

    def __init__(self, message: str, content: dict[str, Any] | None):
        super().__init__(message)
        self.record = content


def run(overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The record of the run that `sparsebench <overrides>` describes, made now or finished before.

    overrides: as on the command line, e.g. ["method=teal", "method.sparsity=0.65"]. Messages go to stderr. Raises
    config.ConfigError (a ValueError) naming everything wrong with the configuration, and RunFailed with the record.
    """
    overrides = list(overrides)
    (configuration,) = compose_all(overrides)
    cli.check(configuration)
    path = cli.location(configuration)[0] / "result.json"
    command = [sys.executable, "-m", "sparsebench", *overrides]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    content, problem = record.read_any(path)
    if code != cli.OK or content is None or content["status"] != "finished":
        problem = ((content or {}).get("error") or {}).get("message") or problem or f"exit code {code}"
        raise RunFailed(f"{path.parent}: {problem}", content)
    return content


def load(path: str | Path, hardware: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The sparse model of a finished run, ready for `generate`, as a torch module with its tokenizer as `.tokenizer`.

    path: the run's folder or its result.json. hardware: a name in conf/hardware; None = the run's own target where it
    is present, else `auto`. One-token calls use the target's kernel, longer ones masked-dense. Sets torch's threads as
    a run does. Nothing is trained or written, and data and lm-eval are not needed.

    Raises ValueError where the folder holds no finished run of this schema, where its state is missing, damaged or of
    another run, where a model trained from scratch is missing (with the command that makes it), where its config names
    code from outside sparsebench that was not imported before, and for a model that runs code of its own
    (trust_remote_code) unless that is allowed here, too.
    """
    import torch

    from sparsebench.methods.base import Work
    from sparsebench.records.state import check_quantisation

    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    content, problem = record.read_any(file)
    if content is None or problem is not None:
        raise ValueError(f"{file} can't be loaded: {problem}")
    if content["status"] != "finished":
        raise ValueError(f"{file} is of a run that {HOW_IT_ENDED[content['status']]}, not of a finished one")
    configuration, seed = content["config"], content["config"].get("seed")
    absent = [part for part in ("env", "model", "fit") if content[part] is None]
    if absent or not isinstance(seed, int):
        raise ValueError(f"{file} can't be loaded: it has no {', '.join(absent) or 'seed in its config'}")
    check_trusted(configuration, trust_remote_code)
    problems: list[str] = []
    parts = {"model": ModelPart, "method": MethodPart, "hardware": HardwarePart}
    model, method, target = (config.build(configuration.get(g), g, problems, part=p) for g, p in parts.items())
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    if hardware is not None or target.problems(MEASURED):
        chosen = compose_all([f"hardware={hardware or 'auto'}"])[0]["hardware"]
        target = config.build(chosen, "hardware", problems)
        problems += target.problems(MEASURED)
        if problems:
            raise ValueError("; ".join(problems))
    folder = file.parent.resolve()
    fitted = own_state(folder, content)
    if getattr(model, "weights", None) in ("scratch", "finetuned"):
        model = trained(model, folder, content)
    target.prepare()
    torch.manual_seed(seed)
    work = Work(seed, target, folder, folder, 1, lambda row: None)
    loaded = model.load(work, shape_of(content))
    check_quantisation(fitted, loaded.info)
    sparse: nn.Module = method.apply(loaded.module, fitted, work)
    sparse.tokenizer = loaded.tokenizer
    return sparse


HOW_IT_ENDED = {"failed": "failed", "interrupted": "was interrupted"}
MEASURED = SimpleNamespace(measure=SimpleNamespace(latency=True))  # what an estimated target asks of a run's settings


def own_state(folder: Path, content: dict[str, Any]) -> State:
    """The state in a run's folder. Raises ValueError where it is missing, damaged, or not what the record was made with."""
    from sparsebench.records import state

    file = folder / state.FILE
    try:
        fitted, checksum, _ = state.load(file)
    except FileNotFoundError as error:
        raise ValueError(f"{error}: run with force=true to make it again") from error
    except state.Damaged as error:
        raise ValueError(f"{file} is damaged ({error}): run with force=true to make it again") from error
    if checksum != content["fit"]["state_sha256"]:
        raise ValueError(f"{file} is the state of another run: its SHA-256 is not the one in the record")
    return fitted


def trained(model: Any, folder: Path, content: dict[str, Any]) -> Any:
    """The model settings with the weights that the run trained from scratch, which lie beside the runs' folders.

    Raises ValueError naming what is missing and the command that makes it.
    """
    source = Path(content["model"]["source"])
    beside = folder.parents[2] / "models" / source.name if len(folder.parents) > 2 else source
    home = next((p for p in (beside, source) if (p / "training.json").is_file()), None)
    if home is None:
        command = shlex.join(["sparsebench", *content["env"]["argv"][1:]])
        raise ValueError(
            f"{content['name']} was trained from scratch, and neither {beside} nor {source} holds the trained model: "
            f"load never trains; make it with: {command}"
        )
    weights = home / "model.safetensors" if model.kind == "vision" else home
    own_recipe = {"recipe": "dataset"} if hasattr(model, "recipe") else {}
    return dataclasses.replace(model, weights="pretrained", path=str(weights), **own_recipe)


def shape_of(content: dict[str, Any]) -> SimpleNamespace | None:
    """What a classifier takes from its data set (channels, size, number of classes), as the record has it."""
    import torch

    about = content["model"]
    if "classes" not in about:
        return None
    channels, size, _ = about.get("input", (None, None, None))
    split = SimpleNamespace(channels=channels, size=size, fixed_size=size, labels=torch.empty(0, dtype=torch.int64))
    return SimpleNamespace(
        fit=split,
        dev=split,
        test=split,
        classes=range(about["classes"]),
        info={},
        set_tokenizer=lambda *arguments: None,
    )


def check_trusted(configuration: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise ValueError where building from a record's config would run code that nobody here chose."""
    for key, value in leaves(configuration):
        name = key.rpartition(".")[2]
        module = str(value).rpartition(".")[0] if name == "_target_" else ""
        if module and module.split(".")[0] != "sparsebench" and module not in sys.modules:
            raise ValueError(f"{key} is in {module}, which is not part of sparsebench: import it first")
        if name == "trust_remote_code" and value and not trust_remote_code:
            raise ValueError(f"{key} is set in the record: load(..., trust_remote_code=True) allows it")


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value of a configuration, in lists, too."""
    if not isinstance(node, (dict, list)):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from leaves(value, f"{key}.{name}" if key else str(name))
