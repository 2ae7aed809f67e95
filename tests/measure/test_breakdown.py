"""Where a step's time goes, in the record: all roles, their sum about the step, timed steps untouched."""

import pytest
import torch

from sparsebench import engines
from sparsebench.engines import _step_numba, fused_cpu
from sparsebench.measure import breakdown, latency
from tests.helpers import tiny_model

ROLES = {"norm", "qkv", "attention", "o", "gate_up", "down", "head"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(0, 320, (64,), generator=torch.Generator().manual_seed(3))
    return latency.Text(ids[None, :16], ids[16:], untimed=2)


@pytest.fixture(scope="module")
def fused(text):
    model = tiny_model(hidden_size=256, intermediate_size=768)
    engines.channel_major(model)
    return fused_cpu.Decoder(model, text.prompt, text.block)


def test_a_fused_step_marks_its_own_roles(fused, text):
    actual = breakdown.one_engine(fused, text, CPU)
    assert set(actual["ms"]) == set(_step_numba.ROLES) == ROLES | {"embed"} and min(actual["ms"].values()) >= 0
    assert all(actual["ms"][role] > 0 for role in ROLES)
    total = sum(actual["ms"].values())
    assert (
        0 < total < 1.5 * actual["step_ms"]
    )  # marks lie inside the call; both are medians, on a machine that others use
    assert actual["unattributed"] == pytest.approx(max(0, 1 - total / actual["step_ms"]))
    assert actual["engine"] == "fused" and actual["steps"] >= breakdown.LEAST


def test_parts_fill_the_step_and_a_larger_product_takes_longer(fused, text):
    """Gate and up hold six times the weights of o. The best of several, since others may hold the processor up."""
    runs = [breakdown.one_engine(fused, text, CPU) for _ in range(5)]
    gate_up, o = (min(run["ms"][role] for run in runs) for role in ("gate_up", "o"))
    assert gate_up > 1.5 * o
    assert min(run["unattributed"] for run in runs) < 0.5


def test_marks_are_taken_in_passes_of_their_own(fused, text):
    """A step without marks writes none, and both give the same logits."""
    token = text.call(0)[0]
    fused.rewind()
    plain = fused.step(token).clone()
    kept = fused.marks
    fused.rewind()
    fused.marked(lambda: torch.testing.assert_close(fused.step(token), plain, rtol=0, atol=0), 1)
    assert fused.marks.size == 0 and kept.size == 0


def test_threads_wait_inside_the_roles(text):
    torch.set_num_threads(2)
    try:
        model = tiny_model()
        engines.channel_major(model)
        decoder = fused_cpu.Decoder(model, text.prompt, text.block)
        decoder.threads = 2
        actual = breakdown.one_engine(decoder, text, CPU)
    finally:
        torch.set_num_threads(1)
    assert set(actual["ms"]) >= ROLES and 0 < sum(actual["ms"].values()) < 1.5 * actual["step_ms"]


def test_an_engine_without_marks_says_why(text):
    decoder = engines.Decoder(tiny_model(), text.prompt, 1, compiled=False)
    decoder.engine = "compiled"
    actual = breakdown.by_kernel({"dense": decoder, "sparse": decoder}, text, CPU)
    assert "no marks" in actual["dense"]["reason"] and "ms" not in actual["sparse"] and actual["seconds"] < 60


def test_an_eager_step_is_told_module_by_module(text):
    decoder = engines.Decoder(tiny_model(), text.prompt, 1, compiled=False)
    actual = breakdown.one_engine(decoder, text, CPU)
    assert list(actual["ms"]) == ["embed", "norm", "qkv", "attention", "o", "gate_up", "down", "ffn", "head"]
    assert 0 < sum(actual["ms"].values()) < 1.5 * actual["step_ms"]
