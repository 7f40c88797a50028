"""One JSON object of a dataset becomes a conversation. Knows nothing of files or tokens.

A method reads one of four shapes. `conversation`: `{"messages": [...]}` or `{"prompt",
"completion"}`. `preference`: `{"prompt", "chosen", "rejected"}`, or the last two as whole
conversations. `judgement`: a preference, or a conversation with `"label"`, true where its answer
was liked. `prompt`: `{"prompt"}` or `{"messages"}`, with an `"answer"` where a rule needs one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from mizzen.runtime.train.errors import DatasetFormatUnknownError

Message = dict[str, Any]
Messages = tuple[Message, ...]
Shape = Literal["conversation", "preference", "judgement", "prompt"]
Format = Literal["auto", "messages", "promptCompletion"]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One sample; `key` is the hash of its content and decides whether it is held out."""

    messages: Messages  # of a preference, the chosen version
    key: bytes
    place: str  # in its file, as people count
    rejected: Messages | None = None
    answer: str | None = None
    is_liked: bool | None = None  # of a judgement that is no preference


class RecordReader:
    """Reads the objects of one dataset.

    Every method raises DatasetFormatUnknownError with the place of what it cannot read.
    """

    def __init__(self, dataset: str, *, shape: Shape, form: Format) -> None:
        self._dataset = dataset
        self._shape = shape
        self._form = form

    def read(self, place: str, value: object) -> Conversation:
        """Return the sample an object means."""
        if not isinstance(value, dict):
            raise self._fault(f"{place} is not a JSON object.")
        if self._shape == "judgement" and "label" in value:
            return self._rating(place, value)
        if self._shape in ("preference", "judgement"):
            return self._preference(place, value)
        if self._shape == "prompt":
            return self._prompt(place, value)
        return self._conversation(place, value)

    def _conversation(self, place: str, value: dict[str, object]) -> Conversation:
        if self._form != "promptCompletion" and "messages" in value:
            messages = self._messages(place, "messages", value["messages"])
        elif self._form != "messages" and {"prompt", "completion"} <= value.keys():
            messages = self._prompt_and_completion(place, value)
        else:
            wanted = {
                "auto": 'neither "messages" nor "prompt" and "completion"',
                "messages": 'no "messages"',
                "promptCompletion": 'no "prompt" and "completion"',
            }[self._form]
            raise self._lacks(place, value, wanted)
        return Conversation(messages=messages, key=_key(messages), place=place)

    def _rating(self, place: str, value: dict[str, object]) -> Conversation:
        conversation = self._conversation(place, value)
        if not isinstance(value["label"], bool):
            raise self._fault(f"{place}: label must be true or false.")
        if conversation.messages[-1]["role"] != "assistant":
            raise self._fault(f"{place}: what has a label must end with an assistant turn.")
        return replace(conversation, is_liked=value["label"])

    def _preference(self, place: str, value: dict[str, object]) -> Conversation:
        if not {"chosen", "rejected"} <= value.keys():
            label = ' and no "label"' if self._shape == "judgement" else ""
            raise self._lacks(place, value, f'no "chosen" and "rejected"{label}')
        before = self._turns(place, "prompt", value["prompt"], "user") if "prompt" in value else ()
        chosen, rejected = (
            before + self._turns(place, side, value[side], "assistant")
            for side in ("chosen", "rejected")
        )
        if any(version[-1]["role"] != "assistant" for version in (chosen, rejected)):
            raise self._fault(f"{place}: chosen and rejected must end with an assistant turn.")
        if not before and not isinstance(value["chosen"], list):
            raise self._lacks(place, value, 'no "prompt"')
        key = _key((chosen, rejected))
        return Conversation(messages=chosen, rejected=rejected, key=key, place=place)

    def _prompt(self, place: str, value: dict[str, object]) -> Conversation:
        field = "prompt" if "prompt" in value else "messages"
        if field not in value:
            raise self._lacks(place, value, 'neither "prompt" nor "messages"')
        messages, answer = self._turns(place, field, value[field], "user"), value.get("answer")
        if answer is not None and not isinstance(answer, str):
            raise self._fault(f"{place}: answer must be a string.")
        return Conversation(
            messages=messages, key=_key((messages, answer)), place=place, answer=answer
        )

    def _turns(self, place: str, field: str, value: object, role: str) -> Messages:
        if isinstance(value, str):
            return ({"role": role, "content": value},)
        return self._messages(place, field, value)

    def _messages(self, place: str, field: str, messages: object) -> Messages:
        if not isinstance(messages, list) or not messages:
            raise self._fault(f'{place}: "{field}" must be a non-empty list.')
        for index, message in enumerate(messages):
            where = f"{place}: {field}[{index}]"
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise self._fault(f"{where} needs a role out of {', '.join(ROLES)}.")
            if not isinstance(message.get("content"), str):
                raise self._fault(f"{where} needs its content as a string.")
        return tuple(messages)

    def _prompt_and_completion(self, place: str, value: dict[str, object]) -> Messages:
        prompt, completion = value["prompt"], value["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise self._fault(f"{place}: prompt and completion must be strings.")
        return {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}

    def _lacks(self, place: str, value: dict[str, object], wanted: str) -> Exception:
        keys = ", ".join(map(str, value)) or "none"
        return self._fault(f"{place} has {wanted}; its keys are {keys}.")

    def _fault(self, what: str) -> Exception:
        return DatasetFormatUnknownError(self._dataset, what)


def _key(content: object) -> bytes:
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).digest()
