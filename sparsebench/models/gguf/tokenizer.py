"""The tokenizer in a GGUF file: byte-level BPE by the name of its pre-tokenizer, or SentencePiece's BPE by scores.

transformers' own conversion does not look at `tokenizer.ggml.pre`, so that SmolLM's digits, for one, are not split.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsebench.models.gguf.header import File

CONTROL, USER_DEFINED = 3, 4  # types of tokens
SPACE = "\u2581"  # how SentencePiece writes a blank
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name -> GGUF's name
WORDS = (  # of Llama 3 and Qwen2, which differ in how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # `tokenizer.ggml.pre` -> the expression that cuts a text into words; None = GPT-2's own
    "gpt-2": None, "phi-2": None, "smollm": None,
    "llama-bpe": WORDS.replace("DIGITS", r"\p{N}{1,3}"), "llama3": WORDS.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": WORDS.replace("DIGITS", r"\p{N}"), "deepseek-r1-qwen": WORDS.replace("DIGITS", r"\p{N}"),
}  # fmt: skip


def check(file: File) -> None:
    """Raise ValueError where the tokenizer is of a kind that is not known here."""
    kind, before = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"its tokenizer is of kind {kind!r}, known are gpt2 (byte-level BPE) and llama (SentencePiece BPE)"
        )
    if kind == "gpt2" and before not in SPLITS:
        raise ValueError(f"its pre-tokenizer is {before!r}, known are {', '.join(SPLITS)}")
    for part in ("tokens", "merges" if kind == "gpt2" else "scores"):
        if f"tokenizer.ggml.{part}" not in file.fields:
            raise ValueError(f"tokenizer.ggml.{part} is missing")


def build(file: File) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the file's vocabulary. Raises ValueError as `check`."""
    check(file)

    def field(name, default=None):
        return file.fields.get(f"tokenizer.ggml.{name}", default)

    tokens, byte_level = field("tokens"), field("model") == "gpt2"
    names = {role: field(f"{key}_token_id") for role, key in SPECIAL.items()}
    special = {f"{role}_token": tokens[index] for role, index in names.items() if index is not None}
    made = byte_bpe(file) if byte_level else sentencepiece(file, special.get("unk_token"))
    kinds = field("token_type", [1] * len(tokens))
    made.add_tokens([
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ])  # fmt: skip
    bos = special.get("bos_token")
    adds_bos = field("add_bos_token", not byte_level or field("pre") in ("llama-bpe", "llama3"))  # llama.cpp's defaults
    if bos and adds_bos:
        start = [(bos, names["bos"])]
        made.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", special_tokens=start)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = file.fields.get("tokenizer.chat_template")
    return fast


def byte_bpe(file: File) -> Tokenizer:
    """Byte-level BPE whose words are cut as `tokenizer.ggml.pre` says."""
    tokens, merges = (file.fields[f"tokenizer.ggml.{part}"] for part in ("tokens", "merges"))
    before = file.fields["tokenizer.ggml.pre"]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    whole = before in ("llama-bpe", "llama3")  # a word that is a token is not put together from its parts
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=whole))
    if before in ("qwen2", "deepseek-r1-qwen"):
        made.normalizer = normalizers.NFC()
    split = SPLITS[before]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if before == "smollm" else []
    steps += [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    return made


def sentencepiece(file: File, unknown: str | None) -> Tokenizer:
    """SentencePiece's BPE: what has the best score is merged first; bytes where a character is no token."""
    tokens, scores = (file.fields[f"tokenizer.ggml.{part}"] for part in ("tokens", "scores"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = merges_of(vocabulary, scores)
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.fields.get("tokenizer.ggml.add_space_prefix", True):
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), blanks])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = blanks
    made.decoder = decoders.Sequence(back)
    return made


def merges_of(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, by the token's score, then by the parts' numbers."""
    merges = []
    for token, index in vocabulary.items():
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        ways = sorted((vocabulary[a], vocabulary[b], a, b) for a, b in pairs if a in vocabulary and b in vocabulary)
        merges += [(-scores[index], index, i, (a, b)) for i, (_, _, a, b) in enumerate(ways)]
    merges.sort(key=lambda merge: merge[:3])
    return [pair for *_, pair in merges]
