"""POST /tokenize and /detokenize, in vLLM's shapes."""

from starlette.types import ASGIApp

from mizzen.runtime.server.errors import invalid
from mizzen.runtime.server.prompts import chars_of, off_loop
from mizzen.runtime.server.routes import json_response
from mizzen.runtime.server.schemas import DetokenizeRequest, TokenizeRequest
from mizzen.runtime.server.service import Service


async def tokenize(service: Service, asked: TokenizeRequest) -> ASGIApp:
    """Return the tokens of a text, or of a conversation in the model's chat format."""
    if asked.model is not None:
        service.resolve(asked.model)
    tokenizer = service.engine.tokenizer
    if asked.messages is not None:
        turns = [message.to_template() for message in asked.messages]
        chars = chars_of(turns)
        tokens = await off_loop(
            lambda: tokenizer.apply_chat_template(turns, None, asked.add_generation_prompt),
            chars=chars,
        )
    else:
        text = asked.prompt or ""
        chars = len(text)
        tokens = await off_loop(
            lambda: tokenizer.encode(text, asked.add_special_tokens), chars=chars
        )
    body = {"count": len(tokens), "max_model_len": service.engine.model_len, "tokens": tokens}
    if asked.return_token_strs:
        body["token_strs"] = await off_loop(
            lambda: [tokenizer.decode([token], False) for token in tokens], chars=chars
        )
    return json_response(body)


async def detokenize(service: Service, asked: DetokenizeRequest) -> ASGIApp:
    """Return the text of tokens, special ones included."""
    if asked.model is not None:
        service.resolve(asked.model)
    tokenizer = service.engine.tokenizer
    if max(asked.tokens, default=0) >= tokenizer.vocab_size:
        raise invalid("tokens", f"tokens: token ids go up to {tokenizer.vocab_size - 1} here.")
    text = await off_loop(
        lambda: tokenizer.decode(asked.tokens, skip_special_tokens=False), chars=len(asked.tokens)
    )
    return json_response({"prompt": text})
