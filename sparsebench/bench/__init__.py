"""`sparsebench-bench`: what sparsity does to the clock, for the shapes of one model with random weights.

Each projection, the FFN block and the whole decode step are timed dense and sparse in one process, in turn. Weights
rotate over copies that together pass the last cache, so they come from memory; thresholds are exact quantiles of the
input, so the sparsity is real; inputs follow published histograms of Llama-2-7B where given, a normal distribution
otherwise. Beside each time stands the bandwidth it means and the share of the read bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebench.config import early, setting

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Bench:
    """Settings of a benchmark run."""

    parts: list[str] = setting(choices=("projections", "ffn", "step", "experts"))
    sparsities: list[float] = setting(ge=0, lt=1)
    contexts: list[int] = setting(gt=1)
    samples: int = setting(ge=30)
    warmup: int = setting(ge=3)
    histograms: str | None
    histogram_layer: int = setting(ge=0)
    output: str = setting(pattern=r"[^\x00-\x1f\x7f]+", pattern_text="a folder without control characters")
    seed: int = setting(ge=0)
    model: Any
    hardware: Any

    def problems(self) -> list[str]:
        problems = self.hardware.problems(None)
        if self.model.kind != "language":
            problems.append(f"model must be a language model, got {self.model.name} ({self.model.kind})")
        elif self.model.architecture is None:
            problems.append(f"model={self.model.name} has no architecture to time with random weights")
        else:
            problems += depth_problems(self.model)
        problems += [
            f"{key} must name something, got []"
            for key in ("parts", "sparsities", "contexts")
            if not getattr(self, key)
        ]
        problems += filter(None, [early.output_problem(self.output, "output")])
        if self.histograms is not None and not Path(self.histograms, "histograms").is_dir():
            problems.append(f"histograms must be a folder with histograms/layer-N/..., got {self.histograms!r}")
        return problems


def depth_problems(model: Any) -> list[str]:
    """Lines about an architecture that no such model has, or more blocks than it has."""
    from sparsebench.models import structure

    try:
        problem = structure.depth_problem(model.name, structure.of_fields(model.architecture), model.num_layers)
    except ValueError as error:
        problem = str(error)
    return [problem] if problem else []


def run(settings: Bench, configuration: dict) -> Path:
    """All parts, written as they are finished: record, table and plot in the output folder."""
    from sparsebench.bench.experts import time_experts
    from sparsebench.bench.output import plot, table
    from sparsebench.bench.projections import time_ffn, time_projections
    from sparsebench.bench.step import time_step
    from sparsebench.measure.clock import read_bandwidth
    from sparsebench.records import files, machine

    hardware = settings.hardware
    hardware.prepare()
    settings.model.weights = "random"
    config = settings.model.config()
    bandwidth = read_bandwidth(hardware.torch_device)
    results = {
        "schema_version": 1, "kind": "bench", "model": settings.model.name, "weights": "random", "config": configuration,
        "input": (settings.histograms and "published Llama-2-7B histograms") or "normal distribution",
        "env": machine.describe(hardware.torch_device.type) | {"hardware": hardware.read_back()},
        "read_bandwidth_gbs": bandwidth,
    }  # fmt: skip
    folder = Path(settings.output)
    parts = {
        "projections": lambda: time_projections(config, settings, bandwidth),
        "ffn": lambda: time_ffn(config, settings, bandwidth),
        "step": lambda: time_step(settings),
        "experts": lambda: time_experts(settings),
    }
    for part in settings.parts:
        log.info("timing %s", part)
        results[part] = parts[part]()
        files.write_atomic(folder / "result.json", json.dumps(files.scrubbed(files.plain(results)), indent=1).encode())
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    (folder / "speedup.png").write_bytes(plot(results))
    return folder


def main() -> None:
    """Entry point of the console script."""
    from sparsebench.cli import guarded
    from sparsebench.records import files

    files.speak_utf8()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger().handlers[0].addFilter(files.scrubbing)
    sys.exit(guarded(command))


def command() -> int:
    """The body of `sparsebench-bench`. Returns the exit code; raises ConfigError for what can't be timed."""
    import hydra

    from sparsebench import config as checks
    from sparsebench.cli import complain
    from sparsebench.config import arguments, compose

    words = sys.argv[1:]
    given = arguments.read("sparsebench-bench", words)
    sys.argv[1:] = words  # Hydra reads them again
    if not (given.hydra_help or given.shell_completion):
        planned = compose.compose_all(given.overrides, given.multirun, given.config_dir, name="bench")
        problems = [line for each in planned for line in early.wrong_values(each, early.SETTINGS["bench"])]
        if problems:
            raise checks.ConfigError(problems)

    def task(composed) -> None:
        configuration = compose.to_dict(composed)
        configuration.pop("dataset")  # models name one, timing needs none
        problems: list[str] = []
        settings = checks.build(configuration, "", problems, Bench)
        problems += settings.problems() if settings is not None else []
        if problems:  # an exception would end in Hydra's own words
            for line in problems:
                complain(line)
            sys.exit(2)
        folder = run(settings, configuration)
        print((folder / "table.md").read_text(encoding="utf-8"))
        print(json.dumps({"record": str(folder / "result.json"), "plot": str(folder / "speedup.png")}))

    app = hydra.main(version_base="1.3", config_path=f"pkg://{compose.CONFIG_MODULE}", config_name="bench")
    app(task)()
    return 0
