"""The error of one block in the greedy search: that of the whole block run anew, for less work."""

import pytest
import torch

from sparsebench.calibration.allocation import Greedy, search
from sparsebench.calibration.block_error import BlockError, block_inputs, changed, common_parent, run_block
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model

TOKENS = 5


def prepared(kind):
    """(model, its second block, the BlockError, the distance computed plainly)."""
    model = tiny_model(kind)
    blocks = find_blocks(model)
    sequences = torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, arguments = block_inputs(model, blocks, sequences, 3)
        block = blocks[0]
        module = model.get_submodule(block.path)
        outputs = [run_block(module, h, arguments[0]) for h in hidden]

    def threshold(role, p):
        return 2.0 * p

    def plain(sparsity):
        limits = {role: threshold(role, p) for role, p in sparsity.items() if p > 0}
        rules = {role: (lambda x, t=t: torch.where(x.abs() > t, x, 0)) for role, t in limits.items()}
        with changed(model, block, rules):
            produced = [run_block(module, h, arguments[0]) for h in hidden]
        total = sum(float((a - b)[:, -TOKENS:].float().square().sum()) for a, b in zip(produced, outputs, strict=True))
        return total**0.5

    return model, block, BlockError(model, block, arguments[0], hidden, outputs, threshold, {}, TOKENS), plain


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gpt2", "opt"])
def test_the_search_takes_the_path_of_whole_blocks_run_anew(kind):
    """Same rows as with every trial computed in full by hooks, and the model is left as it was."""
    model, block, error, plain = prepared(kind)
    settings = Greedy(step=0.4, stop=0.6, error_tokens=0.25)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with torch.no_grad():
        fast = search(block, model, error, settings)
        slow = search(block, model, lambda trial, path: plain(trial), settings)
    torch.testing.assert_close(fast.sparsity, slow.sparsity, rtol=0, atol=0)
    torch.testing.assert_close(fast.greedy_error, slow.greedy_error, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast.uniform_error, slow.uniform_error, rtol=1e-5, atol=1e-6)
    assert before == {name: vars(module).get("forward") for name, module in model.named_modules()}


def test_a_trial_on_the_ffn_runs_no_attention_and_no_other_tokens(monkeypatch):
    model, block, error, plain = prepared("llama")
    scores, fed = [], []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: scores.append(1) or attention(*a, **k)
    )
    ffn = common_parent(model, block, ("mlp_in", "mlp_mid"))
    ffn.act_fn.register_forward_hook(lambda _, args, y: fed.append(tuple(y.shape[:2])))
    path = dict.fromkeys(block.sites, 0.05)
    with torch.no_grad():
        error(path | {"q": 0.1}, path)
        assert len(scores) == len(error.hidden), "another q is another attention"
        for role in ("down", "gate", "up", "o"):
            trial = path | {role: 0.2}
            assert error(trial, path) == pytest.approx(plain(trial), rel=1e-5)
            del scores[:]  # of the first trial, whose attention is kept, and of the plain one
            assert error(trial | {role: 0.3}, path) == pytest.approx(error(trial | {role: 0.3}, path))
            assert not scores
        assert set(fed) >= {(3, TOKENS)}
        moved = path | {"v": 0.1}
        assert error(moved, moved) == pytest.approx(plain(moved), rel=1e-5), "what was kept of another path is not used"


def test_norms_run_once_before_attention_and_on_the_compared_tokens_behind_it():
    """And where attention is kept, nothing of the block sees another token."""
    model, block, error, plain = prepared("llama")
    layer, seen = model.get_submodule(block.path), {"input_layernorm": [], "post_attention_layernorm": []}
    for name, shapes in seen.items():
        norm = getattr(layer, name)
        norm.forward = lambda x, own=norm.forward, shapes=shapes: shapes.append(x.shape[1]) or own(x)
    path = dict.fromkeys(block.sites, 0.05)
    with torch.no_grad():
        for trial in (path | {"q": 0.1}, path | {"k": 0.1}, path):
            error(trial, path)
        assert seen["input_layernorm"] == [20] * len(error.hidden) and set(seen["post_attention_layernorm"]) == {TOKENS}
        del seen["input_layernorm"][:]
        assert error(path | {"o": 0.2}, path) == pytest.approx(plain(path | {"o": 0.2}), rel=1e-5)
    assert set(seen["input_layernorm"][: len(error.hidden)]) == {TOKENS}
