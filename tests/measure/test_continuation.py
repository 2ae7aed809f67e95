"""What a model says after a prompt: transformers' own greedy text, dense and sparse, with the BOS the model is used to."""

import pytest
import torch

from sparsebench.measure.continuation import OPENING, TOKENS, continuation, greedy
from sparsebench.modules.input_sparse import swap
from sparsebench.records import terminal
from sparsebench.sites import find_blocks
from tests.helpers import KINDS, tiny_model


def sparse_model(threshold=0.5, **changes):
    model = tiny_model(**changes)
    for site in (s for b in find_blocks(model) for s in b.sites.values()):
        swap(model, site, threshold, prompt="p99", kernel="masked_dense")
    return model


def theirs(model, prompt, count):
    with torch.no_grad():
        made = model.generate(prompt, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(prompt))
    return made[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    "model", [tiny_model(), sparse_model(), tiny_model("gpt2", n_positions=64)], ids=["dense", "sparse", "gpt2"]
)
def test_the_tokens_are_those_of_transformers(model):
    prompt = torch.tensor([[5, 9, 31, 200, 7]])
    model.generation_config.eos_token_id = None
    assert greedy(model, prompt, 24) == theirs(model, prompt, 24)


def test_the_end_of_a_text_ends_it():
    model, prompt = tiny_model(), torch.tensor([[5, 9, 31]])
    tokens = greedy(model, prompt, 24)
    model.generation_config.eos_token_id = [1, tokens[6]]
    assert greedy(model, prompt, 24) == tokens[: tokens.index(tokens[6])]


def test_the_prompt_is_the_users_or_the_opening_of_the_test_split():
    kind = KINDS["language"]
    loaded, split = kind.loaded(), kind.data().test
    said = continuation(loaded.module, loaded.tokenizer, split, None)
    opening = loaded.tokenizer.decode(split.sequences(1)[0, :OPENING])
    assert said["prompt"] == opening and said == continuation(loaded.module, loaded.tokenizer, split, opening)
    assert continuation(loaded.module, loaded.tokenizer, split, "word7 of")["text"] != said["text"]
    split.bos = "window"  # the model is scored with a BOS, so it is shown with one
    given = [loaded.tokenizer.bos_token_id, *loaded.tokenizer("word7 of")["input_ids"]]
    expected = loaded.tokenizer.decode(greedy(loaded.module, torch.tensor([given]), TOKENS), skip_special_tokens=True)
    assert continuation(loaded.module, loaded.tokenizer, split, "word7 of")["text"] == expected


def test_a_prompt_longer_than_the_learned_positions_is_cut():
    model, kind = tiny_model("gpt2", n_positions=48), KINDS["language"]
    said = continuation(model, kind.loaded().tokenizer, kind.data().test, "word7 of 5 " * 40)
    assert said["text"]


def test_the_terminal_shows_both_and_keeps_them_out_of_the_figures():
    texts = {side: {"prompt": "One", "text": f" {side}\n"} for side in ("dense", "sparse")}
    assert terminal.said({"extra": {"continuation": texts}}) == [
        'prompt  "One"',
        'dense   " dense\\n"',
        'sparse  " sparse\\n"',
    ]
    assert terminal.said({"extra": {}}) == terminal.said({"extra": None}) == []
