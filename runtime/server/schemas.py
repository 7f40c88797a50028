"""What OpenAI clients send, checked once at the border. Must not know the engine's state.

A field we know and cannot honour is refused with its name; silence would be taken for effect.
So is "5" for a number, as at OpenAI: what looks into a request on its way must see what we see.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import from_json

from mizzen.runtime.engine.api import Grammar, SamplingParams
from mizzen.runtime.server.structured import ResponseFormat, StructuredOutputs
from mizzen.runtime.server.tools import NamedChoice, Tool, ToolChoice, ToolName, forced_calls

MAX_CHOICES = 32
MAX_TOOLS = 128
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024
_MAX_BIASES = 1024
_MAX_PROMPTS = 2048  # as OpenAI; libraries send a thousand inputs to embed at a time
_MOST = 2**31 - 1
_COLDEST = 1e-5  # below, logits divided by it leave float32; its limit is the best token

StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=_MOST)]
TokenName = Annotated[int, Field(ge=0, le=_MOST, strict=False)]  # JSON's names are text
Penalty = Annotated[float, Field(ge=-2, le=2)]
PromptField = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(min_length=1, max_length=_MAX_PROMPTS),
    ]
)
Prompts = list[str] | list[list[int]]  # as texts or as token ids


class Sampling(BaseModel):
    """The sampling parameters that every protocol shares, under OpenAI's and vLLM's names."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=_MOST)  # vLLM's -1 and our 0 both keep all
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1, le=_MOST)
    min_tokens: int = Field(0, ge=0, le=_MOST)
    stop: StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=_MAX_STOPS)
    ignore_eos: bool = False
    logit_bias: dict[TokenName, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=_MAX_BIASES
    )
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _guided_names(cls, fields: Any) -> Any:
        # What vLLM called them before structured_outputs; clients still send them.
        if not isinstance(fields, dict) or fields.get("structured_outputs"):
            return fields
        old = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}
        given = {old[k]: v for k, v in fields.items() if k in old and v is not None}
        rest = {key: value for key, value in fields.items() if key not in old}
        return rest | ({"structured_outputs": given} if given else {})

    @field_validator("*", mode="before")
    @classmethod
    def _null_means_default(cls, value: Any, info: Any) -> Any:
        # OpenAI's clients send null for "not set" in any optional field.
        if value is not None:
            return value
        return cls.model_fields[info.field_name].get_default(call_default_factory=True)

    def to_params(self, *, logprobs: int | None, default_max_tokens: int | None) -> SamplingParams:
        """Return the engine's form of these parameters."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=self.temperature if self.temperature > _COLDEST else 0.0,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            min_tokens=self.min_tokens,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=self.logit_bias or {},
            grammar=self.grammar(),
        )

    @model_validator(mode="after")
    def _grammar_decides_the_end(self) -> Self:
        if self.min_tokens and self.grammar():
            raise ValueError("min_tokens cannot go with a grammar, which decides where text ends")
        return self

    def grammar(self) -> Grammar | None:
        """Return what the answer must follow, if anything."""
        return self.structured_outputs.to_grammar() if self.structured_outputs else None


class StreamOptions(BaseModel):
    """What a stream carries beside its text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class OpenAIRequest(Sampling):
    """What chat and text completions share."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field("", max_length=256)
    response_format: ResponseFormat | None = None

    # Known, and without effect on the answer of a server like this one.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    def grammar(self) -> Grammar | None:
        """Return what the answer must follow, if anything."""
        return super().grammar() or (
            self.response_format.to_grammar() if self.response_format else None
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    """A piece of a message's content; this server reads text only."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """The function of a call that was made; `arguments` is JSON."""

    model_config = ConfigDict(extra="ignore")

    name: ToolName
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, arguments: str) -> str:
        # json.loads takes what no tokenizer does (half a surrogate), and fails on what is deep.
        if not isinstance(from_json(arguments or "{}"), dict):
            raise ValueError("arguments is not a JSON object")
        return arguments


class MadeCall(BaseModel):
    """A call that the assistant made in an earlier turn."""

    model_config = ConfigDict(extra="ignore")

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_template(self) -> dict[str, Any]:
        """Return the call as chat templates read it: arguments as an object."""
        function = self.function
        arguments = from_json(function.arguments or "{}")
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": function.name, "arguments": arguments},
        }


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MadeCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _only_an_answer_may_be_empty(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        return self

    def to_template(self) -> dict[str, Any]:
        """Return the turn as chat templates read it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        # Templates of open models know one name for instructions.
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
        }
        if self.tool_calls:
            turn["tool_calls"] = [call.to_template() for call in self.tool_calls]
        if self.role == "tool":
            turn |= {"tool_call_id": self.tool_call_id or "", "name": self.name or ""}
        return turn


class ChatRequest(OpenAIRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.tool_choice in ("none", "auto"):
            return self
        if not self.callable_tools():
            raise ValueError("tool_choice asks for a tool that tools does not hold")
        if self.grammar() or self.min_tokens:
            raise ValueError("tool_choice decides the answer's form; ask for no other beside it")
        return self

    def callable_tools(self) -> list[Tool]:
        """Return the tools that may be called in this answer."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == name]
        return self.tools

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Return what the chat template tells the model about tools."""
        tools = self.tools if self.tool_choice != "none" else []
        return [tool.model_dump(exclude_none=True) for tool in tools] or None

    def params(self, *, in_tags: bool) -> SamplingParams:
        """Return the engine's form; an answer without a limit may fill the context.

        `in_tags` says how the model writes its tool calls.
        """
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        params = self.to_params(logprobs=wanted, default_max_tokens=None)
        if self.tool_choice in ("none", "auto"):
            return params
        several = self.tool_choice == "required" and self.parallel_tool_calls
        forced = forced_calls(self.callable_tools(), in_tags=in_tags, parallel=several)
        return replace(params, grammar=forced)


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    prompt: PromptField
    max_tokens: int | None = Field(None, ge=0, le=_MOST)
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    prompt_samples: int | None = Field(None, ge=1, le=1024)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported by this server; use n")
        if self.suffix:
            raise ValueError("suffix is not supported by this server")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported by this server")
        has_scores = self.prompt_logprobs is not None or self.prompt_samples is not None
        if has_scores and (self.max_tokens != 0 or self.stream or self.n > 1 or self.echo):
            raise ValueError(
                "prompt_logprobs and prompt_samples need max_tokens 0, and neither stream, echo "
                "nor n"
            )
        if self.max_tokens == 0 and not has_scores:
            raise ValueError("max_tokens 0 needs prompt_logprobs or prompt_samples")
        return self

    @property
    def is_score(self) -> bool:
        """Whether the prompts' own probabilities are asked for, and no text."""
        return self.max_tokens == 0

    def prompts(self) -> Prompts:
        """Return the prompts one by one."""
        return _one_by_one(self.prompt)

    def params(self) -> SamplingParams:
        """Return the engine's form; 16 tokens unless told, as OpenAI's API has it."""
        return self.to_params(logprobs=self.logprobs, default_max_tokens=16)


class EmbeddingRequest(BaseModel):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=512)
    input: PromptField
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    def inputs(self) -> Prompts:
        """Return the inputs one by one."""
        return _one_by_one(self.input)


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: a prompt or messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=2048)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[TokenId]


def _one_by_one(given: str | list[str] | list[int] | list[list[int]]) -> Prompts:
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else given
