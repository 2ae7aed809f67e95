"""The clock: order must not decide, known durations, spread and load that make a figure worthless, break-even."""

import itertools
import random
import re
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsebench.measure import clock
from sparsebench.measure.clock import Contender

CPU = torch.device("cpu")


def test_each_sample_follows_an_untimed_call_and_the_order_turns():
    seen = []
    contenders = [Contender(lambda i, name=name: seen.append((name, i))) for name in "abc"]
    times, _ = clock.interleaved(contenders, warmup=2, samples=3, device=CPU)
    assert seen[:6] == [(name, i) for i in range(2) for name in "abc"]
    rounds = [("abc", 2), ("acb", 4), ("cab", 6)]  # turned by one place each round, backwards in every second
    assert seen[6:] == [(name, first + k) for order, first in rounds for name in order for k in range(2)]
    assert list(clock.timed_calls(2, 3)) == [3, 5, 7] and [len(t) for t in times] == [3, 3, 3]
    seen.clear()
    clock.interleaved([Contender(seen.append, untimed=3)], 2, 2, CPU)
    assert seen == list(range(10)) and list(clock.timed_calls(2, 2, 3)) == [5, 9]


class Machine:
    """A made-up machine: a cache of so many lines, the least recently used goes; a hit takes 1 ms, a miss 10."""

    def __init__(self, lines: int):
        self.lines, self.cache, self.seconds = lines, OrderedDict(), 0.0

    def read(self, lines) -> None:
        for line in lines:
            self.seconds += 0.001 if line in self.cache else 0.010
            self.cache[line] = None
            self.cache.move_to_end(line)
            while len(self.cache) > self.lines:
                self.cache.popitem(last=False)


READS = {  # the eager step sweeps the cache; the others share their weights
    "eager": [f"e{i}" for i in range(200)],
    "dense": [f"w{i}" for i in range(60)],
    "sparse": [f"w{i}" for i in range(0, 60, 2)],
}


def medians(order, measure, monkeypatch) -> dict[str, float]:
    """name -> median ms on a fresh machine, contenders in this order."""
    machine = Machine(100)
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: machine.seconds))
    contenders = [Contender(lambda _, name=name: machine.read(READS[name])) for name in order]
    return dict(zip(order, (clock.summary(t)["median_ms"] for t in measure(contenders)), strict=True))


def test_contenders_that_pollute_each_others_cache_are_measured_alike_in_any_order(monkeypatch):
    def one_after_another(contenders):
        return list(
            zip(*([clock.timed(lambda c=c: c.call(0), CPU) for c in contenders] for _ in range(12)), strict=True)
        )

    def ratios(measure):
        actual = (medians(order, measure, monkeypatch) for order in itertools.permutations(READS))
        return [each["dense"] / each["sparse"] for each in actual]

    before = ratios(one_after_another)
    assert max(before) > 2 * min(before)  # the order alone: what the protocol is there for
    assert ratios(lambda c: clock.interleaved(c, 3, 10, CPU)[0]) == pytest.approx([2.0] * 6)


@pytest.mark.parametrize(("untimed", "alike"), [(1, False), (8, True)])
def test_steps_that_read_other_channels_each_time_need_more_than_one_untimed_call(untimed, alike, monkeypatch):
    """A sparse step reads half of its weights, another half each time; its neighbour in the list reads all of them."""

    def ratio(order) -> float:
        machine, generator = Machine(100), random.Random(0)
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: machine.seconds))
        weights = [f"w{i}" for i in range(60)]
        calls = {
            "dense": lambda _: machine.read([f"d{i}" for i in range(60)]),
            "eager": lambda _: machine.read([f"e{i}" for i in range(200)]),
            "all": lambda _: machine.read(weights),
            "half": lambda _: machine.read(generator.sample(weights, 30)),
        }
        times, _ = clock.interleaved([Contender(calls[name], untimed=untimed) for name in order], 3, 60, CPU)
        values = {name: statistics.mean(t) for name, t in zip(order, times, strict=True)}
        return values["dense"] / values["half"]

    one, other = ratio(["dense", "half", "all", "eager"]), ratio(["all", "half", "eager", "dense"])
    steady = 60 / 30  # everything in the cache, as when only this step runs
    assert (one == pytest.approx(steady, rel=0.1) and other == pytest.approx(steady, rel=0.1)) == alike
    if alike:
        assert abs(one / other - 1) < 0.05


def test_known_durations():
    (fast, slow), _ = clock.interleaved(
        [Contender(lambda _: time.sleep(0.001)), Contender(lambda _: time.sleep(0.004))], 1, 5, CPU
    )
    assert clock.summary(fast)["median_ms"] >= 1.0  # 1 ms and 4 ms asked for
    assert clock.summary(slow)["median_ms"] >= 4.0


def test_a_copy_has_plausible_bandwidth():
    source, target = np.zeros(1 << 25, np.uint8), np.ones(1 << 25, np.uint8)
    (nothing, copy), _ = clock.interleaved(
        [Contender(lambda _: None), Contender(lambda _: np.copyto(target, source))], 2, 7, CPU
    )
    assert clock.summary(nothing)["median_ms"] < 0.5
    gigabytes = 2 * source.nbytes / clock.summary(copy)["median_ms"] / 1e6
    assert 0.05 < gigabytes < 1000  # read plus written, per second


def test_summary_and_speedup():
    samples = [float(i) for i in range(1, 12)]
    actual = clock.summary(samples)
    assert (actual["median_ms"], actual["p10_ms"], actual["p90_ms"]) == (6, 2, 10)
    assert clock.summary([1.0, 1.0, 2.0, 50.0, 3.0])["median_ms"] == 2  # a mean would follow the one that was disturbed
    assert clock.speedup(samples, [1.0] * 11) == {"speedup": 6, "speedup_p10": 2, "speedup_p90": 10}
    assert clock.speedup(samples, samples) == {"speedup": 1, "speedup_p10": 1, "speedup_p90": 1}  # pairs, not quantiles


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def steady(spread=0.0):
    return {"dense": {"median_ms": 10.0, "p10_ms": 10 - 5 * spread, "p90_ms": 10 + 5 * spread}}


@pytest.mark.parametrize(
    ("spread", "load", "reason"),
    [
        (0.2, clock.Load(4, 2, 3.9, 1.9), None),
        (0.3, clock.Load(4, 2, 3.9, 1.9), r"dense: \(p90 - p10\) / median is 30%, above 25%"),
        (0.2, clock.Load(4, 2, 3.9, 2.5), "other processes kept 2.5 cores busy, 2 of 4 were free"),
        (0.2, clock.Load(4, 4, 3.9, 0.5), "other processes kept 0.5 cores busy, 0 of 4 were free"),
        (0.2, clock.Load(4, 4, 4.1, 0.0), r"load average 4\.1 on 4 cores"),
    ],
)
def test_what_makes_a_figure_noisy(spread, load, reason):
    actual = clock.noise(steady(spread), load)
    assert actual["noisy"] == bool(reason) and len(actual["reasons"]) == bool(reason)
    if reason:
        assert re.fullmatch(reason, actual["reasons"][0])
    assert actual["load"] == {
        "cores": 4, "threads": load.threads, "load_average": load.average, "other_cores": load.others,
    }  # fmt: skip


def test_the_load_of_others_is_seen_and_ones_own_is_not(monkeypatch):
    burning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with clock.watching(1) as load:
            time.sleep(1.0)
    finally:
        burning.kill()
        burning.wait()
    assert load.others > 0.2 and load.average is not None and load.cores >= 1
    process = SimpleNamespace(cpu_times=lambda: (own[0], 0, 0, 0))
    own, busy, now = [0.0], [5.0], [0.0]
    monkeypatch.setattr(clock.psutil, "Process", lambda: process)
    monkeypatch.setattr(clock, "busy_seconds", lambda: busy[0])
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with clock.watching(1) as load:
        own[0], busy[0], now[0] = 8.0, 5.0 + 8.0 + 3.0, 4.0  # 8 of its own, 3 of others, in 4 seconds
    assert load.others == pytest.approx(0.75)


# ---------------------------------------------------------------------------------------------------------------------
# Break-even


@pytest.mark.parametrize(
    ("dense", "expected"), [(10.0, 0.2), (12.5, 0.0), (9.0, 0.3), (7.0, 0.5), (6.9, None), (2.0, None)]
)
def test_break_even_lies_between_measured_points(dense, expected):
    """12 - 10 s at 0, 0.2, 0.4 and 0.5."""
    curve = {s: [12 - 10 * s] * 5 for s in (0.5, 0.0, 0.4, 0.2)}
    record = clock.break_even([dense] * 5, curve)
    assert record["sparsity"] == (None if expected is None else pytest.approx(expected))
    assert record["p10"] == record["p90"] == record["sparsity"]
    assert [p["sparsity"] for p in record["points"]] == [0.0, 0.2, 0.4, 0.5] and record["points"][0]["median_ms"] == 12
    assert (record["reason"] is None) == (expected is not None)
    if expected is None:
        assert record["reason"] == "slower than dense at every measured sparsity up to 50.0%"


def test_break_even_is_where_sparse_stays_faster():
    """Faster at 0.1 by chance, slower at 0.3: only what lies beyond the last slower point counts."""
    curve = {0.0: [12.0] * 5, 0.1: [9.0] * 5, 0.3: [11.0] * 5, 0.5: [7.0] * 5}
    assert clock.break_even([10.0] * 5, curve)["sparsity"] == pytest.approx(0.35)


def test_two_sparsities_make_no_break_even():
    record = clock.break_even([10.0] * 5, {0.0: [12.0] * 5, 0.5: [7.0] * 5, 0.502: [7.0] * 5})
    assert record["sparsity"] is None and record["reason"] == "needs three measured sparsities, got 2"


def test_break_even_has_the_spread_of_its_samples():
    generator = torch.Generator().manual_seed(0)

    def around(mean, spread):
        return (mean + spread * torch.randn(40, generator=generator)).tolist()

    def width(spread):
        record = clock.break_even(around(10, spread), {s: around(12 - 10 * s, spread) for s in (0.0, 0.2, 0.4, 0.6)})
        assert record["p10"] <= record["sparsity"] <= record["p90"]
        return record["p90"] - record["p10"]

    assert 0 < width(0.1) < width(1.0)
