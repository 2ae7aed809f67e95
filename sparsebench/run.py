"""The whole flow of one run, to be read from top to bottom.

config -> model + dataset -> method.fit (train or calibrate) -> state -> method.apply -> sparse model
       -> evaluate, measure sparsity, count MACs and bytes, time dense against sparse -> record
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from sparsebench import config, env, evaluate, macs, measure, sparsity, state
from sparsebench.methods import Work
from sparsebench.record import Record

log = logging.getLogger(__name__)


def run(configuration: dict, record: Record, folder: Path, track: Callable[[dict], None]) -> Record:
    """Carry out one run, filling `record` section by section, so that a failure keeps what was finished before it.

    configuration: the composed config as plain Python; folder: the run's own; track: takes rows of history.
    Raises ConfigError before anything slow, and whatever a later stage raises.
    """
    settings = config.build_settings(configuration)
    hardware, method = settings.hardware, settings.method
    hardware.prepare()
    torch.manual_seed(settings.seed)
    record.env = env.describe(hardware.torch_device.type) | {"hardware": hardware.read_back()}

    output_dir = Path(settings.output_dir)
    work = Work(settings.seed, hardware, output_dir, folder, settings.eval.batch_size, track)
    data = settings.dataset.load(settings.seed)
    data.check_disjoint()
    loaded = settings.model.load(work, data)
    data.set_tokenizer(loaded.tokenizer)
    record.model = loaded.info

    log.info("dense model: evaluating")
    limit, batch = settings.eval.test_sequences, settings.eval.batch_size
    dense_quality, _ = evaluate.language_quality(loaded.module, data.test, limit, batch)
    dense_costs = macs.dense_sites(loaded.module)
    dense_bytes = measure.weight_bytes(loaded.module)
    dense = copy.deepcopy(loaded.module) if settings.measure.latency else None

    log.info("%s: fitting", method.name)
    key = state.key(settings, configuration, env.machine())
    path = output_dir / "states" / f"{settings.model.name}-{method.name}-{key}.safetensors"
    work.folder = path.with_suffix("")
    peak_before = measure.restart_peak(hardware.torch_device)
    fitted, record.fit = state.cached(path, lambda: method.fit(loaded, data, work))
    record.fit |= {"kind": fitted.info.get("kind", "none"), "tokens": fitted.info.get("tokens", 0), "state": path.name}
    record.fit |= {"peak_bytes": measure.peak_bytes(hardware.torch_device), "model_bytes": dense_bytes}
    record.extra |= fitted.info.get("findings", {})
    sparse = method.apply(loaded.module, fitted, work)

    log.info("sparse model: evaluating")
    sparse_quality, counters = evaluate.language_quality(sparse, data.test, limit, batch)
    protocol = {
        "split": "test", "window": data.test.sequence_length, "stride": data.test.sequence_length,
        "bos": data.test.bos, "prompt_policy": getattr(method, "prompt", "all"),
    }  # fmt: skip
    record.quality = evaluate.compare(dense_quality, sparse_quality, protocol)
    record.dataset = data.describe()
    measured = sparsity.summarise(sparse, counters)
    record.sparsity = describe_sparsity(method.requested, measured, dense_costs, sparsity.zero_weights(sparse))
    skips = hardware.skips and bool(measured)
    record.macs, record.bytes = macs.account(dense_costs, sparse, measured, settings.measure.context, skips)
    record.memory = {"weight_bytes": measure.weight_bytes(sparse), "dense_weight_bytes": dense_bytes}

    if settings.measure.latency:
        log.info("timing dense against sparse")
        needed = max(settings.measure.context + settings.measure.samples, settings.measure.prompt)
        tokens = data.test.sequences(-(-needed // data.test.sequence_length)).flatten()
        share = record.sparsity["model_wide_of_sparse_tokens"]
        record.latency = measure.latency(dense, sparse, tokens, settings.measure, hardware, share)
    record.memory["peak_bytes"] = max(peak_before, measure.peak_bytes(hardware.torch_device))
    return record


def describe_sparsity(requested: float | None, measured: dict, dense_costs: dict, zero_weights: int) -> dict:
    """The record's sparsity section: what was asked for beside what was counted, per site and model-wide."""
    weights = {name: int(cost.dense_macs) for name, cost in dense_costs.items()}
    shares = {name: site.sparsity for name, site in measured.items()}
    decode = {name: site.sparsity_of_sparse_tokens for name, site in measured.items()}
    zero = dict.fromkeys(weights, 0.0)
    tokens = next(iter(measured.values()), None)
    total = tokens.sparse_tokens + tokens.dense_tokens if tokens else 0
    return {
        "requested": requested,
        "model_wide": sparsity.model_wide(zero | shares, weights),
        "model_wide_of_sparse_tokens": sparsity.model_wide(zero | decode, weights),
        "weights": zero_weights / sum(weights.values()) if weights else 0.0,
        "sparse_token_fraction": tokens.sparse_tokens / total if total else 0.0,
        "per_site": {
            name: dataclasses.asdict(measured[name]) if name in measured else {"sparsity": 0.0, "weight": weight}
            for name, weight in weights.items()
        },
        "definition": "share of (token, input channel) pairs dropped, weighted by parameters of the block maps; "
        "`weights`: share of the block maps' weights that are 0",
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def timed_run(configuration: dict, record: Record, folder: Path, track: Callable[[dict], None]) -> Record:
    """`run` with the wall clock in the record."""
    record.started_at, start = now(), time.perf_counter()
    try:
        return run(configuration, record, folder, track)
    finally:
        record.seconds = time.perf_counter() - start
