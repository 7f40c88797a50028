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
    # A character may be spread over tokens: only their bytes, joined, are its text.
    written = tokenizer.token_bytes(token_id)
    text = written.decode(errors="replace")
    return {"token": text, "logprob": finite(logprob), "bytes": list(written)}


@dataclass(slots=True)
class CompletionLogprobs:
    """The completion shape: parallel lists. Keeps the text offset across a stream's chunks."""

    tokenizer: TokenizerApi
    offset: int = 0

    def body(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        """Return the next tokens' lists."""
        texts = [token_text(self.tokenizer, entry.token_id) for entry in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        # OpenAI's API has the chosen token among them, whatever its rank.
        places = (*entry.top, (entry.token_id, entry.logprob)) if entry.top else ()
        return {token_text(self.tokenizer, token): finite(value) for token, value in places}


def token_text(tokenizer: TokenizerApi, token_id: int) -> str:
    """Return one token as text, a special one too."""
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def finite(logprob: float) -> float:
    """Return what JSON can hold."""
    # JSON has no infinity; a token ruled out by the sampling parameters has minus infinity.
    return max(logprob, -9999.0)
