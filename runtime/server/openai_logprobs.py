"""Log probabilities in the two shapes that OpenAI's two completion calls have."""

from collections.abc import Sequence
from dataclasses import dataclass

from mizzen.runtime.engine.api import TokenizerApi, TokenLogprob


def chat_logprobs(tokenizer: TokenizerApi, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
    """Return the chat shape: one entry a token, alternatives inside."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, entry.token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(tokenizer, token_id, logprob) for token_id, logprob in entry.top
                ],
            }
            for entry in logprobs
        ]
    }


def _chat_token(tokenizer: TokenizerApi, token_id: int, logprob: float) -> dict[str, object]:
    text = _text(tokenizer, token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


@dataclass(slots=True)
class CompletionLogprobs:
    """The completion shape: parallel lists. Keeps the text offset across a stream's chunks."""

    tokenizer: TokenizerApi
    offset: int = 0

    def body(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        """Return the next tokens' lists."""
        texts = [_text(self.tokenizer, entry.token_id) for entry in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [
                {_text(self.tokenizer, token): _finite(value) for token, value in entry.top}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }


def _text(tokenizer: TokenizerApi, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)


def _finite(logprob: float) -> float:
    # JSON has no infinity; a token ruled out by the sampling parameters has minus infinity.
    return max(logprob, -9999.0)
