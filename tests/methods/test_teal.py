"""TEAL's faithfulness checks (docs/methods/teal.md, Faithfulness checks; the number of each check stands in its docstring)."""

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sparsebench.calibration import allocation, block_error
from sparsebench.calibration.allocation import Greedy, search, table_of
from sparsebench.calibration.histograms import observe
from sparsebench.measure import quality, sparsity
from sparsebench.methods.teal import Teal, abs_quantile, signed_quantile
from sparsebench.models.language import Loaded
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.records import state
from sparsebench.sites import find_blocks
from tests.helpers import built, logits, tiny_model, work


def method(**changes) -> Teal:
    return built("method", "method=teal", **changes)


def fitted(teal, data, tmp_path, kind="llama"):
    model = tiny_model(kind)
    return model, teal.fit(Loaded(model, None, {}), data, work(tmp_path))


def applied(teal, fit, tmp_path, kind="llama"):
    return teal.apply(tiny_model(kind), fit, work(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_zero_sparsity_is_bit_equal_to_dense(kind, data, tmp_path):
    """Check 1."""
    model, fit = fitted(method(), data, tmp_path, kind)
    sparse = applied(method(sparsity=0.0), fit, tmp_path, kind)
    assert torch.equal(logits(sparse, data.test.rows[:3]), logits(model, data.test.rows[:3]))


def test_calibration_sparsity_per_tensor_within_a_point(data, tmp_path):
    """Check 3: the thresholds drop p of each tensor's values on the calibration set, seen densely."""
    teal = method(sparsity=0.5)
    model, fit = fitted(teal, data, tmp_path)
    shares = {}

    def watch(name, threshold):
        def see(x):
            total, dropped = shares.get(name, (0, 0))
            shares[name] = (total + x.numel(), dropped + int((x.abs() <= threshold).sum()))

        return see

    for p in (0.25, 0.5, 0.9):
        shares.clear()
        observers = {
            s.path: watch(s.name, teal.threshold(fit, s, p)) for b in find_blocks(model) for s in b.sites.values()
        }
        observe(model, data.fit.sequences(), observers, 8)
        assert len(shares) == 14
        for total, dropped in shares.values():
            assert dropped / total == pytest.approx(p, abs=0.01)


def test_held_out_sparsity_is_reported_per_site(data, tmp_path):
    """Check 3, second half."""
    teal = method(sparsity=0.5)
    _, fit = fitted(teal, data, tmp_path)
    sparse = applied(teal, fit, tmp_path)
    _, counters = quality.language_quality(sparse, data.test, 16, 4)
    actual = sparsity.summarise(sparse, counters)
    assert set(actual) == {s.name for b in find_blocks(tiny_model()) for s in b.sites.values()}
    assert all(abs(site.sparsity - 0.5) < 0.2 and site.sparsity != 0.5 for site in actual.values())


def test_threshold_does_not_decrease_in_p(data, tmp_path):
    """Check 4."""
    teal = method()
    _, fit = fitted(teal, data, tmp_path)
    for site in find_blocks(tiny_model())[1].sites.values():
        values = [teal.threshold(fit, site, p / 50) for p in range(50)]
        assert values == sorted(values)


def test_uniform_shares_masks(data, tmp_path):
    """Check 5: q, k, v drop the same channels; gate and up too."""
    teal = method(sparsity=0.5)
    _, fit = fitted(teal, data, tmp_path)
    sparse = applied(teal, fit, tmp_path)
    values: dict[str, torch.Tensor] = {}
    for module in sparse.modules():
        if isinstance(module, InputSparseLinear):
            module.register_forward_hook(lambda m, a, _: values.__setitem__(m.site, m.keep(a[0])))
    logits(sparse, data.test.rows[:2])
    for layer in (0, 1):
        assert torch.equal(values[f"{layer}.q"], values[f"{layer}.k"]) and torch.equal(
            values[f"{layer}.q"], values[f"{layer}.v"]
        )
        assert torch.equal(values[f"{layer}.gate"], values[f"{layer}.up"])


SHAPES = {  # model: (hidden, intermediate, heads, key-value heads), N / n_q
    "llama2-7b": ((4096, 11008, 32, 32), 12.0625),
    "llama2-13b": ((5120, 13824, 40, 40), 12.1),
    "llama3-8b": ((4096, 14336, 32, 8), 13.0),
    "mistral-7b": ((4096, 14336, 32, 8), 13.0),
    "llama2-70b": ((8192, 28672, 64, 8), 12.75),
}


@pytest.mark.parametrize("name", SHAPES)
def test_first_greedy_row_of_published_shapes(name):
    """Checks 6 and 8: with true sizes under GQA the first accepted step of alpha=0.05 is 0.05 / (N / n_q)."""
    (hidden, intermediate, heads, groups), total = SHAPES[name]
    shape = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=groups,
        num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(shape)
    table = search(
        find_blocks(model)[0],
        model,
        lambda shares, _: sum(shares.values()),
        Greedy(step=0.05, stop=0.02, error_tokens=1.0),
    )
    assert float(table.effective[0]) == pytest.approx(0.05 / total, rel=1e-6)


def test_greedy_is_no_worse_than_uniform_for_most_rows(data, tmp_path):
    """Check 7, and no share passes 1 although a step on k or v overshoots under GQA."""
    teal = method(allocation="greedy", calibration_tokens=128, greedy={"step": 0.4, "stop": 0.7, "error_tokens": 0.5})
    model, fit = fitted(teal, data, tmp_path)
    for layer in (0, 1):
        table = table_of(fit, layer)
        better = (table.greedy_error <= table.uniform_error).float().mean()
        assert better > 0.8, f"greedy better in {better:.0%} of rows"
        assert float(table.sparsity.max()) <= 1.0
        assert torch.all(table.effective[1:] > table.effective[:-1])
        sizes = torch.tensor(
            [model.get_submodule(s.path).weight.numel() for s in find_blocks(model)[layer].sites.values()]
        )
        torch.testing.assert_close(
            table.effective, (table.sparsity @ sizes.float()) / sizes.sum(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_greedy_error_is_the_block_output_distance(data, family, tmp_path):
    """Along the path, trials and uniform sparsities err as far as block outputs computed apart, over the last tokens."""
    model = tiny_model(family)
    block, rows = find_blocks(model)[1], data.fit.rows[:4]

    def threshold(layer, role, p):
        return 1.5 * p

    settings = Greedy(step=0.4, stop=0.7, error_tokens=0.25)
    tables = allocation.greedy(model, find_blocks(model), rows, threshold, settings, batch_size=2, folder=tmp_path)
    hidden, arguments = block_error.block_inputs(model, find_blocks(model), rows, 2)
    first, module = (model.get_submodule(b.path) for b in find_blocks(model))

    def distance(shares):
        def rule(role, p):
            return lambda x: torch.where(x.abs() > threshold(1, role, p), x, 0)

        total = 0.0
        for entering in hidden:
            h = block_error.run_block(first, entering, arguments[0])
            dense = block_error.run_block(module, h, arguments[1])
            with block_error.changed(model, block, {r: rule(r, p) for r, p in shares.items() if p > 0}):
                total += float((block_error.run_block(module, h, arguments[1]) - dense)[:, 24:].square().sum())
        return total**0.5

    table = tables[1]
    with torch.no_grad():
        for row, shares in enumerate(table.sparsity.tolist()):
            actual = distance(dict(zip(table.roles, shares, strict=True)))
            assert float(table.greedy_error[row]) == pytest.approx(actual, rel=1e-4)
            actual = distance(dict.fromkeys(table.roles, float(table.effective[row])))
            assert float(table.uniform_error[row]) == pytest.approx(actual, rel=1e-4)


def test_greedy_search_goes_on_after_the_blocks_it_finished(data, tmp_path, monkeypatch):
    teal = method(allocation="greedy", calibration_tokens=128, greedy={"step": 0.4, "stop": 0.7, "error_tokens": 0.5})
    (tmp_path / "whole").mkdir()
    whole = fitted(teal, data, tmp_path / "whole")[1]
    search, searched = allocation.search, []

    def cut_short(block, *rest):
        searched.append(block.index)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(block, *rest)

    monkeypatch.setattr(allocation, "search", cut_short)
    with pytest.raises(KeyboardInterrupt):
        fitted(teal, data, tmp_path)
    resumed = fitted(teal, data, tmp_path)[1]
    assert searched == [0, 1, 1]
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())


def test_dense_prompt_policy_is_bit_equal_on_prompts(data, tmp_path):
    """Check 9."""
    teal = method(sparsity=0.5, prompt="none")
    model, fit = fitted(teal, data, tmp_path)
    sparse = applied(teal, fit, tmp_path)
    assert torch.equal(logits(sparse, data.test.rows[:3]), logits(model, data.test.rows[:3]))


def test_policies_coincide_on_one_token(data, tmp_path):
    """Check 10: half, p99 and all (and none) treat a single token alike."""
    teal = method(sparsity=0.5)
    _, fit = fitted(teal, data, tmp_path)
    token = data.test.rows[:1, :1]
    values = [
        logits(applied(method(sparsity=0.5, prompt=p), fit, tmp_path), token) for p in ("half", "p99", "all", "none")
    ]
    assert all(torch.equal(values[0], other) for other in values[1:])


def test_policies_differ_on_prompts_and_order_is_logged(data, tmp_path, capsys):
    """Check 13: perplexity of none <= p99 is expected; logged, not asserted."""
    teal = method(sparsity=0.6)
    _, fit = fitted(teal, data, tmp_path)
    values = {}
    for policy in ("none", "half", "p99", "all"):
        sparse = applied(method(sparsity=0.6, prompt=policy), fit, tmp_path)
        values[policy] = quality.perplexity(sparse, data.test.rows, 8)["perplexity"]
    print("perplexity by prompt policy:", values)
    assert len(set(values.values())) == 4


def test_thresholds_serve_another_sparsity_without_calibrating_again(data, tmp_path):
    _, fit = fitted(method(sparsity=0.25), data, tmp_path)
    _, again = fitted(method(sparsity=0.65), data, tmp_path)
    assert all(torch.equal(fit.tensors[k], again.tensors[k]) for k in fit.tensors)
    assert {"sparsity", "prompt"} <= set(Teal.operating_point)


def test_state_reloads_to_the_identical_model(data, tmp_path):
    teal = method(sparsity=0.5)
    _, fit = fitted(teal, data, tmp_path)
    state.write(fit, tmp_path / "state.safetensors")
    load_file(tmp_path / "state.safetensors")  # an ordinary safetensors file
    again = state.read(tmp_path / "state.safetensors")
    rows = data.test.rows[:2]
    assert torch.equal(logits(applied(teal, fit, tmp_path), rows), logits(applied(teal, again, tmp_path), rows))


def test_signed_rule_equals_the_direct_one_where_symmetric():
    """The official rule takes quantile (1+p)/2 of the signed histogram: right only for a symmetric distribution."""
    values = torch.randn(400_000)
    counts, edges = torch.histogram(values, bins=2000)
    centers = (edges[:-1] + edges[1:]) / 2
    exact = float(values.abs().quantile(0.5))
    assert signed_quantile(centers, counts, 0.75) == pytest.approx(exact, rel=0.02)
    shifted = signed_quantile(centers + 1.0, counts, 0.75)
    assert abs(shifted - float((values + 1).abs().quantile(0.5))) > 0.2


def test_published_histograms_and_tables_are_read(shared_data, tmp_path):
    """Checks 6 and 7 on the published tables of Llama-2-7B; no unpickling of objects."""
    folder = shared_data / "teal-llama2-7b"
    shape = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=2, vocab_size=8
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(shape)
    teal = method(allocation="greedy", histograms=str(folder))
    fit = teal.fit(Loaded(model, None, {}), None, work(tmp_path))
    for layer in (0, 1):
        table = table_of(fit, layer)
        assert float(table.effective[0]) == pytest.approx(0.05 / 12.0625, rel=1e-4)
        assert torch.all(table.greedy_error <= table.uniform_error)
        for site in find_blocks(model)[layer].sites.values():
            direct = [teal.threshold(fit, site, p) for p in (0.25, 0.5, 0.65, 0.9)]
            signed = dataclasses.replace(teal, threshold_rule="signed-hist")
            official = [signed.threshold(fit, site, p) for p in (0.25, 0.5, 0.65, 0.9)]
            assert direct == sorted(direct) and official == sorted(official)
            assert direct == pytest.approx(official, rel=0.1)  # activations are close to symmetric about 0
            name = f"signed.{layer}.{site.group}"
            centers, counts = (fit.tensors[f"{name}.{part}"] for part in ("centers", "counts"))
            last = float(centers[1:-1].abs().max())
            for p in (0.25, 0.5, 0.9):
                t = teal.threshold(fit, site, p)
                inside = counts[centers.abs() <= t].sum() / counts.sum()
                assert float(inside) == pytest.approx(p, abs=float(counts.max() / counts.sum()) * 2 + 1e-3)
            with pytest.raises(ValueError, match=rf"{site.name} at sparsity 0.9999: beyond the last inner bin"):
                teal.threshold(fit, site, 0.9999)
            assert teal.threshold(fit, site, 0.95) < last


def test_missing_layers_of_an_import_are_named(shared_data, tmp_path):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=4, vocab_size=8
            )
        )
    teal = method(histograms=str(shared_data / "teal-llama2-7b"))
    with pytest.raises(ValueError, match=r"no layer-2 .*2 of 4 layers missing"):
        teal.fit(Loaded(model, None, {}), None, work(tmp_path))


def coarse(values, inner=20, reach=2.0):
    """A signed histogram as the official ones are: equal inner bins over [-reach, reach], catch-alls at both ends."""
    edges = torch.linspace(-reach, reach, inner + 1)
    places = torch.bucketize(values, edges)
    counts = places.bincount(minlength=inner + 2).double()
    centers = torch.cat([torch.tensor([-9.0]), (edges[:-1] + edges[1:]) / 2, torch.tensor([9.0])]).double()
    return centers, counts


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.8, 0.9])
def test_thresholds_lie_between_the_bins_of_an_import(p):
    """Bins 0.2 wide: without going inside them 25 % asked were up to 31 % by count. Not symmetric on purpose."""
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2.2 - 0.8
    actual = abs_quantile(*coarse(values), p)
    assert float((values.abs() <= actual).double().mean()) == pytest.approx(p, abs=0.01)


def test_beyond_the_last_inner_bin_an_import_is_refused():
    centers, counts = coarse(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs_quantile(centers, counts, 0.95) < 2
    with pytest.raises(ValueError, match="beyond the last inner bin, which reaches 95"):
        abs_quantile(centers, counts, 0.97)
    assert signed_quantile(centers, counts, 0.97) < 2
    with pytest.raises(ValueError, match="beyond the last inner bin, which reaches 97"):
        signed_quantile(centers, counts, 0.99)
