"""What the gateway does to requests and answers of a model: spec.prompts and spec.guardrails."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, DnsLabel, cel


class TemplateMessage(ApiModel):
    """One message of a template."""

    role: Annotated[Literal["system", "user", "assistant"], Field(description="Who says it.")]
    content: Annotated[
        str,
        Field(min_length=1, max_length=16384, description="Text with double-braced variables."),
    ]


class PromptTemplate(ApiModel):
    """Messages put before those of a chat that asks for them."""

    id: Annotated[DnsLabel, Field(description="Chats ask for it as prompt.id.")]
    messages: Annotated[
        list[TemplateMessage], Field(min_length=1, max_length=32, description="The messages.")
    ]


class Guardrail(ApiModel):
    """A check of every request to the model, or of every answer."""

    rules = (
        cel(
            "has(self.deny) || has(self.maxChars)",
            "A guardrail needs deny or maxChars.",
        ),
        cel(
            "self.action != 'Redact' || (self.stage == 'Input' && !has(self.maxChars))",
            "Redact is for deny in stage Input; use Refuse.",
        ),
    )

    name: Annotated[DnsLabel, Field(description="Errors name it.")]
    stage: Annotated[Literal["Input", "Output"], Field(description="What is checked.")]
    deny: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]] | None,
        Field(min_length=1, max_length=64, description="Patterns (RE2) no text may have."),
    ] = None
    max_chars: Annotated[int | None, Field(ge=1, description="Most characters of text.")] = None
    action: Annotated[
        Literal["Refuse", "Redact"],
        Field(description="Refuse a request or end an answer, or black out what is found."),
    ] = "Refuse"
    on_error: Annotated[
        Literal["Refuse", "Allow"],
        Field(description="What happens to requests while the check itself fails."),
    ] = "Refuse"
