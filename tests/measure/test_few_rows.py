"""Batches and verify steps, dense beside sparse (docs/methods/chunk.md, check 10; issue of few rows)."""

from types import SimpleNamespace

import pytest
import torch

from sparsebench import kernels
from sparsebench.engines import Decoder
from sparsebench.measure import few_rows, latency
from sparsebench.modules.tokens import rows_apart
from tests.helpers import sparse_copy, tiny_model

SETTINGS = SimpleNamespace(samples=3, warmup=1, context=6, prompt=8, batches=[1, 2, 4, 16], chunk=4)


def hardware(kernel):
    return SimpleNamespace(
        torch_device=torch.device("cpu"), kernel_name=kernel, torch_dtype=torch.float32,
        skips=kernels.load(kernel).SKIPS, engine="eager",
    )  # fmt: skip


def text(count=400):
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(3))


DECODE = {
    side: {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.1} for side in ("dense", "sparse")
} | {"dense_engine": "eager", "sparse_engine": "eager", "speedup": 1.0, "speedup_p10": 1.0, "speedup_p90": 1.0}  # fmt: skip


@pytest.mark.parametrize("threshold", [0.3, 1.2])
def test_every_batch_is_timed_with_its_union_and_says_what_ran(threshold):
    section, union = few_rows.batches(
        tiny_model(), sparse_copy(threshold), text(), DECODE, SETTINGS, hardware("cpu_numba")
    )
    assert [row["batch"] for row in section] == [1, 2, 4, 16]
    kinds = [(row["kernel"], row["simulated"], "speedup" in row) for row in section]
    assert kinds == [("cpu_numba", False, True)] * 3 + [("masked_dense", True, False)]
    assert section[0]["sparse_ms"] == 1.0  # batch 1 is the decode section's own
    densities = [row["union_density"] for row in section]
    assert densities == sorted(densities) and densities[0] < densities[2]
    two = section[1]
    assert set(two["engines"]) == {"dense/eager", "dense/eager, all kept", "sparse/eager"}
    assert two["dense_ms"] == min(two["engines"]["dense/eager"], two["engines"]["dense/eager, all kept"])
    assert two["dense_p10_ms"] <= two["dense_ms"] <= two["dense_p90_ms"]
    assert two["speedup"] == pytest.approx(two["dense_ms"] / two["sparse_ms"])
    assert set(union["by_size"]["4"]["kinds"]) == {"channels"}
    paying = [row["batch"] for row in section if row.get("speedup", 0) > 1]
    assert union["largest_batch_that_pays"] == max(paying, default=None)


def test_a_simulation_of_few_rows_claims_nothing():
    section, _ = few_rows.batches(
        tiny_model(), sparse_copy(0.9, kernel="masked_dense"), text(), {k: v for k, v in DECODE.items() if "speedup" not in k}, SETTINGS,
        hardware("masked_dense"),
    )  # fmt: skip
    assert all(row["simulated"] and "speedup" not in row for row in section[1:])


def test_the_rows_are_different_texts():
    like = latency.Text(text()[None, :6], text()[6:56])
    rows = few_rows.Rows.of(text(), 16, 6, 1, like)
    assert len({tuple(row.tolist()) for row in rows.prompt}) == 16 and rows.stride >= 1
    assert all(len({tuple(r.tolist()) for r in step}) > 1 for i in range(4) for step in rows.call(i))
    with pytest.raises(ValueError, match="different texts"):
        few_rows.Rows.of(text(20), 16, 6, 1, like)


def test_few_rows_decode_as_each_row_alone():
    """chunk.md, check 10 and polar.md, check 6: the union product with own masks equals the products of single tokens."""
    model, rows = sparse_copy(0.5), few_rows.Rows.of(text(), 4, 6, 1, latency.Text(text()[None, :6], text()[6:56]))
    together = Decoder(model, rows.prompt, 2, compiled=False).step(rows.call(0)[0])
    for i in range(4):
        alone = Decoder(model, rows.prompt[i : i + 1], 2, compiled=False).step(rows.call(0)[0][i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-3, atol=1e-3)


def test_a_verify_step_gives_each_token_its_own_mask():
    """chunk.md, check 10: mode u1 is one-token decode; the whole union for every token (u2) is another function."""
    model, ids = sparse_copy(0.6), text()
    decoder = Decoder(model, ids[None, :6], 4, compiled=False)
    with rows_apart():
        together = decoder.step(ids[None, 6:10])[0]
    one = Decoder(model, ids[None, :6], 4, compiled=False)
    alone = torch.cat([one.step(ids[i].view(1, 1))[0] for i in range(6, 10)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    dense = tiny_model()(input_ids=ids[None, :10], use_cache=False).logits[0, 6:]
    assert (together - dense).norm() > 0.05 * dense.norm()
    x, linear = torch.randn(1, 4, 64), next(m for m in model.modules() if hasattr(m, "keep"))
    own = linear.keep(x)
    u2 = torch.nn.functional.linear(torch.where(own.any(1, keepdim=True), x, 0), linear.weight)
    with rows_apart():
        assert not torch.allclose(linear(x), u2, atol=1e-2)


def test_a_verify_step_is_timed_and_says_what_acceptance_pays():
    section = few_rows.verify(tiny_model(), sparse_copy(0.4), text(), DECODE, SETTINGS, hardware("cpu_numba"))
    assert section["chunk"] == 4 and section["kernel"] == "cpu_numba" and not section["simulated"]
    assert 0 < section["union_density"] <= 1
    assert section["needed_tokens_per_call"]["sparse"] == pytest.approx(section["sparse_ms"] / 1.0)
    drafts = section["drafts"]["sparse"]
    assert 1 <= drafts["tokens_per_call"] <= 4 and drafts["accepted"] <= drafts["proposed"]
    assert section["pays"]["sparse"] == (drafts["tokens_per_call"] > section["needed_tokens_per_call"]["sparse"])


def test_the_acceptance_that_a_verify_call_needs():
    assert few_rows.rate_for(0.9, 8) == 0 and few_rows.rate_for(8.1, 8) is None
    for rate in (0.3, 0.8, 1.0):
        assert few_rows.rate_for(few_rows.tokens_per_call(rate, 8), 8) == pytest.approx(rate)
    assert few_rows.tokens_per_call(0.5, 3) == 1.75
