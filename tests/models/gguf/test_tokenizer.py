"""The tokenizer in a GGUF file: the same ids as the one it was written from, digits by its pre-tokenizer's name, a BOS."""

import pytest

from sparsebench.models import gguf
from sparsebench.models.gguf import header, tokenizer
from tests.helpers import TEXT, tiny_model, tiny_tokenizer, write_gguf


@pytest.fixture
def made(tmp_path):
    def make(**fields):
        return gguf.tokens(str(write_gguf(tmp_path / "m.gguf", tiny_model(layers=1), "llama", **fields)))

    return make


def test_byte_level_bpe_gives_the_ids_it_was_written_from(made):
    again, sample = made(), TEXT[:2000] + "\n\tnaïve — 12345 <s> end"
    assert again(sample)["input_ids"] == tiny_tokenizer()(sample)["input_ids"]
    assert again.decode(again(sample)["input_ids"]) == sample
    assert (again.bos_token_id, again.bos_token) == (0, "<s>")


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("gpt-2", ["year", "Ġ1234567", "Ġof"]),
        ("smollm", ["year", "Ġ", "1", "2", "3", "4", "5", "6", "7", "Ġof"]),
        ("qwen2", ["year", "Ġ", "1", "2", "3", "4", "5", "6", "7", "Ġof"]),
        ("llama-bpe", ["year", "Ġ", "123", "456", "7", "Ġof"]),
    ],
)
def test_words_are_cut_as_the_pre_tokenizers_name_says(before, words, made):
    backend = made(tokenizer__ggml__pre=before).backend_tokenizer
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("year 1234567 of")] == words


def test_a_start_token_is_added_where_the_file_says_so(made):
    assert made(tokenizer__ggml__add_bos_token=True)("a")["input_ids"][0] == 0
    assert made(tokenizer__ggml__add_bos_token=False)("a")["input_ids"][0] != 0
    assert made(tokenizer__ggml__pre="llama-bpe")("a")["input_ids"][0] == 0  # llama.cpp's default for it


def pieces(prefix):
    """Fields of a small SentencePiece vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "ab", "▁ab", "bc"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -3.0, -1.0]
    return {
        "tokenizer__ggml__model": "llama", "tokenizer__ggml__tokens": tokens, "tokenizer__ggml__scores": scores,
        "tokenizer__ggml__token_type": [2, 3, 3, *[6] * 256, *[1] * 7], "tokenizer__ggml__merges": None,
        "tokenizer__ggml__pre": "default", "tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0, "tokenizer__ggml__add_space_prefix": prefix,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(prefix, made):
    again = made(**pieces(prefix))
    start = ["▁ab"] if prefix else ["ab"]
    assert again.tokenize("ab") == start
    assert again.tokenize("abc") == (["▁", "a", "bc"] if prefix else ["a", "bc"])  # bc (-1) is merged before ab (-2)
    assert again.tokenize(" é")[-2:] == ["<0xC3>", "<0xA9>"]
    text = "ab abc é\n"
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text
    assert again("ab")["input_ids"][0] == 1  # SentencePiece files add a BOS unless they say otherwise


def test_two_tokens_of_one_text_are_merged_in_the_order_of_their_parts():
    merges = tokenizer.merges_of({"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4}, [0, 0, -1.0, -2.0, -3.0])
    assert merges == [("a", "b"), ("a", "bb"), ("ab", "b"), ("b", "b")]


def test_a_missing_part_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(layers=1), "llama", tokenizer__ggml__merges=None)
    with pytest.raises(ValueError, match="tokenizer.ggml.merges is missing"):
        tokenizer.check(header.read(path))
