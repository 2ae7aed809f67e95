"""The whole flow of one run, to be read from top to bottom.

config -> model + dataset -> method.fit (train or calibrate) -> state -> method.apply -> sparse model
       -> evaluate, measure sparsity, count MACs and bytes, time dense against sparse -> record
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from sparsebench import config, env, estimate, kinds, measure, processes, state, tasks
from sparsebench.methods import Work
from sparsebench.record import Record

log = logging.getLogger(__name__)


def run(configuration: dict, record: Record, folder: Path, track: Callable[[dict], None]) -> Record:
    """Carry out one run, filling `record` section by section, so that a failure keeps what was finished before it.

    configuration: the composed config as plain Python; folder: the run's own; track: takes rows of history.
    Raises ConfigError before anything slow, and whatever a later stage raises.
    """
    settings = config.build_settings(configuration)
    hardware, method, kind = settings.hardware, settings.method, kinds.load(settings.model.kind)
    hardware.prepare()
    processes.start(on_cpu=hardware.torch_device.type == "cpu")
    torch.manual_seed(settings.seed)
    record.env = env.describe(hardware.torch_device.type) | {"hardware": hardware.read_back()}

    output_dir = Path(settings.output_dir)
    work = Work(settings.seed, hardware, output_dir, folder, kind.batch_size(settings.eval), track)
    data = settings.dataset.load(settings.seed)
    data.check_disjoint()
    loaded = settings.model.load(work, data)
    record.model = loaded.info

    log.info("dense model: evaluating")
    dense_quality, dense_counts = kind.quality(loaded.module, data.test, settings.eval)
    dense_more = kind.more(loaded.module, data, settings.eval)
    dense_tasks = tasks.score(loaded.module, loaded.tokenizer, settings.eval) if settings.eval.tasks else {}
    dense_costs = kind.dense_costs(loaded.module, data)
    dense_bytes = measure.weight_bytes(loaded.module)
    dense = copy.deepcopy(loaded.module) if settings.measure.latency or kind.KEEPS_DENSE else None

    log.info("%s: fitting", method.name)
    key = state.key(settings, configuration, env.machine())
    path = output_dir / "states" / f"{settings.model.name}-{method.name}-{key}.safetensors"
    work.folder = path.with_suffix("")
    peak_before = measure.restart_peak(hardware.torch_device)
    fitted, record.fit = state.cached(path, lambda: method.fit(loaded, data, work))
    record.fit |= {"kind": fitted.info.get("kind", "none"), "tokens": fitted.info.get("tokens", 0), "state": path.name}
    record.fit |= {"peak_bytes": measure.peak_bytes(hardware.torch_device), "model_bytes": dense_bytes}
    if not processes.first():
        return record
    shutil.rmtree(work.folder, ignore_errors=True)  # checkpoints of a fit that is now safe in its state
    state.keep(path, folder)
    sparse = method.apply(loaded.module, fitted, work)

    log.info("sparse model: evaluating")
    sparse_quality, counts = kind.quality(sparse, data.test, settings.eval)
    sparse_more = kind.more(sparse, data, settings.eval)
    record.extra |= {name: {"dense": dense_more[name], "sparse": found} for name, found in sparse_more.items()}
    protocol = kind.protocol(data.test, method)
    record.quality = kind.compare(dense_quality, sparse_quality, protocol)
    if dense_tasks:
        sparse_tasks = tasks.score(sparse, loaded.tokenizer, settings.eval)
        record.quality |= tasks.compare(dense_tasks, sparse_tasks, settings.eval, protocol["prompt_policy"])
    record.dataset = data.describe()
    record.sparsity, record.macs, record.bytes = kind.figures(
        method, sparse, dense_costs, dense_counts, counts, settings.measure, measure.skips(sparse, hardware)
    )
    record.memory = {"weight_bytes": measure.weight_bytes(sparse), "dense_weight_bytes": dense_bytes}

    if settings.measure.latency:
        log.info("timing dense against sparse")
        record.latency = kind.latency(dense, sparse, data, settings.measure, hardware, record.sparsity)
        if hardware.estimate:
            rates = estimate.rates(hardware.torch_device, hardware.torch_dtype)
            record.estimate = estimate.predict(hardware, record, *rates)
    record.extra |= fitted.info.get("extra", {}) | kind.extra(
        dense, sparse, (dense_quality, sparse_quality), data, folder
    )
    record.memory["peak_bytes"] = max(peak_before, measure.peak_bytes(hardware.torch_device))
    return record


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def timed_run(configuration: dict, record: Record, folder: Path, track: Callable[[dict], None]) -> Record:
    """`run` with the wall clock in the record."""
    record.started_at, start = now(), time.perf_counter()
    try:
        return run(configuration, record, folder, track)
    finally:
        record.seconds = time.perf_counter() - start
