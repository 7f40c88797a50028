"""Why the engine does not do what it is asked: what a request, or its caller, gets."""

from collections.abc import Sequence
from typing import ClassVar

from mizzen.runtime.errors import MizzenError


class EngineBusyError(MizzenError):
    """The queue is at its limit; the same request may succeed later."""

    reason = "EngineBusy"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(EngineBusyError):
    """The engine finishes what it has and takes nothing new; another replica can."""

    reason = "Draining"


class AsleepError(EngineBusyError):
    """The engine has given back its memory and takes nothing until it is woken."""

    reason = "Asleep"


class PromptTooLongError(MizzenError):
    """The prompt cannot fit the context together with one new token."""

    reason = "PromptTooLong"

    def __init__(self, *, prompt_tokens: int, model_len: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the context holds {model_len}, one of "
            f"which the answer needs. Shorten the prompt to at most {model_len - 1} tokens."
        )
        self.prompt_tokens = prompt_tokens
        self.model_len = model_len


class InvalidRequestError(MizzenError):
    """The request asks for something that no retry will make possible; the text says what."""

    reason = "InvalidRequest"


class GenerationFailedError(MizzenError):
    """The model gave no usable numbers for this one request; others are not affected."""

    reason = "GenerationFailed"


class UnknownAdapterError(MizzenError):
    """No adapter of that name is loaded."""

    reason = "UnknownAdapter"

    def __init__(self, name: str, loaded: Sequence[str]) -> None:
        known = ", ".join(sorted(loaded)) or "none"
        super().__init__(f"No adapter is called {name!r}. Loaded adapters: {known}.")
        self.name = name


class AdapterLoadError(MizzenError):
    """An adapter could not be loaded; what is served stays as it was."""

    reason = "AdapterLoadFailed"


class EngineDeadError(MizzenError):
    """The loop has stopped; only a new process helps."""

    reason = "EngineDead"
    exit_code: ClassVar[int] = 1
