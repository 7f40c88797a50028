"""What an answer's text must follow, as clients say it: OpenAI's response_format, vLLM's names."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mizzen.runtime.engine.api import Grammar

JsonSchema = dict[str, Any] | bool
_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`; exactly one field is set."""

    model_config = ConfigDict(extra="forbid")

    json_: JsonSchema | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in self.__dict__.values()) != 1:
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
        return _ANY_OBJECT if self.json_ is None else _schema_grammar(self.json_)


class _NamedSchema(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1, max_length=64)
    schema_: JsonSchema = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self

    def to_grammar(self) -> Grammar | None:
        """Return it as the engine takes it; None for free text."""
        if self.json_schema is not None:
            return _schema_grammar(self.json_schema.schema_)
        return _ANY_OBJECT if self.type == "json_object" else None


def _schema_grammar(schema: JsonSchema | str) -> Grammar:
    source = schema if isinstance(schema, str) else json.dumps(schema, separators=(",", ":"))
    return Grammar("json_schema", source)
