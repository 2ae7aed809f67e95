"""Critical sparsity of one run's method: every setting of its knob is a fresh sparse model, scored on dev; the one chosen, on test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from sparsebench.measure import critical, macs
from sparsebench.measure.uncertainty import Pieces
from sparsebench.modules import storage
from sparsebench.sites import find_blocks
from sparsebench.tasks.base import Task


def search(
    task: Task, dense: nn.Module, method: Any, state: Any, work: Any, data: Any, settings: Any
) -> dict[str, Any]:
    """The record's `extra.critical`. dense: the untouched model; method, state, work: as its `apply` takes them."""
    metric = settings.eval.critical.metric or task.keepable[0]
    knob = method.knob
    weights = block_weights(dense)

    def sparse(value: float) -> nn.Module:
        return replace(method, **{knob.name: value}).apply(storage.beside(dense, method.changes), state, work)

    def on(split: Any, limit: int | None) -> tuple[Pieces, Callable[[float], critical.Point]]:
        """(the dense model's pieces, a function that measures one setting of the knob) on a split."""
        whole = critical.pieces_of(metric, task.score(dense, split, limit, settings, metric)[0])

        def at(value: float) -> critical.Point:
            try:
                module = sparse(value)
            except ValueError:  # a setting further out that the method refuses
                if value == knob.least:
                    raise
                return critical.Point(value, None, None, None, None)
            metrics, counters = task.score(module, split, limit, settings, metric)
            kept = critical.kept(metric, whole, critical.pieces_of(metric, metrics))
            return critical.Point(value, *kept, *critical.dropped(module, counters, weights))

        return whole, at

    whole, at = on(data.dev, task.dev_limit(settings))
    result = critical.search(at, knob, metric, settings.eval.critical)
    result["dev"] = {"dense": whole.mean, **whole.counts(), "samples": int(whole.tokens.sum())}
    if result["value"] is not None:
        result["test"] = vars(on(data.test, task.test_limit(settings))[1](result["value"]))
    return result


def block_weights(dense: nn.Module) -> dict[str, int]:
    """Parameters of the block maps by site; nothing for a network without blocks."""
    try:
        find_blocks(dense)
    except ValueError:
        return {}
    return {name: int(cost.dense_macs) for name, cost in macs.dense_sites(dense).items()}
