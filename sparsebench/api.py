"""sparsebench from Python: `load` rebuilds the sparse model of a finished run, `run` makes a run and returns its record.

A run's folder (result.json + state.safetensors) is the artifact: copied elsewhere it still loads, as long as the dense
model it names can be had. `run` is the installed command in a process of its own, so a run from Python is the same run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsebench import cli, config
from sparsebench.config.compose import compose_all
from sparsebench.records import record

if TYPE_CHECKING:
    from torch import nn

    from sparsebench.hardware import Hardware
    from sparsebench.models import Loaded


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
    content = record.read(path)
    if code != cli.OK or content is None or content["status"] != "finished":
        problem = ((content or {}).get("error") or {}).get("message") or f"exit code {code}"
        raise RunFailed(f"{path.parent}: {problem}", content)
    return content


def load(path: str | Path, hardware: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The sparse model of a finished run, ready for `generate`, as a torch module with its tokenizer as `.tokenizer`.

    path: the run's folder or its result.json. hardware: a name in conf/hardware; None = the run's own target where it
    is present, else `auto`. One-token calls use the target's kernel, longer ones masked-dense. Sets torch's threads as
    a run does. Raises ValueError where the folder holds no finished run, where its state is missing or damaged, where
    its config names code from outside sparsebench that was not imported before, and for a model that runs code of its
    own (trust_remote_code) unless that is allowed here, too.
    """
    import torch

    from sparsebench.methods.base import Work
    from sparsebench.records import state

    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    content, reason = record.look(file)
    if content is None or content["status"] != "finished":
        raise ValueError(f"{file} is no record of a finished run: {reason or (content or {}).get('status')}")
    configuration = content["config"]
    check_trusted(configuration, trust_remote_code)
    problems: list[str] = []
    settings: config.Settings = config.build(configuration, "", problems, config.Settings)
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    if hardware is not None or settings.hardware.problems(settings):
        chosen = compose_all([f"hardware={hardware or 'auto'}"])[0]["hardware"]
        settings.hardware = config.build(chosen, "hardware", problems)
        problems += settings.hardware.problems(settings)
        if problems:
            raise ValueError("; ".join(problems))
    settings.hardware.prepare()
    torch.manual_seed(settings.seed)
    folder = file.parent.resolve()
    root = folder.parents[2] if len(folder.parents) > 2 else folder
    work = Work(
        settings.seed,
        cast("Hardware", settings.hardware),
        root,
        folder,
        settings.eval.text.batch_size,
        lambda row: None,
    )
    scratch = getattr(settings.model, "weights", None) == "scratch"
    loaded: Loaded = settings.model.load(work, settings.dataset.load(settings.seed) if scratch else None)
    fitted = state.read(folder / state.FILE)
    if fitted is None:
        raise ValueError(f"{folder / state.FILE} is missing or damaged: run with force=true to make it again")
    sparse: nn.Module = settings.method.apply(loaded.module, fitted, work)
    sparse.tokenizer = loaded.tokenizer
    return sparse


def check_trusted(configuration: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise ValueError where building from a record's config would run code that nobody here chose."""
    for group, node in configuration.items():
        if not isinstance(node, dict):
            continue
        module = str(node.get("_target_", "sparsebench.")).rpartition(".")[0]
        if module and module.split(".")[0] != "sparsebench" and module not in sys.modules:
            raise ValueError(f"{group}._target_ is in {module}, which is not part of sparsebench: import it first")
        if node.get("trust_remote_code") and not trust_remote_code:
            raise ValueError(
                f"{group}.trust_remote_code is set in the record: load(..., trust_remote_code=True) allows it"
            )
