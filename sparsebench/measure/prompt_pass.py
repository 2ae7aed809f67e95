"""Timing of a whole prompt in one pass: every engine of each side, and the fastest of them."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from sparsebench import engines
from sparsebench.measure import clock
from sparsebench.measure.clock import Contender, summary
from sparsebench.modules import storage

log = logging.getLogger(__name__)


def prefills(
    modules: dict[str, nn.Module], prompt: torch.Tensor, hardware
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every way to take in a prompt [1, T], by side and engine, and why others could not be had.

    A masked-dense prompt, compiled, has its masks joined to what stands before them: they cost nothing of their own.
    """
    contenders, refused = {}, {}
    compiled = [True] if engines.compiles(hardware) and hardware.engine != "eager" else []
    for side, module in modules.items():
        for fast in (False, *compiled):
            run = torch.compile(module.forward, mode="reduce-overhead", fullgraph=True) if fast else module

            def call(_, run=run):
                with torch.no_grad():
                    return run(input_ids=prompt, use_cache=False, logits_to_keep=1).logits

            name = f"{side}/{'compiled' if fast else 'eager'}"
            contender = Contender(call, functools.partial(storage.put, storage.lie(module)))
            try:
                contender.laid(0)
            except RuntimeError as error:  # no compiler, no memory
                if not fast:
                    raise
                refused[name] = str(error).strip().partition("\n")[0]
                log.warning("prefill: no %s (%s)", name, refused[name])
                continue
            contenders[name] = contender
    return contenders, refused


def of_prompt(times: dict[str, list[float]], skipping: bool) -> dict[str, Any]:
    """The `prefill` section from samples by `side/engine`; a speed-up only where a kernel skipped."""
    section = clock.fastest({name: summary(each) for name, each in times.items()})
    dense, sparse = (times[f"{side}/{section[f'{side}_engine']}"] for side in ("dense", "sparse"))
    return section | (clock.speedup(dense, sparse) if skipping else {})
