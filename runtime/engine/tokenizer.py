"""Text to token ids and back, as the checkpoint says. Knows no model and imports no torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from mizzen.runtime.engine.api import Message
from mizzen.runtime.engine.chat_template import knows_tools, render_chat
from mizzen.runtime.engine.errors import InvalidRequestError
from mizzen.runtime.engine.gguf_vocab import build_tokenizer
from mizzen.runtime.engine.token_bytes import byte_table, piece_bytes
from mizzen.runtime.errors import NotAModelError, WeightsMissingError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(
        self,
        backend: RustTokenizer,
        *,
        eos_token_ids: Sequence[int],
        chat_template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        self.backend = backend
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face directory or a GGUF file.

        Raises:
            BadModelError: it is missing, or of a kind that is not supported.
        """
        if path.is_file():
            return _from_gguf(path)
        if (path / "tokenizer.json").exists():
            return _from_directory(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _from_gguf(files[0])
        raise WeightsMissingError(
            f"{path.name} has no tokenizer.json. Copy it there from the model's repository, or "
            "write it with save_pretrained of a fast tokenizer."
        )

    @cached_property
    def vocabulary_digest(self) -> str:
        """The sha256 of what each token id means."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return self.chat_template is not None

    @property
    def calls_in_tags(self) -> bool:
        """Whether the model writes tool calls between <tool_call> tags, not as bare JSON."""
        template = self.chat_template or ""
        return "<tool_call>" in template or not knows_tools(template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the text's token ids."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the tokens' text."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text, its name where it is a special one."""
        piece = self.backend.id_to_token(token_id)
        if piece is None:  # models have more rows than their tokenizer has tokens
            return b""
        if token_id in self.special_ids:
            return piece.encode()
        return self._byte_table[token_id] if self._byte_table else piece_bytes(piece)

    @cached_property
    def _byte_table(self) -> list[bytes] | None:
        return byte_table(self)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the conversation as text.

        Raises:
            InvalidRequestError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "The model has no chat template. Use the completions API, or add a "
                "chat_template.jinja to the model's directory."
            )
        return render_chat(
            self.chat_template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the conversation's token ids; see `render` for errors."""
        text = self.render(messages, tools, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def render_for_training(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return a conversation's token ids, and which of them the assistant has to produce.

        An assistant turn runs from the end of its generation prompt to the token that ends it,
        found by rendering ever longer beginnings of the conversation.

        Raises:
            InvalidRequestError: the template changes earlier turns when later ones follow, so
                that no beginning of the text belongs to a beginning of the conversation.
        """
        text = self.render(messages, add_generation_prompt=False)
        spans = [
            self._turn_span(text, messages, index)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoding = self.backend.encode(text, add_special_tokens=False)
        mask = [False] * len(encoding.ids)
        for start, end in spans:
            inside = [i for i, (left, right) in enumerate(encoding.offsets) if start < right <= end]
            for i in _until_last(inside, encoding.ids, self.eos_token_ids):
                mask[i] = True
        return list(encoding.ids), mask

    def _turn_span(self, text: str, messages: Sequence[Message], index: int) -> tuple[int, int]:
        before = self.render(messages[:index], add_generation_prompt=True)
        after = self.render(messages[: index + 1], add_generation_prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise InvalidRequestError(
                f"The chat template renders turn {index + 1} differently once later turns follow, "
                "so the assistant's tokens cannot be told apart. End the conversation there."
            )
        return len(before), len(after)


def _until_last(inside: list[int], ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Cut what the template puts behind the turn's end token, such as a line break."""
    last = max((i for i in inside if ids[i] in ends), default=None)
    return inside if last is None else [i for i in inside if i <= last]


def _from_directory(path: Path) -> Tokenizer:
    try:
        backend = RustTokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library's errors have no type of their own
        raise _unreadable(path / "tokenizer.json", error) from error
    backend.no_truncation()
    backend.no_padding()
    settings = _read_json(path / "tokenizer_config.json")
    special = {name: _text_of(settings[name]) for name in SPECIAL_NAMES if settings.get(name)}
    eos: list[int] = []
    for source in ("generation_config.json", "config.json"):
        declared = _read_json(path / source).get("eos_token_id")
        eos += (
            declared if isinstance(declared, list) else [declared] if declared is not None else []
        )
    if "eos_token" in special and (index := backend.token_to_id(special["eos_token"])) is not None:
        eos.append(index)
    return Tokenizer(
        backend,
        eos_token_ids=eos,
        chat_template=_directory_template(path, settings),
        special_tokens=special,
    )


def _directory_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones; "default" is the one for chatting
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _from_gguf(path: Path) -> Tokenizer:
    from mizzen.runtime.model.gguf_header import read_gguf_header  # noqa: PLC0415 - only if needed

    metadata = read_gguf_header(path).metadata
    try:
        return _from_metadata(metadata)
    except KeyError as missing:
        raise NotAModelError(
            f"{path.name} lacks the entry {missing}, without which it has no tokenizer. Use the "
            "model's Hugging Face directory instead."
        ) from None


def _from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot")}
    ids: dict[str, int] = {name: metadata[key] for name, key in keys.items() if key in metadata}
    return Tokenizer(
        build_tokenizer(metadata),
        eos_token_ids=[ids[name] for name in ("eos", "eot") if name in ids],
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={
            f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids
        },
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(file: Path, error: Exception) -> NotAModelError:
    return NotAModelError(f"{file.name} cannot be read ({error}). Copy the file again.")


def _text_of(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
