"""One run from top to bottom.

config -> model + dataset -> dense = task.assess -> method.fit (train or calibrate) -> state -> method.apply
       -> neutral.check (with nothing dropped it is the dense model) -> sparse = task.assess -> task.compare
       -> time dense against sparse -> record
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sparsebench import config, ranks, tasks
from sparsebench.config.identity import contents
from sparsebench.data.base import Data
from sparsebench.measure import corners, estimate, limit, memory, neutral
from sparsebench.methods.base import Method, Work
from sparsebench.models import Loaded
from sparsebench.modules import storage
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.modules.masking import share_rules
from sparsebench.records import machine, progress, shared, state
from sparsebench.records.record import Record
from sparsebench.tasks import critical


def run(configuration: dict[str, Any], record: Record, folder: Path, track: Callable[[dict[str, Any]], None]) -> Record:
    """Carry out one run, filling `record` section by section, so that a failure keeps what was finished before it.

    configuration: the composed config as plain Python; folder: the run's own; track: takes rows of history.
    Raises ConfigError before anything slow, and whatever a later stage raises.
    """
    settings = config.build_settings(configuration)
    shared.begin(record.config_hash if settings.share else None)
    hardware, method, task = settings.hardware, settings.method, tasks.load(settings.model.kind)
    hardware.prepare()
    device = hardware.torch_device
    memory.restart(device)
    progress.with_peaks(lambda: memory.phase_peak(device))
    ranks.start(on_cpu=hardware.torch_device.type == "cpu")
    torch.manual_seed(settings.seed)
    record.env = machine.describe(hardware.torch_device.type) | {"hardware": hardware.read_back()}
    work = Work(settings.seed, hardware, Path(settings.output_dir), folder, task.batch_size(settings.eval), track)

    progress.begin(f"loading data {settings.dataset.name}")
    data: Data = settings.dataset.load(settings.seed)
    data.check_disjoint()
    plain = unquantised(settings, configuration, data, work, record)
    progress.begin(f"loading model {settings.model.name}")
    loaded: Loaded = settings.model.load(work, data)
    record.model = loaded.info
    method.check_model(loaded.module)

    progress.begin("dense model: evaluating")
    dense = assess_dense(loaded, data, settings, configuration, record, "dense")
    needed_later = settings.measure.latency or settings.eval.critical.enabled or task.keeps_dense
    untouched = storage.beside(loaded.module, method.changes) if needed_later else None

    inputs, expected = neutral.probe(loaded.module, data)
    progress.begin(f"{method.name}: fitting")
    fitted, record.fit = fit(method, loaded, data, work, settings, configuration)
    progress.begin(f"{method.name}: applying")
    record.fit |= {"peak_bytes": progress.last().get("peak_bytes"), "model_bytes": dense.weight_bytes}
    if not ranks.first():
        return record
    state.keep(work.output_dir / "states" / record.fit["state"], folder)
    state.check_quantisation(fitted, loaded.info)
    if settings.eval.critical.enabled:
        progress.begin("critical sparsity: searching on dev")
        record.extra["critical"] = critical.search(task, untouched, method, fitted, work, data, settings)
    untouched = untouched if settings.measure.latency or task.keeps_dense else None
    module = method.apply(loaded.module, fitted, work)
    share_rules(module, InputSparseLinear)
    record.fit |= {"neutral_relative_error": neutral.check(method, module, inputs, expected)}

    progress.begin("sparse model: evaluating")
    sparse = task.assess(loaded, module, data, settings)
    compared = task.compare(dense, sparse, data, settings)
    record.quality, record.sparsity, record.macs, record.bytes = (
        compared.quality, compared.sparsity, compared.macs, compared.bytes
    )  # fmt: skip
    record.extra |= compared.extra
    record.dataset = data.describe()
    record.memory = {"weight_bytes": sparse.weight_bytes, "dense_weight_bytes": dense.weight_bytes}
    if plain is not None:
        record.quality["nll"]["corners"] = corners.four(
            plain.dense.metrics, plain.sparse.metrics, dense.metrics, sparse.metrics
        )
        record.memory["unquantised_weight_bytes"] = plain.dense.weight_bytes

    if settings.measure.latency:
        progress.begin("timing dense against sparse")
        beside = {} if plain is None else {"unquantised": plain.module}
        timing = task.time(untouched, module, data, settings, **beside)
        record.latency, record.macs["executed"] = timing.latency, task.executed(record.macs, timing)
        record.memory["peaks"] = timing.peaks
        record.extra |= timing.extra
        if hardware.estimate:
            rates = estimate.rates(hardware.torch_device, hardware.torch_dtype)
            record.estimate = estimate.predict(hardware, record, *rates)
    record.extra |= fitted.info.get("extra", {})
    record.extra |= task.illustrate((untouched, dense), (module, sparse), data, folder)
    model_bytes = dense.weight_bytes + (0 if plain is None else plain.dense.weight_bytes)
    record.memory |= memory.of_run(device, model_bytes, task.cache_bytes(dense, settings))
    record.memory["second_copy"] = method.changes if untouched is not None else None
    if settings.measure.latency and "decode" in record.latency:  # after the peak: it reads memory of its own
        record.latency["limit"] = limit.of_decode(record.latency["decode"], record.bytes, device)
    return record


def assess_dense(
    loaded: Loaded, data: Data, settings: config.Settings, configuration: dict[str, Any], record: Record, name: str
) -> Any:
    """The Assessment of a dense model, or what another run made of the same one; `record.shared` then says which, by name.

    Random numbers go on as if nothing had been assessed, so that what follows is the same either way.
    """
    task = tasks.load(settings.model.kind)

    def make() -> Any:
        on_gpu = settings.hardware.torch_device.type == "cuda"
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
            return task.assess(loaded, loaded.module, data, settings)

    def decided_by() -> dict[str, Any]:
        return decides_dense(settings, configuration, loaded, task.tested(data, settings))

    dense, run_of = shared.shared("dense", decided_by, make)
    record.shared |= {name: run_of} if run_of else {}
    return dense


def decides_dense(
    settings: config.Settings, configuration: dict[str, Any], loaded: Loaded, tested: list[str]
) -> dict[str, Any]:
    """All that decides what is measured of a dense model: its files, what it is tested on, how, and where.

    A pretrained language model and the order of its text don't depend on the seed; of any other model the weights
    themselves count. Tasks of lm-eval may be downloaded, so they are taken to be the same for a day.
    """
    parts = {name: configuration[name] for name in ("model", "dataset", "eval")}
    source = getattr(settings.model, "weights", None) if settings.model.kind == "language" else None
    pretrained, known = (
        source == "pretrained",
        source in ("pretrained", "random"),
    )  # random ones follow from seed and place
    measure, hardware = settings.measure, settings.hardware.read_back()
    return parts | {
        "tested": tested, "measure": {"context": measure.context, "chunk": measure.chunk},
        "seed": None if pretrained else settings.seed, "weights": None if known else fingerprint(loaded.module),
        "day": now()[:10] if settings.eval.lm_eval.tasks else None, "contents": contents(parts), "machine": machine.machine(),
        "hardware": {name: hardware[name] for name in ("device", "devices", "dtype", "threads", "kernel")},
        "quantisation": loaded.info.get("quantisation"),
    }  # fmt: skip


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    whole = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


@dataclass
class Unquantised:
    """The same model before it was quantised, and the same method fitted on that."""

    dense: Any  # Assessment
    sparse: Any
    module: torch.nn.Module | None  # dense, where it will be timed


def unquantised(
    settings: config.Settings, configuration: dict[str, Any], data: Data, work: Work, record: Record
) -> Unquantised | None:
    """What a run with `model.quantize=int8|int4` compares with; None where weights are as they were stored.

    Its fit is that of a run with model.quantize=none, cached under that run's key.
    """
    if getattr(settings.model, "quantize", "none") in ("none", "keep"):
        return None
    changes = {"quantize": "none", "quantize_group": 128, "quantize_axis": "input"}
    configuration = configuration | {"model": configuration["model"] | changes}
    model, method, task = replace(settings.model, **changes), settings.method, tasks.load(settings.model.kind)
    settings = replace(settings, model=model)
    progress.begin(f"loading model {model.name}, not quantised")
    loaded = model.load(work, data)
    progress.begin("dense model, not quantised: evaluating")
    dense = assess_dense(loaded, data, settings, configuration, record, "unquantised")
    kept = storage.beside(loaded.module, method.changes) if settings.measure.latency else None
    progress.begin(f"{method.name}: fitting, not quantised")
    fitted, _ = fit(method, loaded, data, work, settings, configuration)
    module = method.apply(loaded.module, fitted, work)
    progress.begin("sparse model, not quantised: evaluating")
    return Unquantised(dense, task.assess(loaded, module, data, settings), kept)


def fit(
    method: Method, loaded: Loaded, data: Data, work: Work, settings: config.Settings, configuration: dict[str, Any]
) -> tuple[state.State, dict[str, Any]]:
    """(the method's state, from its cache where it was fitted before; the record's fit section)."""
    key = state.key(settings, configuration, machine.machine())
    path = work.output_dir / "states" / f"{settings.model.name}-{method.name}-{key}.safetensors"
    work.folder = path.with_suffix("")  # checkpoints lie beside the state

    def quantised() -> state.State:
        """The state with how the weights it was fitted on are stored, so that it serves no others."""
        made = method.fit(loaded, data, work)
        made.info |= {"quantisation": loaded.info["quantisation"]} if "quantisation" in loaded.info else {}
        return made

    fitted, about = state.cached(path, quantised)
    about |= {"kind": fitted.info.get("kind", "none"), "tokens": fitted.info.get("tokens", 0), "state": path.name}
    if ranks.first():
        shutil.rmtree(work.folder, ignore_errors=True)  # checkpoints of a fit that is now safe in its state
    return fitted, about


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def timed_run(
    configuration: dict[str, Any], record: Record, folder: Path, track: Callable[[dict[str, Any]], None]
) -> Record:
    """`run` with the wall clock in the record."""
    record.started_at, start = now(), time.perf_counter()
    progress.taken()
    try:
        return run(configuration, record, folder, track)
    finally:
        shared.begin(None)
        record.phases = progress.taken()
        record.seconds = time.perf_counter() - start
