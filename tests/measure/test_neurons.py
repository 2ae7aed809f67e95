"""x1_zero, aggregate, CETT and PPL-p%: each faithfulness check of docs/methods/metrics.md that concerns neurons."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from sparsebench.config.settings import NeuronMetrics
from sparsebench.measure import neurons, quality
from sparsebench.modules.activations import FATReLU
from sparsebench.modules.neuron_sparse import last_map, swap
from sparsebench.sites import find_blocks
from sparsebench.training.loop import next_token_loss
from tests.helpers import Rows, record_of, tiny_model


def relu_model(layers=2, threshold=0.0):
    model = tiny_model(layers=layers)
    for block in find_blocks(model):
        swap(model, block, FATReLU(threshold))
    return model


ROWS = torch.randint(0, 320, (6, 32), generator=torch.Generator().manual_seed(5))


def settings(**changes):
    return NeuronMetrics(**{"enabled": True, "increase": 1.0, "tokens": 100, "aggregate": [1, 2, 4, 64], **changes})


def x1_of(model, rows=ROWS):
    values = {}
    with neurons.watching(model, lambda layer, x1: values.update({layer: x1})), torch.no_grad():
        model(input_ids=rows, use_cache=False)
    return values


def test_zeros_and_unions_by_hand():
    """Check 7: skip(1) = S, skip(B) at most S and never rising with B."""
    model = relu_model()
    actual = neurons.zeros(model, ROWS, 4, [1, 2, 4, 64])
    x1 = x1_of(model)
    assert actual["x1_zero"] == pytest.approx(sum(float((x == 0).float().mean()) for x in x1.values()) / 2)
    pairs = torch.stack([(x == 0).view(6, 16, 2, -1).all(2).float().mean() for x in x1.values()]).mean()
    assert actual["aggregate"][2] == pytest.approx(float(pairs))
    assert actual["aggregate"][1] == pytest.approx(actual["x1_zero"])
    assert actual["x1_zero"] > actual["aggregate"][2] > actual["aggregate"][4]
    assert actual["aggregate"][64] is None  # windows of 32 hold no group of 64


def test_batches_do_not_move_the_figures():
    """Check 3: integer counts over unequal batches."""
    model = relu_model()
    assert neurons.zeros(model, ROWS, 4, [4]) == neurons.zeros(model, ROWS, 5, [4])


def test_cett_against_the_formula_and_its_ends():
    """Check 4: CETT(0) = 0, above the largest norm 1, the exact zeros just above 0, and the definition in between."""
    model = relu_model(layers=1)
    (layer,) = neurons.sample(model, ROWS, 4, 100)
    weight = last_map(model, find_blocks(model)[0]).weight
    with torch.no_grad():
        assert layer.cett(0.0) == 0.0
        assert layer.cett(float(layer.candidates[-2]) * 1.001) == pytest.approx(1.0)
        strength = layer.x1.abs() * weight.norm(dim=0)
        epsilon = float(strength[strength > 0].quantile(0.6))
        outputs = layer.x1.unsqueeze(1) * weight  # [M, d, f]
        lost = (outputs * (strength < epsilon).unsqueeze(1)).sum(-1).norm(dim=-1) / outputs.sum(-1).norm(dim=-1)
        assert layer.cett(epsilon) == pytest.approx(float(lost.mean()), rel=1e-4)
        smallest = float(strength[strength > 0].min())
        assert float((strength < smallest).float().mean()) == pytest.approx(float((layer.x1 == 0).float().mean()))
        assert layer.cett(smallest) == 0.0


def test_cett_scales_with_the_weights():
    """Check 4: W_d times c and epsilon times c leave CETT as it is."""
    values = []
    for c in (1.0, 8.0):
        model = relu_model(layers=1)
        with torch.no_grad():
            last_map(model, find_blocks(model)[0]).weight.mul_(c)
            (layer,) = neurons.sample(model, ROWS, 4, 100)
            values.append(layer.cett(0.7 * c))
    assert 0 < values[0] < 1 and values[0] == pytest.approx(values[1], rel=1e-5)


def test_largest_threshold_of_a_level():
    model = relu_model(layers=1)
    with torch.no_grad():
        (layer,) = neurons.sample(model, ROWS, 4, 60)
        top = len(layer.candidates) - 1
        index = layer.largest(0.2, 0, top)
        assert layer.cett(float(layer.candidates[index])) <= 0.2 < layer.cett(float(layer.candidates[index + 1]))
        assert layer.largest(0.1, 0, top) <= index <= layer.largest(0.3, 0, top)


MEMORISED = torch.randint(0, 320, (24, 32), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def memorising():
    """A model that has learnt its rows, so that dropping neurons costs perplexity."""
    model = relu_model().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        next_token_loss(model, MEMORISED).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.parametrize("increase", [1.0, 5.0])
def test_search_reaches_the_ratio(increase, memorising):
    """Check 5: R within 1e-3 of 1 + p %, and the ratio is what an independent evaluation of the same rule gives."""
    model = memorising
    rows = MEMORISED
    actual = neurons.search(model, rows, 8, settings(increase=increase, tokens=200))
    assert actual["reached"]
    assert actual["ratio"] == pytest.approx(1 + increase / 100, abs=1e-3)
    by_hand = {
        i: (e, last_map(model, b).weight.norm(dim=0))
        for i, (b, e) in enumerate(zip(find_blocks(model), actual["epsilon"], strict=True))
    }

    def off(layer, x1):
        epsilon, norms = by_hand[layer]
        return x1 * (x1.abs() >= epsilon / norms)

    dense = quality.perplexity(model, rows, 8)["perplexity"]
    with neurons.watching(model, off):
        assert quality.perplexity(model, rows, 8)["perplexity"] / dense == pytest.approx(actual["ratio"], abs=1e-3)


def test_nothing_allowed_drops_only_what_has_no_effect():
    """Check 5, p = 0."""
    model = relu_model()
    record = neurons.search(model, ROWS, 4, settings(increase=0.0, tokens=192))
    assert record["ratio"] == pytest.approx(1.0, abs=1e-6) and record["cett"] == 0.0
    assert record["sparsity"] == pytest.approx(neurons.zeros(model, ROWS, 4, [])["x1_zero"])


def test_an_unreachable_ratio_is_said_to_be_so():
    model = relu_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform: perplexity is the vocabulary's size whatever is dropped (check 10)
    assert quality.perplexity(model, ROWS, 4)["perplexity"] == pytest.approx(320)
    assert neurons.search(model, ROWS, 4, settings())["reached"] is False


def test_levels_are_searched_on_dev_and_judged_on_test():
    """Every figure of `measure` against the parts it is made of, called with the split it must come from."""
    splits = {"fit": None, "dev": Rows(ROWS[:3]), "test": Rows(ROWS[3:])}
    text = SimpleNamespace(batch_size=3, test_sequences=None, dev_sequences=None)
    chosen = SimpleNamespace(text=text, neurons=settings(tokens=64))
    model = relu_model()
    actual = neurons.measure(model, SimpleNamespace(**splits), chosen)
    on_dev = neurons.search(model, ROWS[:3], 3, chosen.neurons)
    assert actual["cett"]["epsilon"] == on_dev["epsilon"] and actual["cett"]["ratio"] == on_dev["ratio"]
    assert on_dev["epsilon"] != neurons.search(model, ROWS[3:], 3, chosen.neurons)["epsilon"]
    assert actual["cett"]["test"]["sparsity"] == neurons.dropped(model, on_dev["epsilon"], ROWS[3:], 3)[1]
    assert actual["x1_zero"] == neurons.zeros(model, ROWS[3:], 3, [])["x1_zero"]


def test_in_the_record_of_a_run(forked, tmp_path, text_file, model_folder):
    process = forked(
        "model=hf", f"model.path={model_folder('llama')}", "dataset=text", f"dataset.path={text_file}", "method=dense",
        "dataset.sequence_length=32", "eval.neurons.enabled=true", "eval.neurons.tokens=64", "measure.latency=false",
        "eval.text.test_sequences=8", "eval.text.dev_sequences=8", "hardware=cpu", "hardware.threads=1", "wandb.mode=disabled",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    record = record_of(process, tmp_path)["extra"]["neurons"]
    assert json.dumps(record["dense"]) == json.dumps(record["sparse"])  # method=dense changes nothing
    assert record["dense"]["x1_zero"] == 0.0 and set(record["dense"]["aggregate"]) == {"1", "4", "16", "64"}
    assert math.isfinite(record["dense"]["cett"]["ratio"]) and 0 <= record["dense"]["cett"]["test"]["sparsity"] <= 1
