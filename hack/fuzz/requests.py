"""HTTP requests of both protocols, nearly right."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from random import Random
from typing import Any

from hack.fuzz.odd import as_json, odd_bytes, odd_document

MODEL = "tiny"
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 4}},
    "required": ["a"],
}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}
_CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
_LIMITS = {"max_tokens": 4, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 7}
_EDITS = {
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "stop": ["zz"],
    "stop_token_ids": [9],
    "min_tokens": 1,
}
_USER = {"role": "user", "content": "Say hello."}

# path -> bodies that are right
OPENAI: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": (
        {"model": MODEL, "messages": [_USER], **_LIMITS, **_EDITS},
        {"model": MODEL, "messages": [_USER], **_LIMITS, "n": 2, "logprobs": True, "stream": True},
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                _USER,
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
            ],
            "tools": [_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
            "max_tokens": 8,
        },
        {
            "model": MODEL,
            "messages": [_USER],
            "max_tokens": 4,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": _SCHEMA},
            },
        },
    ),
    "/v1/completions": (
        {"model": MODEL, "prompt": ["a", "b"], **_LIMITS, "echo": True},
        {"model": MODEL, "prompt": [5, 6, 7], **_LIMITS, "logprobs": 2, "stream": True},
        {"model": MODEL, "prompt": "x", "structured_outputs": {"regex": "[a-c]{2,4}"}},
        {"model": MODEL, "prompt": "x", "guided_grammar": 'start: "a" ("b" | "c")+'},
    ),
    "/v1/embeddings": ({"model": MODEL, "input": ["a", "b"], "encoding_format": "base64"},),
    "/tokenize": (
        {"prompt": "hello", "return_token_strs": True},
        {"model": MODEL, "messages": [_USER]},
    ),
    "/detokenize": ({"model": MODEL, "tokens": [5, 6, 7]},),
}
_ENCODINGS = ("br", "GZIP", "gzip, gzip", "identity", "", "é")
_LENGTHS = ("", "-1", "²", "9" * 5000, "0x10", "1e3", "0000", "99999999999999999999", "٣")


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it is sent."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def label(self) -> str:
        """What is asked, without what varies."""
        return f"{self.method} {self.path[:60]}"

    def raw(self, host: str) -> bytes:
        """Return the request as the bytes of HTTP/1.1."""
        lines = [
            f"{self.method} {self.path} HTTP/1.1".encode(),
            b"Host: " + host.encode(),
            b"Content-Length: " + str(len(self.body)).encode(),
            *(name + b": " + value for name, value in self.headers),
        ]
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


def odd_openai(rng: Random) -> HttpRequest:
    """Return a call of OpenAI's with something wrong in it."""
    path = rng.choice(list(OPENAI))
    body = as_json(odd_document(rng, rng.choice(OPENAI[path])))
    if rng.random() < 0.1:
        body = odd_bytes(rng, body)
    return HttpRequest("POST", path, ((b"content-type", b"application/json"),), body)


def odd_inference(rng: Random) -> HttpRequest:
    """Return a call of the Open Inference Protocol with something wrong in it."""
    path = rng.choice(_INFERENCE)
    if path.endswith("infer"):
        return _odd_infer(rng, path)
    documents: dict[str, dict[str, Any]] = {
        "index": {"ready": True},
        "load": {"parameters": {"config": json.dumps({"parameters": {"path": "/mnt/pvc/a"}})}},
        "unload": {"parameters": {"unload_dependents": False}},
    }
    if rng.random() < 0.5:
        documents["load"] = {"parameters": {"path": "/mnt/pvc/a", "digest": "sha256:" + "0" * 64}}
    body = as_json(odd_document(rng, documents[path.rpartition("/")[2]]))
    return HttpRequest("POST", path, (), odd_bytes(rng, body) if rng.random() < 0.2 else body)


_INFERENCE = (
    *(f"/v2/models/{MODEL}/infer",) * 5,
    f"/v2/models/{MODEL}/versions/1/infer",
    "/v2/repository/index",
    "/v2/repository/models/a/load",
    "/v2/repository/models/a/load",
    "/v2/repository/models/a/unload",
)


def sampling(rng: Random) -> dict[str, Any]:
    """Return what `sampling_parameters` may hold, perhaps with something wrong in it."""
    right = {"max_tokens": 4, **rng.choice((_LIMITS, _EDITS, {}))}
    return odd_document(rng, right) if rng.random() < 0.5 else right


def _odd_infer(rng: Random, path: str) -> HttpRequest:
    texts = {"text_input": "hello", "sampling_parameters": json.dumps(sampling(rng))}
    inputs: list[dict[str, Any]] = []
    raw = b""
    for name, text in texts.items():
        given: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": [1]}
        if rng.random() < 0.5:
            value = text.encode(errors="replace")
            blob = odd_bytes(rng, len(value).to_bytes(4, "little") + value)
            given["parameters"] = {"binary_data_size": len(blob)}
            raw += blob
        else:
            given["data"] = [text]
        inputs.append(given)
    document = {
        "id": "1",
        "inputs": inputs,
        "outputs": [{"name": "text_output", "parameters": {"binary_data": rng.random() < 0.5}}],
        "parameters": {"priority": 0, "timeout": 30_000_000, "binary_data_output": True},
    }
    header = as_json(odd_document(rng, document))
    body = odd_bytes(rng, header) + raw if rng.random() < 0.1 else header + raw
    length = rng.choice(_LENGTHS) if rng.random() < 0.1 else str(len(header))
    headers = [] if not raw and rng.random() < 0.5 else [(_LENGTH, length.encode())]
    return HttpRequest("POST", path, *_encoded(rng, headers, body))


_LENGTH = b"inference-header-content-length"
_Headers = tuple[tuple[bytes, bytes], ...]


def _encoded(
    rng: Random, headers: list[tuple[bytes, bytes]], body: bytes
) -> tuple[_Headers, bytes]:
    name = rng.choice((None, None, "gzip", "deflate", "odd"))
    if name == "gzip":
        body = gzip.compress(body, 1)
    if name == "deflate":
        body = zlib.compress(body)
    if name in ("gzip", "deflate") and rng.random() < 0.2:
        body = odd_bytes(rng, body)
    value = rng.choice(_ENCODINGS) if name == "odd" else name
    said = [] if value is None else [(b"content-encoding", value.encode())]
    return (*headers, *said), body


def odd_http(rng: Random, host: str) -> bytes:
    """Return the bytes of a request whose very frame may be broken."""
    make = rng.choice((odd_openai, odd_inference))
    return odd_bytes(rng, make(rng).raw(host))
