import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mizzen.runtime.engine.detokenizer import Detokenizer, DetokenizerFactory
from mizzen.runtime.engine.token_bytes import byte_table
from mizzen.runtime.engine.tokenizer import Tokenizer

EXTRA_PIECES = ["Ġthe", "Ġfox", "the", "END", "EN", "D<", "ðŁĺ"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate([*alphabet, *EXTRA_PIECES])}
    backend = RustTokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["plain text"])
    return Tokenizer(backend, eos_token_ids=[263], chat_template=None, special_tokens={})


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "▁the", "▁fox", "a", "D"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = RustTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, eos_token_ids=[], chat_template=None, special_tokens={})


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
FACTORIES = {"byte-level": BYTE_LEVEL, "byte fallback": BYTE_FALLBACK}


def stream(detokenizer: Detokenizer, ids: list[int]) -> tuple[list[str], str | None]:
    deltas = []
    for token_id in ids:
        delta = detokenizer.push(token_id)
        deltas.append(delta.text)
        if delta.stop:
            return deltas, delta.stop
    return [*deltas, detokenizer.finish().text], None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 40), max_size=40))
def test_joined_deltas_are_the_one_shot_text_for_any_tokens_and_ids_beyond_the_vocabulary(
    ids: list[int],
) -> None:
    deltas, _ = stream(DetokenizerFactory(BYTE_LEVEL).make(), ids)
    assert "".join(deltas) == BYTE_LEVEL.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), kind=st.sampled_from(sorted(FACTORIES)))
def test_joined_deltas_are_the_text_and_none_holds_half_a_character(text: str, kind: str) -> None:
    tokenizer = FACTORIES[kind]
    ids = tokenizer.encode(text)
    deltas, _ = stream(DetokenizerFactory(tokenizer).make(), ids)
    assert "".join(deltas) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from([" the", " fox", "a", " ", "ü"]), min_size=1, max_size=8))
@pytest.mark.parametrize("kind", sorted(FACTORIES))
def test_a_text_goes_on_as_if_it_were_one_with_its_prompt(kind: str, words: list[str]) -> None:
    tokenizer = FACTORIES[kind]
    ids, cut = tokenizer.encode("a the" + "".join(words)), len(tokenizer.encode("a the"))
    text = tokenizer.decode(ids)
    deltas, _ = stream(DetokenizerFactory(tokenizer).make(before=ids[:cut]), ids[cut:])
    assert "a the" + "".join(deltas) == text


@pytest.mark.parametrize("kind", sorted(FACTORIES))
def test_the_bytes_of_its_tokens_are_a_text(kind: str) -> None:
    tokenizer, text = FACTORIES[kind], " the fox 🦊a"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    special = next(iter(tokenizer.special_ids))
    assert tokenizer.token_bytes(special).decode() == tokenizer.backend.id_to_token(special)
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_a_character_split_over_tokens_comes_whole() -> None:
    for tokenizer in FACTORIES.values():
        ids = tokenizer.encode("a🦊")
        deltas, _ = stream(DetokenizerFactory(tokenizer).make(), ids)
        assert [delta for delta in deltas if delta] == ["a", "🦊"]


def test_broken_text_does_not_wait_for_ever() -> None:
    for tokenizer in FACTORIES.values():
        detokenizer = DetokenizerFactory(tokenizer).make()
        continuation = tokenizer.encode("é")[-1]  # a byte that begins no character
        texts = [detokenizer.push(continuation).text for _ in range(20)]
        assert len("".join(texts)) >= 10


STOPS = {
    "within one token": (["Ġthe", "END", "Ġfox"], ("END",), " the", "END"),
    "split over tokens": (["Ġthe", "EN", "D<", "Ġfox"], ("END",), " the", "END"),
    "followed by more in its token": (["a", "EN", "D<"], ("END",), "a", "END"),
    "the earliest of several": (["a", "END", "b"], ("D", "EN"), "a", "EN"),
    "begun but not ended": (["a", "EN", "b"], ("END",), "aENb", None),
    "begun at the very end": (["a", "EN"], ("END",), "aEN", None),
    "begun twice": (["EN", "EN", "D<"], ("END",), "EN", "END"),
}


@pytest.mark.parametrize(("pieces", "stop", "text", "found"), STOPS.values(), ids=STOPS)
def test_a_stop_string(
    pieces: list[str], stop: tuple[str, ...], text: str, found: str | None
) -> None:
    ids = [BYTE_LEVEL.backend.token_to_id(piece) for piece in pieces]
    deltas, stopped = stream(DetokenizerFactory(BYTE_LEVEL).make(stop), ids)
    assert ("".join(deltas), stopped) == (text, found)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["a", "EN", "D<", "END", "N", "D", "E"]), max_size=12),
    stops=st.lists(st.sampled_from(["END", "ND", "EE", "D<a"]), max_size=3),
)
def test_no_stop_string_ever_leaks(pieces: list[str], stops: list[str]) -> None:
    ids = [BYTE_LEVEL.backend.token_to_id(piece) for piece in pieces]
    deltas, found = stream(DetokenizerFactory(BYTE_LEVEL).make(stops), ids)
    text, whole = "".join(deltas), BYTE_LEVEL.decode(ids)
    assert not any(stop in text for stop in stops)
    assert whole.startswith(text)
    assert (found is None) == (not any(stop in whole for stop in stops))
    assert found is not None or text == whole


def test_stop_strings_wait_for_min_tokens() -> None:
    end = BYTE_LEVEL.backend.token_to_id("END")
    detokenizer = DetokenizerFactory(BYTE_LEVEL).make(("END",))
    assert detokenizer.push(end, check_stop=False).stop is None
    assert detokenizer.push(end).stop == "END"


def test_only_byte_level_vocabularies_have_a_byte_table() -> None:
    table = byte_table(BYTE_LEVEL)
    assert table is not None and byte_table(BYTE_FALLBACK) is None
    assert table[BYTE_LEVEL.backend.token_to_id("<|end|>")] == b""
    assert table[BYTE_LEVEL.backend.token_to_id("plain text")] == b"plain text"
