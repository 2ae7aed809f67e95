"""Unions over chunks and batches: docs/methods/chunk.md, checks 1 to 7; docs/methods/polar.md, check 5."""

import pytest
import torch

from sparsebench.measure import unions
from sparsebench.modules.base import Counter
from tests.helpers import tiny_model


def chunk_counter(keep, sizes, documents=None):
    """Counts of keep bool [B, T, n] in chunks."""
    groups = unions.Groups(sizes)
    counter = unions.UnionCounter(Counter(keep.shape[-1], keep.device), groups)
    groups.of_chunks(torch.zeros(keep.shape[:2], dtype=torch.int64) if documents is None else documents)
    counter.add(keep)
    return counter, groups


def test_the_papers_example():
    """chunk.md, check 1: 4 tokens, 6 units, 2/3/2/3 active, union of 3: token-level 7/12, chunk-level 1/2."""
    keep = torch.zeros(1, 4, 6, dtype=torch.bool)
    for token, units in enumerate(((0, 1), (0, 1, 2), (1, 2), (0, 1, 2))):
        keep[0, token, list(units)] = True
    counter, _ = chunk_counter(keep, [4])
    assert counter.figures()[1]["sparsity"] == pytest.approx(1 - 10 / 24) == pytest.approx(7 / 12)
    assert counter.figures()[4]["sparsity"] == pytest.approx(1 / 2)
    assert counter.figures()[4]["tokens"] == pytest.approx(7 / 12)


def test_one_token_is_token_level_and_longer_chunks_skip_no_more():
    """chunk.md, check 2."""
    keep = torch.rand(3, 64, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    figures = chunk_counter(keep, [2, 4, 8, 16, 32])[0].figures()
    assert figures[1]["sparsity"] == pytest.approx(1 - float(keep.double().mean()))
    shares = [figures[size]["sparsity"] for size in (1, 2, 4, 8, 16, 32)]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[1] > shares[2]
    assert all(f["sparsity"] <= f["tokens"] for f in figures.values())


def test_independent_masks_have_no_excess_and_equal_ones_lose_nothing():
    """chunk.md, check 3: CLS_L = TLS^L within three standard deviations; identical masks: CLS_L = TLS."""
    keep = torch.rand(8, 128, 200, generator=torch.Generator().manual_seed(1)) < 0.3
    figures = chunk_counter(keep, [2, 4])[0].figures()
    for size in (2, 4):
        share, count = 0.7**size, 8 * 128 // size * 200
        assert abs(figures[size]["sparsity"] - share) < 3 * (share * (1 - share) / count) ** 0.5
    same = keep[:, :1].expand(8, 128, 200)
    figures = chunk_counter(same, [2, 4, 32])[0].figures()
    assert figures[32]["sparsity"] == figures[2]["sparsity"] == pytest.approx(figures[1]["sparsity"])


def test_chunks_stay_inside_documents_and_tails_are_dropped_and_counted():
    """chunk.md, check 4: a unit active only behind a border or on padding counts nowhere."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, -1, -1, -1, 3, 3, 3]])
    _, groups = chunk_counter(torch.zeros(2, 8, 1, dtype=torch.bool), [2, 4], documents)
    assert groups.members[2].tolist() == [[0, 1], [3, 4], [5, 6], [8, 9], [13, 14]]
    assert groups.members[4].tolist() == [[3, 4, 5, 6]]
    assert groups.tails == {1: 0, 2: 3, 4: 9}
    assert groups.neighbours.tolist() == [[0, 1], [1, 2], [3, 4], [4, 5], [5, 6], [6, 7], [8, 9], [13, 14], [14, 15]]
    keep = torch.zeros(2, 8, 1, dtype=torch.bool)
    keep[0, 2] = keep[0, 7] = keep[1, 2] = keep[1, 7] = True
    assert chunk_counter(keep, [2, 4], documents)[0].figures()[2]["sparsity"] == 1


def test_counts_add_up_over_passes():
    """chunk.md, check 5: A and B in two passes, or merged, are one pass over both."""
    keep = torch.rand(4, 32, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = chunk_counter(keep, [2, 8])[0]
    one, other = chunk_counter(keep[:2], [2, 8])[0], chunk_counter(keep[2:], [2, 8])[0]
    one.merge(other)
    assert one.figures() == whole.figures() and one.pairs == whole.pairs
    assert one.jaccard == pytest.approx(whole.jaccard) and torch.equal(one.kept, whole.kept)


def test_jaccard_of_equal_sizes_follows_from_the_reuse():
    """chunk.md, check 6: J = r / (2 - r) where all sets have one size and one overlap."""
    keep = torch.zeros(1, 12, 12, dtype=torch.bool)
    for token in range(12):
        keep[0, token, [(token + i) % 12 for i in range(4)]] = True
    counter, _ = chunk_counter(keep, [2])
    r, j = counter.reuse / counter.pairs, counter.jaccard / counter.pairs
    assert r == pytest.approx(3 / 4) and j == pytest.approx(r / (2 - r))


def test_a_top_k_router_bounds_its_union():
    """chunk.md, check 7: k of N in L tokens: CLS_L >= max(0, 1 - L k / N)."""
    scores = torch.rand(2, 64, 40, generator=torch.Generator().manual_seed(3))
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(4, -1).indices, True)
    figures = chunk_counter(keep, [2, 4, 16])[0].figures()
    for size in (2, 4, 16):
        assert figures[size]["sparsity"] >= max(0.0, 1 - size * 4 / 40) - 1e-12


def row_figures(keep, sizes):
    """Figures of steps keep bool [S, B, n], one call of B rows each."""
    groups = unions.Groups(sizes)
    counter = unions.UnionCounter(Counter(keep.shape[-1], keep.device), groups)
    for step in keep:
        groups.of_rows(len(step))
        counter.add(step.unsqueeze(1))
    return counter.figures()


def test_unions_of_a_batch():
    """polar.md, check 5: u(1) = s; u never rises with B; two batches together are their union; independent: (1-d)^B."""
    keep = torch.rand(60, 16, 150, generator=torch.Generator().manual_seed(4)) < 0.2
    figures = row_figures(keep, [1, 2, 4, 8, 16])
    assert figures[1]["sparsity"] == pytest.approx(1 - float(keep.double().mean()))
    shares = [figures[size]["sparsity"] for size in (1, 2, 4, 8, 16)]
    assert shares == sorted(shares, reverse=True)
    for size in (2, 8):
        share, count = 0.8**size, 60 * 16 // size * 150
        assert abs(figures[size]["sparsity"] - share) < 3 * (share * (1 - share) / count) ** 0.5
    halves = keep[:, :8].any(1, keepdim=True) | keep[:, 8:].any(1, keepdim=True)
    assert row_figures(halves, [1])[1]["sparsity"] == pytest.approx(figures[16]["sparsity"])


def test_tokens_that_a_prompt_policy_left_dense_are_in_no_group():
    groups = unions.Groups([2])
    counter = unions.UnionCounter(Counter(3, torch.device("cpu")), groups)
    groups.of_chunks(torch.zeros(1, 6, dtype=torch.int64))
    counter.add(torch.zeros(1, 6, 3, dtype=torch.bool), torch.tensor([[True, True, True, False, False, False]]))
    assert counter.count == {1: 3, 2: 1} and counter.pairs == 0


def test_a_dense_model_has_no_chunks():
    ids = torch.zeros(2, 8, dtype=torch.int64)
    assert unions.chunks(tiny_model(), ids, ids, 2, [2], {}) is None
