"""What OpenAI clients send, checked once at the border. Must not know the engine's state.

A field we know and cannot honour is refused with its name; silence would be taken for effect.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mizzen.runtime.engine.api import Grammar, SamplingParams

MAX_CHOICES = 32
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024
_MAX_BIASES = 1024
_MAX_PROMPTS = 64

StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


JsonSchema = dict[str, Any] | bool
_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


class StructuredOutputs(BaseModel):
    """What the answer's text must follow, under vLLM's names; exactly one is set."""

    model_config = ConfigDict(extra="forbid")

    json_: JsonSchema | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1 or all(v is None for v in self.__dict__.values()):
            raise ValueError("set exactly one of json, json_object, regex, choice, grammar")
        return self

    def to_grammar(self) -> Grammar:
        """Return it as the engine takes it."""
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("lark", "start: " + " | ".join(json.dumps(text) for text in self.choice))
        if self.grammar is not None:
            return Grammar("lark", self.grammar)
        if self.json_ is not None:
            return schema_grammar(self.json_)
        return _ANY_OBJECT


def schema_grammar(schema: JsonSchema | str) -> Grammar:
    """Return the grammar of JSON that a schema describes."""
    source = schema if isinstance(schema, str) else json.dumps(schema, separators=(",", ":"))
    return Grammar("json_schema", source)


class Sampling(BaseModel):
    """The sampling parameters that every protocol shares, under OpenAI's and vLLM's names."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # vLLM's -1 and our 0 both keep all
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=_MAX_STOPS)
    ignore_eos: bool = False
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
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
            temperature=self.temperature,
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

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class NamedSchema(BaseModel):
    """OpenAI's wrapping of a JSON schema."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1, max_length=64)
    schema_: JsonSchema = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    """How the answer is to be shaped, in OpenAI's words."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self

    def to_grammar(self) -> Grammar | None:
        """Return it as the engine takes it; None for free text."""
        if self.json_schema is not None:
            return schema_grammar(self.json_schema.schema_)
        return _ANY_OBJECT if self.type == "json_object" else None


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


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None

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
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(OpenAIRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any]) -> list[Any]:
        if tools:
            raise ValueError("tools are not supported by this server; send none")
        return tools

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    def params(self) -> SamplingParams:
        """Return the engine's form; an answer without a limit may fill the context."""
        wanted = (self.top_logprobs or 0) if self.logprobs else None
        return self.to_params(logprobs=wanted, default_max_tokens=None)


class CompletionRequest(OpenAIRequest):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=_MAX_PROMPTS),
        ]
    )
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
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts one by one, as texts or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def params(self) -> SamplingParams:
        """Return the engine's form; 16 tokens unless told, as OpenAI's API has it."""
        return self.to_params(logprobs=self.logprobs, default_max_tokens=16)
