import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.errors import InvalidRequestError
from mizzen.runtime.engine.gguf_vocab import UnknownTokenizerError, build_tokenizer
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import NotAModelError, WeightsMissingError

CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes 🦊"},
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def test_a_directory_gives_what_transformers_gives(directory: Path) -> None:
    ours = Tokenizer.load(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    for text in ("Hello  world", "é🦊\n<|im_end|>x"):
        assert ours.encode(text) == theirs.encode(text)
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)


def test_every_declared_end_token_ends_an_answer_once(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    assert Tokenizer.load(directory).eos_token_ids == (256, 258)


def test_a_template_file_wins_over_the_one_in_the_settings(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(directory).render([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_a_directory_without_a_tokenizer_says_what_to_copy(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissingError, match=r"no tokenizer\.json\. Copy it there"):
        Tokenizer.load(tmp_path)


TEMPLATES = {
    "refuses by itself": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "is broken": ("{% for message in messages %}", "Unexpected end of template"),
    "needs a field that is missing": ("{{ messages[0].content.text | upper + 1 }}", "refuses"),
    "reaches for Python": ("{{ messages.__class__.__mro__ }}", "unsafe|refuses"),
}


@pytest.mark.parametrize(("template", "text"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that(directory: Path, template: str, text: str) -> None:
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequestError, match=text):
        Tokenizer.load(directory).apply_chat_template(CHAT)


def test_a_model_without_a_template_says_so(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(directory)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)


def test_templates_may_use_tools_json_dates_and_generation_marks(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(
        "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ strftime_now('%%') }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
        "{% endfor %}{{ eos_token }}"
    )
    text = Tokenizer.load(directory).render(CHAT, tools=[{"name": "<b>"}])
    assert text == '{"name": "<b>"}%Hi there<|im_end|>'


def test_training_marks_the_assistants_words_and_the_end_of_its_turn(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    ids, mask = tokenizer.render_for_training(CHAT)
    assert ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    marked = [token for token, is_assistant in zip(ids, mask, strict=True) if is_assistant]
    assert tokenizer.decode(marked, skip_special_tokens=False) == "Hello!<|im_end|>Yes 🦊<|im_end|>"


def test_training_without_an_assistant_marks_nothing(directory: Path) -> None:
    _, mask = Tokenizer.load(directory).render_for_training(CHAT[:1])
    assert not any(mask)


def test_training_refuses_a_template_that_rewrites_earlier_turns(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match="renders turn 2 differently"):
        Tokenizer.load(directory).render_for_training(CHAT)


def gguf_metadata(kind: str = "gpt2", pre: str = "smollm") -> dict:
    """Train a small vocabulary and describe it as a GGUF file does."""
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the fox and the hound 1234 4321"] * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<|end|>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def test_a_gguf_vocabulary_keeps_merges_special_tokens_and_single_digits() -> None:
    tokenizer = build_tokenizer(gguf_metadata())
    pieces = tokenizer.encode("the fox 12<|end|>").tokens
    assert pieces == ["the", "Ġfox", "Ġ", "1", "2", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("the é🦊").ids) == "the é🦊"
    assert tokenizer.decode([0]) == ""


def test_a_gguf_vocabulary_begins_with_bos_if_it_says_so() -> None:
    metadata = gguf_metadata() | {"tokenizer.ggml.add_bos_token": True}
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode("the").ids[0] == 0
    assert tokenizer.encode("the", add_special_tokens=False).ids[0] != 0


def test_a_sentencepiece_vocabulary_prefers_better_scored_pieces() -> None:
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "he", "th", "the", "▁the"]
    scores = [0.0] * 262 + [-3.0, -1.0, -2.0, -4.0]
    tokenizer = build_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, *[6] * 256, *[1] * 8],
            "tokenizer.ggml.bos_token_id": 1,
        }
    )
    assert tokenizer.encode("the the").tokens == ["<s>", "▁the", "▁the"]
    assert tokenizer.decode(tokenizer.encode("the é").ids) == "the é"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_file_cut_short_is_named(directory: Path, name: str) -> None:
    content = (directory / name).read_text()
    (directory / name).write_text(content[: len(content) // 2])
    with pytest.raises(NotAModelError, match=rf"{name} cannot be read .*Copy the file again"):
        Tokenizer.load(directory)


def test_a_gguf_file_without_its_merges_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = gguf_metadata()
    del metadata["tokenizer.ggml.merges"]
    header = SimpleNamespace(metadata=metadata)
    monkeypatch.setattr("mizzen.runtime.model.gguf_header.read_gguf_header", lambda path: header)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(NotAModelError, match=r"lacks the entry 'tokenizer\.ggml\.merges'"):
        Tokenizer.load(tmp_path / "model.gguf")


def test_unknown_gguf_tokenizers_are_refused_by_name() -> None:
    with pytest.raises(UnknownTokenizerError, match="'bert'; gpt2 and llama are supported"):
        build_tokenizer(gguf_metadata(kind="bert"))
    with pytest.raises(UnknownTokenizerError, match="rule 'exotic'; supported are bloom"):
        build_tokenizer(gguf_metadata(pre="exotic"))
