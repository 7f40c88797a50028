"""POST /tokenize and /detokenize, in vLLM's shapes."""

from starlette.types import ASGIApp

from mizzen.runtime.server.errors import invalid
from mizzen.runtime.server.prompts import encode_off_loop
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
        size = sum(len(turn["content"]) for turn in turns)
        tokens = await encode_off_loop(
            lambda: tokenizer.apply_chat_template(turns, None, asked.add_generation_prompt), size
        )
    else:
        text = asked.prompt or ""
        tokens = await encode_off_loop(
            lambda: tokenizer.encode(text, asked.add_special_tokens), len(text)
        )
    body = {"count": len(tokens), "max_model_len": service.engine.model_len, "tokens": tokens}
    if asked.return_token_strs:
        body["token_strs"] = [tokenizer.decode([token], False) for token in tokens]
    return json_response(body)


async def detokenize(service: Service, asked: DetokenizeRequest) -> ASGIApp:
    """Return the text of tokens, special ones included."""
    if asked.model is not None:
        service.resolve(asked.model)
    tokenizer = service.engine.tokenizer
    if max(asked.tokens, default=0) >= tokenizer.vocab_size:
        raise invalid("tokens", f"tokens: token ids go up to {tokenizer.vocab_size - 1} here.")
    return json_response({"prompt": tokenizer.decode(asked.tokens, skip_special_tokens=False)})
