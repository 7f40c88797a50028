"""What config.json says, in old and new spelling, and what we say to one we cannot use."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from mizzen.runtime.errors import (
    BadModelError,
    ModelNotFoundError,
    NotAModelError,
    PickledWeightsRefusedError,
    RemoteCodeRefusedError,
    UnknownArchitectureError,
)
from mizzen.runtime.model.arch import ArchSpec, RopeSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SPEC = RopeSpec(theta=5e5, scaling="llama3", factor=8.0)

READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "KV heads not written are as many as query heads": ({}, {"kv_heads": 4, "head_dim": 16}),
    "an explicit head size wins": ({"head_dim": 32}, {"head_dim": 32}),
    "a head size of null is worked out": ({"head_dim": None}, {"head_dim": 16}),
    "old spelling of the type": ({"torch_dtype": "float16"}, {"dtype": torch.float16}),
    "new spelling of the type": ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}),
    "no type is float32": ({}, {"dtype": torch.float32}),
    "old spelling of the rotary base": ({"rope_theta": 5e5}, {"rope": RopeSpec(theta=5e5)}),
    "new spelling of the rotary base": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope": RopeSpec(theta=5e5)},
    ),
    "old spelling of linear scaling": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope": RopeSpec(theta=1e4, scaling="linear", factor=2.0)},
    ),
    "old spelling of llama3 scaling": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {"rope": LLAMA3_SPEC},
    ),
    "new spelling of llama3 scaling": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope": LLAMA3_SPEC},
    ),
    "rope_scaling of null": ({"rope_scaling": None}, {"rope": RopeSpec()}),
    "one end token": ({"eos_token_id": 2}, {"eos_ids": (2,)}),
    "several end tokens": ({"eos_token_id": [2, 7]}, {"eos_ids": (2, 7)}),
    "biases of attention": ({"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
    "Qwen2 has biases on q, k and v alone": (
        {"architectures": ["Qwen2ForCausalLM"]},
        {"qkv_bias": True, "o_bias": False},
    ),
    "Qwen2's unused window changes nothing": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 9000,
            "sliding_window": 4096,
            "use_sliding_window": False,
        },
        {"max_len": 9000, "windows": ()},
    ),
    "Qwen3 normalises queries and keys": (
        {"architectures": ["Qwen3ForCausalLM"]},
        {"qk_norm": True, "qkv_bias": False},
    ),
    "Mistral's window is every layer's": (
        {
            "architectures": ["MistralForCausalLM"],
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        {"max_len": 32768, "windows": (4096, 4096)},
    ),
    "Mistral without a window": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"windows": ()},
    ),
    "Qwen2's first layers see everything": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        {"windows": (None, 4096)},
    ),
    "Qwen2's first 28 layers have no window": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "sliding_window": 4096,
            "use_sliding_window": True,
            "num_hidden_layers": 30,
        },
        {"windows": (None,) * 28 + (4096, 4096)},
    ),
}


@pytest.mark.parametrize(("changes", "expected"), READ.values(), ids=READ)
def test_config_is_read(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = ArchSpec.from_config({**LLAMA, **changes})
    assert {name: getattr(spec, name) for name in expected} == expected


REFUSED: dict[str, tuple[dict[str, Any], type[BadModelError], str, str]] = {
    "an unknown architecture": (
        {"architectures": ["MambaForCausalLM"]},
        UnknownArchitectureError,
        "UnknownArchitecture",
        "Architecture MambaForCausalLM is not supported. Supported: BloomForCausalLM",
    ),
    "no architecture at all": (
        {"architectures": None},
        UnknownArchitectureError,
        "UnknownArchitecture",
        "model_type None",
    ),
    "code from the model's directory": (
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        RemoteCodeRefusedError,
        "RemoteCodeRefused",
        "remove auto_map",
    ),
    "a rotary scaling we do not compute": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        UnknownArchitectureError,
        "UnknownArchitecture",
        "Rotary scaling yarn is not supported",
    ),
    "an activation we do not compute": (
        {"hidden_act": "relu2"},
        UnknownArchitectureError,
        "UnknownArchitecture",
        "Activation relu2 is not supported",
    ),
    "query heads that do not share KV heads evenly": (
        {"num_key_value_heads": 3},
        NotAModelError,
        "NotAModel",
        "4 query heads do not divide among 3 KV heads",
    ),
}


@pytest.mark.parametrize(("changes", "error", "reason", "message"), REFUSED.values(), ids=REFUSED)
def test_config_is_refused(
    changes: dict[str, Any], error: type[BadModelError], reason: str, message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        ArchSpec.from_config({**LLAMA, **changes})
    assert raised.value.reason == reason


def test_a_missing_field_is_named() -> None:
    config = {name: value for name, value in LLAMA.items() if name != "hidden_size"}
    with pytest.raises(NotAModelError, match="no field 'hidden_size'"):
        ArchSpec.from_config(config)


def test_a_field_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(NotAModelError, match="wrong type"):
        ArchSpec.from_config({**LLAMA, "hidden_size": "64"})


def empty_gguf(*, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, 0)


PATHS: dict[str, tuple[dict[str, bytes], str, type[BadModelError], str]] = {
    "nothing there": ({}, "missing", ModelNotFoundError, "There is no file or directory"),
    "an empty directory": ({}, ".", NotAModelError, r"neither config.json nor a .gguf file"),
    "a text file": ({"readme.md": b"hi"}, "readme.md", NotAModelError, "is not a .gguf file"),
    "a config that is no JSON": (
        {"config.json": b"{"},
        ".",
        NotAModelError,
        "config.json is not valid JSON",
    ),
    "a config that is a list": ({"config.json": b"[]"}, ".", NotAModelError, "not hold a JSON"),
    "pickled weights beside a config": (
        {"config.json": json.dumps(LLAMA).encode(), "pytorch_model.bin": b""},
        ".",
        PickledWeightsRefusedError,
        "Convert them to safetensors",
    ),
    "pickled weights alone": ({"model.pt": b""}, ".", PickledWeightsRefusedError, "as pickles"),
    "two GGUF files": (
        {"a.gguf": b"", "b.gguf": b""},
        ".",
        NotAModelError,
        "holds 2 .gguf files: name one",
    ),
    "a file that only calls itself GGUF": (
        {"a.gguf": b"hello, world"},
        "a.gguf",
        NotAModelError,
        "is not a GGUF file",
    ),
    "a GGUF version from the future": (
        {"a.gguf": empty_gguf(version=9)},
        "a.gguf",
        NotAModelError,
        "version 9",
    ),
    "a GGUF file that says nothing": (
        {"a.gguf": empty_gguf()},
        ".",
        UnknownArchitectureError,
        "GGUF architecture None",
    ),
}


@pytest.mark.parametrize(("files", "path", "error", "message"), PATHS.values(), ids=PATHS)
def test_path_is_refused(
    tmp_path: Path, files: dict[str, bytes], path: str, error: type[BadModelError], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        ArchSpec.from_dir(tmp_path / path)
