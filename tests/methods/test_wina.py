"""Faithfulness checks of WINA and LaRoSA (docs/methods/wina.md, Faithfulness checks; the number of each check in its docstring)."""

import copy
import itertools

import pytest
import torch

from sparsebench.calibration.allocation import table_of
from sparsebench.kernels.masked_dense import largest
from sparsebench.measure import macs, quality, sparsity
from sparsebench.methods.larosa import Larosa
from sparsebench.methods.wina import Wina, bases_of, column_norms, kept_count
from sparsebench.models.language import Loaded
from sparsebench.modules import rotated_norm
from sparsebench.modules.input_sparse import InputSparseLinear
from sparsebench.sites import find_blocks, weight_of
from tests.helpers import accounted, built, logits, tiny_model, work


def method(name="wina", **changes) -> Wina | Larosa:
    return built("method", f"method={name}", "method.prompt=all", **changes)


def shaped(kind="llama", **changes):
    """A tiny model whose norm weights differ from channel to channel, so that folding them matters."""
    model = tiny_model(kind, **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def fitted(rule, data, tmp_path, kind="llama", **changes):
    return rule.fit(Loaded(shaped(kind, **changes), None, {}), data, work(tmp_path))


def applied(rule, data, tmp_path, kind="llama", **changes):
    state = fitted(rule, data, tmp_path, kind, **changes)
    return rule.apply(shaped(kind, **changes), state, work(tmp_path))


def rotated_model(kind="llama", **changes):
    model = shaped(kind, **changes)
    bases = bases_of(model, find_blocks(model))
    rotated_norm.rotate(model, find_blocks(model), bases)
    return model, bases


def test_equal_column_norms_give_the_masks_of_plain_top_k():
    """Check 1."""
    x = torch.randn(5, 7, 40)
    assert torch.equal(largest(x, 13, torch.full((40,), 2.5)), largest(x, 13))


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.65])
def test_kept_count_is_exact_ties_included(share):
    """Check 2."""
    tied = torch.ones(3, 50)
    tied[1, :20] = 2
    layer = InputSparseLinear(torch.nn.Linear(50, 4), "0.q", 0.0, top_k=kept_count(50, share))
    assert (layer.keep(tied).sum(-1) == int(50 * (1 - share) + 1e-9)).all()
    assert layer.keep(tied)[1, :20].sum() == min(20, kept_count(50, share))  # larger ones first


@pytest.mark.parametrize("name", ["wina", "wina_plain", "larosa"])
def test_measured_sparsity_is_exact_on_held_out_text(name, data, tmp_path):
    rule = method(name, sparsity=0.5)
    model = applied(rule, data, tmp_path)
    _, counters = quality.language_quality(model, data.test, 8, 4)
    for site, actual in sparsity.summarise(model, counters).items():
        linear = next(m for m in model.modules() if getattr(m, "site", None) == site)
        assert actual.sparsity == pytest.approx(1 - linear.top_k / linear.weight.shape[1], abs=1e-12)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_rotation_changes_no_logit(kind, data):
    """Check 3: at sparsity 0 logits differ by less than 1e-3 and the same token is most likely, on 1280 tokens."""
    rows = data.test.rows[:40]
    expected, actual = logits(shaped(kind), rows), logits(rotated_model(kind)[0], rows)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
    top = expected.topk(2, -1).values
    clear = top[..., 0] - top[..., 1] > 2e-3
    assert clear.float().mean() > 0.9 and torch.equal(actual.argmax(-1)[clear], expected.argmax(-1)[clear])


def test_subtracting_a_mean_from_the_embedding_would_change_logits(data):
    """Section 6: an RMSNorm model isn't invariant to it, so the rotation does without."""
    model = shaped()
    expected = logits(model, data.test.rows[:2])
    embedding = model.get_input_embeddings().weight
    embedding.sub_(embedding.mean(1, keepdim=True))
    assert (logits(model, data.test.rows[:2]) - expected).abs().max() > 1e-2


def test_columns_of_k_and_gate_become_orthogonal():
    """Check 4."""
    model, _ = rotated_model()
    for block in find_blocks(model):
        for role in ("k", "gate"):
            weight = weight_of(model.get_submodule(block.sites[role].path)).double()
            gram = weight.T @ weight
            assert (gram - gram.diagonal().diag()).abs().max() / gram.diagonal().max() < 1e-5
        other = weight_of(model.get_submodule(block.sites["q"].path)).double()
        gram = other.T @ other
        assert (gram - gram.diagonal().diag()).abs().max() / gram.diagonal().max() > 1e-3  # not asked of the others


def best_possible(weight, x, keep):
    """Least ||W_D x_D|| over all sets D of inputs to drop."""
    n = len(x)
    drops = itertools.combinations(range(n), n - keep)
    return min(float((weight[:, list(d)] @ x[list(d)]).norm()) for d in drops)


def dropped_error(weight, x, keep):
    mask = largest(x, keep, column_norms(weight))
    return float((weight @ torch.where(mask, 0, x)).norm())


def test_rule_is_optimal_for_orthogonal_columns_and_not_in_general():
    """Check 5: brute force over all subsets, n = 8, K = 4."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 8))[0]
    orthogonal, general = basis * (torch.rand(8) + 0.2), torch.randn(12, 8) + 1
    missed = 0
    for _ in range(40):
        x = torch.randn(8)
        assert dropped_error(orthogonal, x, 4) == pytest.approx(best_possible(orthogonal, x, 4), rel=1e-4)
        missed += dropped_error(general, x, 4) > best_possible(general, x, 4) * (1 + 1e-4)
    assert missed > 5


def test_bases_are_orthogonal_as_stored():
    """Check 6."""
    for basis in rotated_model()[1].values():
        assert basis.dtype == torch.float32
        gram = basis.double().T @ basis.double()
        assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.parametrize("scope", ["k_gate", "all"])
def test_column_norms_are_those_of_the_folded_and_rotated_weights(scope, data, tmp_path):
    """Check 7, and the model that was fitted is left as it was."""
    model = shaped()
    before = copy.deepcopy(model.state_dict())
    state = method(scope=scope, null_space="library").fit(Loaded(model, None, {}), data, work(tmp_path))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    rotated, _ = rotated_model()
    plain = 0
    for block in find_blocks(shaped()):
        for role, site in block.sites.items():
            if scope == "k_gate" and role not in ("k", "gate"):
                assert f"scale.{site.name}" not in state.tensors
                continue
            actual = state.tensors[f"scale.{site.name}"]
            torch.testing.assert_close(actual, column_norms(rotated.get_submodule(site.path).weight))
            old = column_norms(weight_of(shaped().get_submodule(site.path)))
            plain += float((actual - old).abs().max()) > 1e-3
    assert plain >= 4


def test_rescaling_a_column_and_its_input_leaves_the_mask_unlike_teal():
    """Check 8."""
    torch.manual_seed(1)
    weight, x, factor = torch.randn(20, 30), torch.randn(50, 30), torch.rand(30) * 4 + 0.2
    before = largest(x, 12, column_norms(weight))
    assert torch.equal(before, largest(x / factor, 12, column_norms(weight * factor)))
    assert not torch.equal(largest(x, 12), largest(x / factor, 12))


def test_macs_include_rotation_head_scale_and_selection(data, tmp_path):
    """Check 9, counted by hand."""
    rule = method(sparsity=0.5)
    dense = macs.dense_sites(shaped())
    model = applied(rule, data, tmp_path)
    _, counters = quality.language_quality(model, data.test, 4, 4)
    actual, traffic = accounted(dense, model, sparsity.summarise(model, counters), context=1, skips=True)
    d, f, kv, vocabulary, layers = 64, 160, 32, 320, 2
    kept = layers * ((2 * d * d + 2 * d * kv) // 2 + (3 * d * f) // 2)
    rotation, selection, scale = layers * 2 * d * d, layers * (6 * d + f), layers * 2 * d
    assert actual["overhead"] == rotation + selection + scale
    assert actual["sparse"] == kept + rotation + selection + scale + vocabulary * d + layers * 2 * 4 * 16
    assert actual["executed"] == actual["sparse"]
    assert traffic["sparse"] == 4 * (kept + rotation + vocabulary * d + layers * 2 * 2 * 16)


def test_k_is_lossless_up_to_its_rank_under_grouped_queries(data, tmp_path):
    """Check 10: one key head for four query heads, so three quarters of k's rotated columns are zero."""
    rule = method(sparsity=0.75)
    state = fitted(rule, data, tmp_path, "qwen2")
    assert state.info["extra"]["channels_of_k_without_effect"] == {"0.k": 0.75, "1.k": 0.75}
    model = rule.apply(shaped("qwen2"), state, work(tmp_path))
    k = model.model.layers[0].self_attn.k_proj
    x = model.model.layers[0].input_layernorm(torch.randn(2, 9, 64))
    torch.testing.assert_close(k(x), torch.nn.functional.linear(x, k.weight, k.bias), rtol=1e-3, atol=1e-4)


def mixed(seed):
    """`eigen` of a library that returns another, equally valid basis of every degenerate eigenspace, other signs too."""
    right = rotated_norm.eigen

    def eigen(matrix):
        generator = torch.Generator().manual_seed(seed)
        values, vectors = right(matrix)
        for start, stop in rotated_norm.degenerate(values):
            turn = torch.linalg.qr(torch.randn(stop - start, stop - start, generator=generator).double())[0]
            vectors[:, start:stop] = vectors[:, start:stop] @ turn
        return values, vectors * (torch.randint(0, 2, (len(values),), generator=generator) * 2 - 1)

    return eigen


@pytest.mark.parametrize("name", ["wina", "teal_rotated", "larosa"])
def test_the_result_does_not_depend_on_the_library(name, data, tmp_path, monkeypatch):
    """Under grouped queries most of k's basis is a null space; LaRoSA has one with fewer tokens than channels."""
    rule = method(name, sparsity=0.5, **({"calibration_tokens": 32} if name == "larosa" else {}))
    values = [logits(applied(rule, data, tmp_path, "qwen2"), data.test.rows[:8])]
    for seed in (1, 2):
        monkeypatch.setattr(rotated_norm, "eigen", mixed(seed))
        values.append(logits(applied(rule, data, tmp_path, "qwen2"), data.test.rows[:8]))
        monkeypatch.undo()
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=0, atol=1e-4 * float(values[0].abs().max()))


def test_the_librarys_choice_matters(data, tmp_path, monkeypatch):
    """null_space=library, the official code's: equally valid bases give other logits, so the test above can fail."""
    rule = method(sparsity=0.5, null_space="library")
    first = logits(applied(rule, data, tmp_path, "qwen2"), data.test.rows[:8])
    monkeypatch.setattr(rotated_norm, "eigen", mixed(1))
    second = logits(applied(rule, data, tmp_path, "qwen2"), data.test.rows[:8])
    assert float((second - first).norm() / first.norm()) > 1e-2


def test_the_null_space_of_k_is_filled_by_the_principal_axes_of_its_inputs(data, tmp_path):
    """k's inputs in the null space are uncorrelated on calibration text and fall in size; W_k stays orthogonal."""
    model = shaped("qwen2")
    state = fitted(method(), data, tmp_path, "qwen2")
    basis = state.tensors["basis.0.attn_in"].double()
    weight = rotated_norm.folded(model, find_blocks(model)[0], "k")
    null = basis[:, 16:]
    assert (weight @ null).norm() < 1e-5 * weight.norm()
    seen = []
    norm = model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda _, args, y: seen.append(y / norm.weight))
    logits(model, data.fit.rows)
    x = torch.cat(seen).flatten(0, 1).double() @ null
    gram = x.T @ x
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.diagonal().max()
    assert torch.all(gram.diagonal().diff() <= 1e-6 * gram.diagonal().max())


def test_tied_embeddings_stay_tied_and_untouched(data):
    """Check 11: rotating behind the norms leaves embedding and head alone, tied or not."""
    before = shaped(tie_word_embeddings=True)
    model, _ = rotated_model(tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    torch.testing.assert_close(logits(model, data.test.rows[:4]), logits(before, data.test.rows[:4]), rtol=0, atol=1e-3)


def literal(model, bases, keep):
    """Algorithm 1 as printed: the residual stream itself is kept in the bases, with adapters between them.

    keep: K by (layer, role), with column norms for k and gate. Returns the transformed model.
    """
    blocks = find_blocks(model)
    q = {key: basis.double() for key, basis in bases.items()}
    last = q[blocks[-1].index, "mlp_in"]  # the head may use any basis: this one
    embedding = model.get_input_embeddings().weight
    embedding.copy_(embedding.double() @ q[0, "attn_in"])
    for block in blocks:
        layer = model.get_submodule(block.path)
        first, second = q[block.index, "attn_in"], q[block.index, "mlp_in"]
        after = q.get((block.index + 1, "attn_in"), last)
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        for role, site in block.sites.items():
            weight = weight_of(model.get_submodule(site.path))
            new = {
                "attn_in": lambda w, g=norms[0].weight, b=first: (w * g.double()) @ b,
                "mlp_in": lambda w, g=norms[1].weight, b=second: (w * g.double()) @ b,
                "attn_out": lambda w, b=second: b.T @ w,
                "mlp_mid": lambda w, b=after: b.T @ w,
            }[site.group](weight.double())
            weight.copy_(new)
            scale = column_norms(weight) if role in ("k", "gate") else None

            def prune(_, args, k=keep[role], c=scale):
                return (torch.where(largest(args[0], k, c), args[0], 0),)

            model.get_submodule(site.path).register_forward_pre_hook(prune)
        for norm in norms:
            norm.weight.fill_(1)

        adapters = [(one.T @ two).float() for one, two in ((first, second), (second, after))]

        def forward(hidden_states, layer=layer, a=adapters[0], b=adapters[1], **named):
            out, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **named)
            hidden_states = hidden_states @ a + out
            return hidden_states @ b + layer.mlp(layer.post_attention_layernorm(hidden_states))

        layer.forward = forward
    head, norm = model.get_output_embeddings().weight, model.model.norm.weight
    head.copy_((head.double() * norm.double()) @ last)
    norm.fill_(1)
    return model


def test_rotating_behind_the_norms_equals_the_published_algorithm(data, tmp_path):
    """The same masks and logits as with the residual stream in the bases (v2, Algorithm 1, appendix A.2) at 50 %."""
    rule = method(sparsity=0.5, null_space="library")
    actual = applied(rule, data, tmp_path)
    keep = {role: 80 if role == "down" else 32 for role in find_blocks(shaped())[0].sites}
    expected = literal(shaped(), bases_of(shaped(), find_blocks(shaped())), keep)
    dense = logits(shaped(), data.test.rows[:4])
    one, other = logits(actual, data.test.rows[:4]), logits(expected, data.test.rows[:4])
    assert float((one - other).norm() / other.norm()) < 1e-3 < float((one - dense).norm() / dense.norm())


def test_threshold_variant_and_rotated_teal(data, tmp_path):
    """Thresholds give the asked sparsity on calibration inputs; scope=none uses |x| alone, on rotated inputs."""
    for name, scaled in (("wina", True), ("teal_rotated", False)):
        rule = method(name, selection="threshold", sparsity=0.5)
        model = applied(rule, data, tmp_path)
        first = {m.site: m for m in model.modules() if isinstance(m, InputSparseLinear)}["0.k"]
        assert first.top_k is None and (first.scale is not None) == scaled
        seen = []
        first.register_forward_hook(lambda m, args, _, seen=seen: seen.append(m.keep(args[0]).float().mean()))
        logits(model, data.fit.rows)
        assert float(torch.stack(seen).mean()) == pytest.approx(0.5, abs=0.01)  # 0.k sees what calibration saw


def test_greedy_allocation_is_shared_and_sets_the_kept_counts(data, tmp_path):
    greedy = {"step": 0.4, "stop": 0.7, "error_tokens": 0.5}
    rule = method(allocation="greedy", greedy=greedy, calibration_tokens=128, sparsity=0.5)
    state = fitted(rule, data, tmp_path)
    shares = table_of(state, 0).nearest(0.5)
    assert len(set(shares.values())) > 1
    model = rule.apply(shaped(), state, work(tmp_path))
    modules = {m.site: m for m in model.modules() if isinstance(m, InputSparseLinear)}
    for role, share in shares.items():
        if share > 0:
            actual = modules[f"0.{role}"]
            assert actual.top_k == kept_count(actual.weight.shape[1], min(share, 1.0))


def test_models_without_two_rmsnorms_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="two RMSNorms, got 0"):
        method().fit(Loaded(tiny_model("gpt2"), None, {}), data, work(tmp_path))


def test_larosa_rotation_alone_changes_no_logit(data, tmp_path):
    """Appendix: s = 0 with rotation is the dense model; the bases are principal directions of calibration inputs."""
    state = fitted(method("larosa"), data, tmp_path)
    model = shaped()
    bases = {(b, g): state.tensors[f"basis.{b}.{g}"] for b in (0, 1) for g in rotated_norm.GROUPS}
    rotated_norm.rotate(model, find_blocks(model), bases)
    torch.testing.assert_close(
        logits(model, data.test.rows[:8]), logits(shaped(), data.test.rows[:8]), rtol=0, atol=1e-3
    )
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, data.fit.rows)
    x = torch.cat(seen).flatten(0, 1).double()
    gram = x.T @ x
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.diagonal().max()  # uncorrelated, strongest first
    assert torch.all(gram.diagonal()[:-1] - gram.diagonal()[1:] > -1e-4 * gram.diagonal()[0])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.65])
def test_larosa_shares_average_to_the_asked_sparsity(share):
    """The official 0.8 p and 1.2 p would skip less than p; the ratio stays, the weighted mean becomes p."""
    model = shaped()
    block = find_blocks(model)[0]
    shares = method("larosa", sparsity=share, tilt=0.2).shares(model, block)
    sizes = {r: model.get_submodule(s.path).weight.numel() for r, s in block.sites.items()}
    assert sum(shares[r] * sizes[r] for r in sizes) / sum(sizes.values()) == pytest.approx(share)
    assert shares["o"] / shares["q"] == pytest.approx(1.5)
    with pytest.raises(ValueError, match="tilt"):
        method("larosa", sparsity=0.9, tilt=0.5).shares(model, block)
