"""A tokenizer from a GGUF file's metadata, without importing transformers: start-up counts."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from mizzen.runtime.errors import BadModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types, as llama.cpp numbers them

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SPLITS = {
    "default": GPT2_SPLIT,
    "gpt-2": GPT2_SPLIT,
    "smollm": GPT2_SPLIT,
    "llama-bpe": LLAMA3_SPLIT,
    "qwen2": QWEN2_SPLIT,
    "bloom": BLOOM_SPLIT,
}


class UnknownTokenizerError(BadModelError):
    """The GGUF file's tokenizer is of a kind we do not build."""

    reason = "UnknownTokenizer"


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that the metadata describes.

    Raises:
        UnknownTokenizerError: only byte-level BPE and SentencePiece BPE are built.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise UnknownTokenizerError(
            f"The GGUF file's tokenizer is {kind!r}; gpt2 and llama are supported. Use the "
            "model's Hugging Face directory instead."
        )
    _add_special_tokens(tokenizer, metadata)
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        _prepend_bos(tokenizer, metadata)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise UnknownTokenizerError(
            f"The GGUF file splits text by the rule {name!r}; supported are "
            f"{', '.join(sorted(SPLITS))}. Use the model's Hugging Face directory instead."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # llama3 takes a word that is a token whole, even where its merges would not build it.
    tokenizer = Tokenizer(BPE(_vocab(metadata), merges, ignore_merges=name == "llama-bpe"))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [
        pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    if name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    vocab = _vocab(metadata)
    scores = dict(zip(vocab, metadata["tokenizer.ggml.scores"], strict=False))
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_by_score(vocab, scores)
    bpe = BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        ends.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _merges_by_score(
    vocab: Mapping[str, int], scores: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Rebuild the merge list that SentencePiece leaves implicit: better scored pieces first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, vocab[left], vocab[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _vocab(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    pairs = list(zip(tokens, types, strict=True))
    control = [
        AddedToken(t, special=True, normalized=False) for t, kind in pairs if kind == CONTROL
    ]
    own = [
        AddedToken(t, special=False, normalized=False) for t, kind in pairs if kind == USER_DEFINED
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(own)


def _prepend_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    index = metadata["tokenizer.ggml.bos_token_id"]
    bos = metadata["tokenizer.ggml.tokens"][index]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
    )
