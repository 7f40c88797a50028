"""Which requests belong together: those whose prompts begin alike, or whose client says so.

A conversation's requests share everything up to its first user message, so a replica that answered
one turn has the next turn's beginning in its cache. Must not know the replicas.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

SESSION_HEADER = "X-Session-Id"
# Tool instructions are long and often differ only at their end, so the system prompt counts whole;
# of the first user message the beginning does: questions on one long document stay together.
_SYSTEM_CHARS = 65536
_USER_CHARS = 1024
# A bare prompt has no turns to tell apart, and grows with every one: only its beginning stays.
_PROMPT_CHARS = 256
_PROMPT_TOKENS = 64


def affinity_key(
    document: Mapping[str, object], *, model: str, session: str | None = None
) -> int | None:
    """Return a 64-bit number equal for requests that should meet the same cache.

    A `session` (header X-Session-Id) or the body's `prompt_cache_key` (as OpenAI has it) decides
    where given, else the prompt's prefix. None: there is nothing to go by. `model` names model and
    adapter: their caches hold nothing for each other.
    """
    named = session or document.get("prompt_cache_key")
    prefix = f"={named}" if isinstance(named, str) and named else _prefix(document)
    if not prefix:
        return None
    # Python's own hash differs from process to process; all gateways must agree on this one.
    digest = hashlib.blake2b(f"{model}\0{prefix}".encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _prefix(document: Mapping[str, object]) -> str:
    messages = document.get("messages")
    if isinstance(messages, list):
        return "\0".join(_opening(messages))
    prompt = document.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # several prompts in one request go together; the first one speaks
    if isinstance(prompt, str):
        return prompt[:_PROMPT_CHARS]
    if isinstance(prompt, list):
        return " ".join(str(token) for token in prompt[:_PROMPT_TOKENS])
    return ""


def _opening(messages: list[object]) -> Iterator[str]:
    """Yield the messages up to the first one of the user, cut to what is compared."""
    left = _SYSTEM_CHARS
    for message in messages:
        if not isinstance(message, dict):
            return
        role, text = message.get("role"), _text(message.get("content"))
        if role == "user":
            yield text[:_USER_CHARS]
            return
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))
