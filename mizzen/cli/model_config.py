"""A model's config.json, from wherever the model is. Its weights are never read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIG = "config.json"
_GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class ModelFileError(ValueError):
    """What was named is no model; the text says what is expected."""


def read_config(model: str) -> Mapping[str, object]:
    """Return the sizes of a model: a folder, a file, or an address as of spec.model.source.

    Raises:
        ModelFileError: there is no such model, or it cannot be read.
    """
    if model.startswith(("hf://", "s3://")):
        return _parsed(_fetch_config(model), CONFIG)
    path = Path(model)
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        has_config = (path / CONFIG).is_file()
        path = found[0] if len(found) == 1 and not has_config else path / CONFIG
    if not path.is_file():
        raise ModelFileError(
            f"There is no file {path}. Name a directory with config.json, the file itself, a "
            ".gguf file, hf://ORG/NAME or s3://BUCKET/PREFIX."
        )
    if path.suffix == ".gguf":
        return _gguf_config(path)
    return _parsed(path.read_bytes(), path.name)


def _parsed(text: bytes, name: str) -> Mapping[str, object]:
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{name} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelFileError(f"{name} does not hold a JSON object.")
    return config


def _fetch_config(source: str) -> bytes:
    from mizzen.runtime.errors import MizzenError

    try:
        from mizzen.runtime.sources.address import parse_address
        from mizzen.runtime.sources.fetch import open_remote

        address = parse_address(source)
        assert address is not None
        remote = open_remote(address)
        listing = remote.list_files()
        file = next((file for file in listing.files if file.name == CONFIG), None)
        if file is None:
            raise ModelFileError(f"{source} is a .gguf file. Fetch it and name it here.")
        with TemporaryDirectory() as folder:
            remote.fetch(file, listing, Path(folder) / CONFIG)
            return (Path(folder) / CONFIG).read_bytes()
    except ImportError:
        raise ModelFileError(
            "Asking a hub or a bucket needs more packages: pip install 'mizzen[runtime]', or name "
            "the model's config.json."
        ) from None
    except MizzenError as error:
        raise ModelFileError(str(error)) from None


def _gguf_config(path: Path) -> Mapping[str, object]:
    """Return a GGUF file's sizes by the names of a config.json."""
    try:
        from mizzen.runtime.model.gguf_header import read_gguf_header
    except ImportError:
        raise ModelFileError(
            "Reading a .gguf file needs the package gguf: pip install 'mizzen[runtime]', or name "
            "the model's config.json."
        ) from None
    from mizzen.runtime.errors import BadModelError

    try:
        header = read_gguf_header(path)
    except BadModelError as error:
        raise ModelFileError(str(error)) from None
    kind = str(header.metadata.get("general.architecture"))

    def field(name: str) -> object:
        return header.metadata.get(f"{kind}.{name}")

    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return {
        "architectures": [_GGUF_ARCHITECTURES.get(kind, kind)],
        "num_hidden_layers": field("block_count"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("attention.key_length"),
        "max_position_embeddings": field("context_length"),
        "vocab_size": len(tokens) if isinstance(tokens, list) else field("vocab_size"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
