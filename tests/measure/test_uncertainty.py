"""Standard errors: by hand, against simulations whose variance is known, and against each other's special cases."""

import math

import numpy as np
import pytest

from sparsebench.data.text import Document, Split
from sparsebench.measure import quality, uncertainty
from sparsebench.measure.uncertainty import Pieces
from sparsebench.records import terminal, wording
from tests.helpers import TEXT, tiny_model, tiny_tokenizer


def pieces(losses, documents=None):
    losses = np.asarray(losses, dtype=np.float64)
    rows = np.arange(len(losses))[:, None] if documents is None else np.asarray(documents)
    return Pieces.of(losses, np.broadcast_to(rows, losses.shape))


def test_by_hand():
    """Two windows of two tokens, one document each: means 2 and 4, SE of their mean = sd / sqrt(2) = 1."""
    dense, sparse = pieces([[1, 3], [4, 4]]), pieces([[1.5, 3.5], [4, 5]])
    assert dense.mean == 3 and dense.stderr(dense.influence) == pytest.approx(1)
    actual = uncertainty.perplexities(dense, sparse)
    assert actual["dense_stderr"] == pytest.approx(math.e**3)
    assert actual["ratio"] == pytest.approx(math.exp(0.5)) and actual["ratio_stderr"] == pytest.approx(0)
    assert actual["clusters"] == {"windows": 2, "documents": 2} and actual["tokens"] == 4 and actual["little_text"]
    assert actual["difference_stderr"] == pytest.approx(math.exp(3.5) - math.exp(3))


def test_pieces_are_parts_of_documents_in_windows():
    actual = pieces([[1, 2, 3], [4, 5, 6]], [[0, 0, 1], [1, 1, 2]])
    assert actual.window.tolist() == [0, 0, 1, 1] and actual.document.tolist() == [0, 1, 1, 2]
    assert actual.tokens.tolist() == [2, 1, 2, 1] and actual.loss.tolist() == [3, 3, 9, 6]


def test_nested_clusters_give_the_larger_one():
    generator = np.random.default_rng(0)
    losses = generator.normal(size=(12, 8))
    actual = pieces(losses, np.repeat(np.arange(3), 4)[:, None])  # four windows in each document
    means = losses.reshape(3, -1).mean(1)
    assert actual.stderr(actual.influence) >= np.std(means, ddof=1) / math.sqrt(3) - 1e-12


def test_one_window_has_no_error():
    actual = pieces([[1.0, 2.0]])
    assert actual.stderr(actual.influence) is None


def test_simulation_with_known_variance():
    """Documents of three windows: NLL = document effect + window effect + noise. The known SE of the mean over 20
    documents is found on average, where tokens taken as independent would give a fourth of it."""
    generator, windows, tokens, actual, means = np.random.default_rng(1), 60, 40, [], []
    for _ in range(400):
        document = np.repeat(generator.normal(0, 0.5, 20), 3)[:, None]
        losses = 3 + document + generator.normal(0, 0.3, (windows, 1)) + generator.normal(0, 1, (windows, tokens))
        each = pieces(losses, np.repeat(np.arange(20), 3)[:, None])
        actual.append(each.stderr(each.influence))
        means.append(each.mean)
    known = math.sqrt(0.5**2 / 20 + 0.3**2 / windows + 1 / (windows * tokens))
    assert np.std(means) == pytest.approx(known, rel=0.1)
    assert np.sqrt(np.mean(np.square(actual))) == pytest.approx(known, rel=0.1)
    naive = math.sqrt((0.25 + 0.09 + 1) / (windows * tokens))
    assert known / naive > 4


def test_pairing_takes_the_text_out_of_the_ratio():
    """Sparse = dense + 0.1 + small noise: the ratio's error is that noise's, whatever the text's spread."""
    generator, ratios, errors = np.random.default_rng(2), [], []
    for _ in range(300):
        dense = 3 + generator.normal(0, 1, (50, 1)) + generator.normal(0, 1, (50, 30))
        sparse = dense + 0.1 + generator.normal(0, 0.2, (50, 30))
        actual = uncertainty.perplexities(pieces(dense), pieces(sparse))
        ratios.append(actual["ratio"])
        errors.append(actual["ratio_stderr"])
    known = math.exp(0.1) * 0.2 / math.sqrt(50 * 30)
    assert np.std(ratios) == pytest.approx(known, rel=0.15) and np.mean(errors) == pytest.approx(known, rel=0.1)
    assert actual["dense_stderr"] > 20 * actual["ratio_stderr"]


def test_kept_losses_give_the_figures_again():
    generator = np.random.default_rng(3)
    dense = pieces(generator.normal(3, 1, (9, 16)), generator.integers(0, 4, (9, 16)))
    sparse = Pieces(dense.window, dense.document, dense.tokens, dense.loss + 0.2 * dense.tokens)
    kept = uncertainty.kept(dense, sparse)
    window, document, tokens = (uncertainty.unpacked(kept[k], "i4") for k in ("window", "document", "tokens"))
    again = [
        Pieces(window, document, tokens, tokens * uncertainty.unpacked(kept[k], "f4")) for k in ("dense", "sparse")
    ]
    expected = uncertainty.perplexities(dense, sparse)
    for key, value in uncertainty.perplexities(*again).items():
        assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bos", ["none", "document", "window"])
def test_scored_tokens_know_their_document(bos):
    tokenizer, documents = tiny_tokenizer(), [Document(str(i), part) for i, part in enumerate(TEXT.split("\n\n")[:9])]
    split = Split("test", documents, 24, bos, 0)
    split.tokenizer = tokenizer
    windows = split.sequences(20)
    actual = split.scored_documents(len(windows))
    owner = []
    for i, document in enumerate(split.documents):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        owner += [i] * (len(ids) + (bos == "document"))
    body = 23 if bos == "window" else 24
    for row in range(len(windows)):
        expected = owner[row * body : (row + 1) * body]
        assert actual[row].tolist() == (expected if bos == "window" else expected[1:])
    metrics, _ = quality.language_quality(tiny_model(), split, 20, 4)
    assert metrics["pieces"].mean == pytest.approx(metrics["nll"], rel=1e-6)


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [(10.98123, 0.0312, "10.98 ± 0.03"), (1.0931, 0.0031, "1.093 ± 0.003"), (362.1612, 14.2, "362 ± 14"),
     (10.0449, 0.184, "10.04 ± 0.18"), (5.0, None, "5"), (0.81352, 0.0123, "0.814 ± 0.012")],
)  # fmt: skip
def test_significant_digits_only(value, stderr, text):
    assert wording.uncertain(value, stderr) == text


def test_what_terminal_and_line_say():
    metric = {
        "dense": 10.0449, "sparse": 10.98123, "dense_stderr": 0.034, "sparse_stderr": 0.0312, "ratio": 1.09321,
        "ratio_stderr": 0.0031, "difference_stderr": 0.029, "little_text": False, "higher_is_better": False,
    }  # fmt: skip
    assert wording.in_words("perplexity", metric) == "10.98 ± 0.03 (1.093 ± 0.003x)"
    assert "little text" in wording.in_words("perplexity", {**metric, "little_text": True})
    line = terminal.headline(
        {"status": "finished", "name": "n", "error": None, "quality": {"perplexity": metric}}, "result.json"
    )
    assert '"perplexity": "10.98 ± 0.03 (1.093 ± 0.003x)"' in line and '"perplexity_sparse": 10.98,' in line
    accuracy = {
        "dense": 0.9,
        "sparse": 0.8136,
        "dense_stderr": 0.01,
        "sparse_stderr": 0.012,
        "difference_stderr": 0.011,
    }
    assert wording.in_words("accuracy", accuracy) == "0.814 ± 0.012 (-8.6 ± 1.1 points)"
