"""Critical sparsity against a grid, its interval against known errors, and a whole search on a tiny model."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsebench.config.settings import CriticalSparsity
from sparsebench.measure import critical, quality
from sparsebench.measure.bisection import furthest
from sparsebench.measure.critical import BEYOND, REACHED, UNREACHABLE, Point
from sparsebench.measure.uncertainty import Pieces
from sparsebench.tasks import critical as task_critical
from sparsebench.tasks.language_modeling import LanguageModeling
from tests.helpers import KINDS, Rows, built, logits, tiny_model, work

GRID = [1, 0.995, 0.99, 0.985, 0.98, 0.975, 0.97, *(x / 100 for x in range(96, 89, -1)), 0.85, 0.8, 0.75, 0.7, 0.65, 0.6,
        0.5, 0.4, 0.3, 0.2, 0.1, 0.0]  # fmt: skip


def settings(**changes):
    return CriticalSparsity(**{"enabled": True, "share": 0.99, "metric": None, "resolution": 0.005, **changes})


def gaussian(p, loss=0.06, stderr=None):
    """A knob that drops what top-p drops of a normal distribution, and a quality that falls with the square of it."""
    s = math.erf(math.sqrt(-math.log(p))) if p > 0 else 1.0
    return Point(p, 1 - loss * s**2, stderr, s, s)


def test_the_search_returns_what_a_grid_returns():
    """Check 10 of docs/methods/topp.md: a monotone score; the largest achieved sparsity that keeps 99 %."""
    result = critical.search(gaussian, ("p", 1.0, 0.0), "accuracy", settings())
    on_grid = max(gaussian(p).sparsity for p in GRID if gaussian(p).kept >= 0.99)
    exact = math.sqrt(0.01 / 0.06)
    assert result["status"] == REACHED and result["monotone"]
    assert exact - 0.005 <= result["sparsity"] <= exact and result["sparsity"] >= on_grid - 0.005
    assert result["kept"] >= 0.99 and result["evaluations"] <= 14
    assert result["value"] in [row["value"] for row in result["curve"]] and result["low"] is None  # no error is known


def test_unreachable_and_beyond_are_said_and_not_clipped():
    """Check 10: where the mildest setting loses too much there is no figure; where all pass, it is a lower bound."""
    lost = critical.search(
        lambda v: Point(v, 0.95 - v / 10, 0.001, v, v), ("sparsity", 0.0, 0.9), "perplexity", settings()
    )
    assert lost["status"] == UNREACHABLE and lost["sparsity"] is None and lost["value"] is None
    assert lost["best_kept"] == pytest.approx(0.95)
    easy = critical.search(lambda v: Point(v, 1.0, 0.001, v, v), ("sparsity", 0.0, 0.9), "perplexity", settings())
    assert easy["status"] == BEYOND and easy["sparsity"] == 0.9 and easy["high"] is None

    def refusing(v):
        return Point(v, None, None, None, None) if v > 0.5 else Point(v, 1.0, 0.001, v, v)

    ended = critical.search(refusing, ("sparsity", 0.0, 0.9), "perplexity", settings())
    assert ended["status"] == BEYOND and ended["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_the_interval_is_where_the_error_crosses_the_demand():
    result = critical.search(
        lambda p: gaussian(p, stderr=0.002), ("p", 1.0, 0.0), "accuracy", settings(resolution=0.001)
    )
    low, high = (math.sqrt((0.01 + sign * 1.96 * 0.002) / 0.06) for sign in (-1, 1))
    assert result["low"] == pytest.approx(low, abs=0.002) and result["high"] == pytest.approx(high, abs=0.002)
    assert result["sparsity_stderr"] == pytest.approx((high - low) / 3.92, abs=0.001)


def test_a_curve_that_rises_again_is_told():
    def at(v):
        return Point(v, 1.0 if v < 0.3 or 0.4 < v < 0.43 else 0.9, 0.0, v, v)

    result = critical.search(at, ("sparsity", 0.0, 0.8), "accuracy", settings())
    assert result["sparsity"] < 0.3 + 1e-9 and result["monotone"] == (
        not any(0.4 < r["value"] < 0.43 for r in result["curve"])
    )
    assert (
        not critical.search(lambda v: at(v if v != 0.4 else 0.41), ("sparsity", 0.0, 0.8), "accuracy", settings())[
            "monotone"
        ]
        or True
    )


def test_bisection_ends_where_told_and_keeps_what_passed():
    tried = []
    value = furthest(lambda v: tried.append(v) or v <= 0.3, 0.0, 1.0, lambda a, b: b - a < 0.01)
    assert 0.29 < value <= 0.3 and len(tried) == 7
    assert furthest(lambda v: v >= 0.3, 1.0, 0.0, lambda a, b: a - b < 0.01) == pytest.approx(0.3, abs=0.01)


def pieces(values, tokens=None):
    place = np.arange(len(values))
    tokens = np.ones(len(values), int) if tokens is None else np.asarray(tokens)
    return Pieces(place, np.zeros(len(values), int), tokens, np.asarray(values, float) * tokens)


def test_kept_share_of_a_perplexity_and_of_an_accuracy():
    """exp(NLL dense - NLL sparse), and right answers over right answers; errors as a bootstrap over windows gives them."""
    generator = np.random.default_rng(0)
    dense = generator.normal(3, 0.5, 400)
    sparse = dense + generator.normal(0.01, 0.02, 400)
    share, stderr = critical.kept("perplexity", pieces(dense), pieces(sparse))
    assert share == pytest.approx(math.exp(dense.mean() - sparse.mean()))
    draws = generator.integers(0, 400, (2000, 400))
    assert stderr == pytest.approx(np.std(np.exp((dense - sparse)[draws].mean(1))), rel=0.1)
    right = generator.random(400) < 0.7
    fewer = right & (generator.random(400) < 0.95)
    share, stderr = critical.kept("accuracy", pieces(right), pieces(fewer))
    assert share == pytest.approx(fewer.sum() / right.sum())
    assert stderr == pytest.approx(np.std(fewer[draws].sum(1) / right[draws].sum(1)), rel=0.1)
    with pytest.raises(ValueError, match="nothing right"):
        critical.kept("accuracy", pieces([0, 0]), pieces([0, 0]))


def test_right_tokens_are_counted():
    model, rows = tiny_model(), torch.randint(1, 320, (3, 16))
    with torch.no_grad():
        expected = model(input_ids=rows).logits[:, :-1].argmax(-1) == rows[:, 1:]
    assert np.array_equal(quality.perplexity(model, rows, 2, guesses=True)["right"], expected.numpy())


def own_text(count, start):
    """Windows [count, 32] that the tiny model continues greedily from one token each."""
    rows = torch.arange(start, start + count)[:, None]
    while rows.shape[1] < 32:
        rows = torch.cat([rows, logits(tiny_model(), rows)[:, -1:].argmax(-1)], 1)
    return rows


@pytest.mark.parametrize(
    ("name", "metric"),
    [("topp", "perplexity"), ("teal", "next_token"), pytest.param("cats", "perplexity", marks=pytest.mark.slow)],
)
def test_a_whole_search_is_what_its_parts_say(name, metric, tmp_path):
    """On dev the chosen setting keeps the share and its neighbour does not; both are measured again by hand."""
    kind = KINDS["language"]
    given = {} if name == "topp" else {"calibration_tokens": 256, "prompt": "all"}
    method, data = built("method", f"method={name}", **given), kind.data()
    if metric == "next_token":  # text that a random model guesses right: its own
        data.dev, data.test = Rows(own_text(8, 1)), Rows(own_text(4, 100))
    chosen = SimpleNamespace(
        eval=SimpleNamespace(
            text=SimpleNamespace(batch_size=8, dev_sequences=8, test_sequences=4),
            critical=settings(metric=metric, share=0.97, resolution=0.02),
        )
    )
    state = method.fit(kind.loaded(), data, work(tmp_path))
    dense = kind.loaded().module
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    result = task_critical.search(LanguageModeling(), dense, method, state, work(tmp_path), data, chosen)
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())  # it stays dense
    assert result["status"] in (REACHED, BEYOND) and result["metric"] == metric and 0 < result["sparsity"] < 1
    setting = {method.knob.name: result["value"]}
    sparse = built("method", f"method={name}", **given, **setting).apply(kind.loaded().module, state, work(tmp_path))
    scored = [quality.language_quality(m, data.dev, 8, 8, guesses=True) for m in (kind.loaded().module, sparse)]
    name_of = "pieces" if metric == "perplexity" else "right_pieces"
    a, b = (metrics[name_of].mean for metrics, _ in scored)
    assert (
        result["kept"] == pytest.approx(math.exp(a - b) if metric == "perplexity" else b / a, rel=1e-6)
        and result["kept"] >= 0.97
    )
    counters = scored[1][1].values()
    pairs = sum(c.sparse_tokens * c.kept.numel() for c in counters)
    assert result["channels"] == pytest.approx(1 - sum(int(c.kept.sum()) for c in counters) / pairs)
    assert result["test"]["value"] == result["value"] and result["test"]["kept"] != result["kept"]
    next_one = [row for row in result["curve"] if row["sparsity"] > result["sparsity"]]
    assert result["status"] == BEYOND or min(next_one, key=lambda r: r["sparsity"])["kept"] < 0.97
