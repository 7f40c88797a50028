"""What the server's process and the engine's process tell each other, as MessagePack.

Every message is checked against these types where it is read; nothing is unpickled.
"""

import asyncio
import inspect
import socket
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import msgspec

from mizzen.runtime import errors
from mizzen.runtime.engine import errors as engine_errors
from mizzen.runtime.engine.api import (
    AdapterState,
    EngineStats,
    FinishedRequest,
    GenerationRequest,
    LoanState,
    ModelSizes,
    PromptScores,
    ScoreRequest,
    TokenOutput,
)
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.errors import MizzenError

LENGTH_BYTES = 4
CLOSE_TIMEOUT_S = 2.0  # for what is left to send to an end that does not read


class Fault(msgspec.Struct):
    """An error: its class and the classes above it by name, its text, its attributes."""

    kinds: list[str]
    text: str
    values: dict[str, Any] = {}


class Start(msgspec.Struct, tag=True):
    """Load this model; comes first."""

    config: EngineConfig


class Generate(msgspec.Struct, tag=True):
    """Answer a request, with outputs in `Report`s."""

    request: GenerationRequest


class Abort(msgspec.Struct, tag=True):
    """End a request; nobody waits for its outputs."""

    request_id: str


class Call(msgspec.Struct, kw_only=True):
    """What is answered by a `Returned` of the same number."""

    number: int


class LoadAdapter(Call, tag=True):
    """See `EngineApi.load_adapter`, as the others are `EngineApi`'s methods of their names."""

    name: str
    path: Path
    digest: str | None


class UnloadAdapter(Call, tag=True):
    """Stop serving an adapter."""

    name: str


class Drain(Call, tag=True):
    """Take nothing new and finish what runs."""

    timeout_s: float


class Sleep(Call, tag=True):
    """Give back the memory of weights and KV cache."""

    timeout_s: float


class Wake(Call, tag=True):
    """Read the weights again."""


class LoadWeights(Call, tag=True):
    """Serve other weights of the same model."""

    path: Path


class Score(Call, tag=True):
    """Say what the model thinks of tokens."""

    request: ScoreRequest


class StartLoan(Call, tag=True):
    """Train beside the served weights while no request wants them."""

    job: str


class StopLoan(Call, tag=True):
    """Have the job that trains commit and end."""


class AskLoan(Call, tag=True):
    """Say how far the job is."""


class Forget(msgspec.Struct, tag=True):
    """Nobody waits for this call any more; it is not answered."""

    number: int


class Started(msgspec.Struct, tag=True):
    """The model is loaded and warm."""

    model_len: int
    sizes: ModelSizes


class Ended(msgspec.Struct, tag=True):
    """The model cannot be served, or the loop has failed; the process ends."""

    fault: Fault


class Timings(msgspec.Struct):
    """What a `Recorder` is told, gathered."""

    first_tokens_s: list[float] = []
    tokens_s: list[float] = []
    steps: list[tuple[float, int]] = []  # seconds, tokens
    finished: list[FinishedRequest] = []


class Report(msgspec.Struct, tag=True):
    """The engine as it is now, and what is new since the last report. Also the heartbeat."""

    stats: EngineStats
    is_alive: bool
    is_ready: bool
    timings: Timings
    outputs: list[tuple[str, TokenOutput]]
    failures: list[tuple[str, Fault]]


class Returned(msgspec.Struct, tag=True):
    """A call is over; a report of what it changed came before."""

    number: int
    adapters: list[AdapterState]
    fault: Fault | None = None
    scores: PromptScores | None = None
    loan: LoanState | None = None


AnyCall = (
    LoadAdapter
    | UnloadAdapter
    | Drain
    | Sleep
    | Wake
    | LoadWeights
    | Score
    | StartLoan
    | StopLoan
    | AskLoan
)
ToEngine = Start | Generate | Abort | Forget | AnyCall
FromEngine = Started | Ended | Report | Returned
Read = TypeVar("Read")


class Link(Generic[Read]):
    """One end of the socket between the two; reads messages of one direction."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reads: Any
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = msgspec.msgpack.Decoder(reads, dec_hook=_to_path)

    def send(self, message: ToEngine | FromEngine) -> None:
        """Send without waiting; nothing happens where the other end is gone."""
        if not self._writer.is_closing():
            data = _encoder.encode(message)
            self._writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def receive(self) -> Read | None:
        """Return the next message; None where the other end is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            message: Read = self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None
        return message

    async def close(self) -> None:
        """Send what is left, and end."""
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):  # the other end went first, or hangs
            self._writer.transport.abort()


async def open_link(end: socket.socket, reads: Any) -> Link[Any]:
    """Return the link over one end of a socket pair; it reads `ToEngine` or `FromEngine`."""
    return Link(*await asyncio.open_unix_connection(sock=end), reads)


def _from_path(value: Any) -> str:
    if not isinstance(value, Path):
        raise NotImplementedError(f"A {type(value).__name__} cannot be sent.")
    return str(value)


def _to_path(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise NotImplementedError(f"A {kind.__name__} cannot be received.")
    return Path(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=_from_path)
_engine_reads = msgspec.msgpack.Decoder(ToEngine, dec_hook=_to_path)


def check(message: ToEngine) -> None:
    """Refuse what the engine's process could not read, for it would end with all its requests.

    Raises:
        msgspec.ValidationError: a value is of another type than the message's class says.
        OverflowError: a number has more than 64 bits.
    """
    _engine_reads.decode(_encoder.encode(message))


def to_fault(error: BaseException) -> Fault:
    """Return an error as it can be sent."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if not isinstance(error, MizzenError):
        return Fault(kinds, f"{type(error).__name__}: {error}")
    constant = {"reason": error.reason, "exit_code": error.exit_code}
    return Fault(kinds, str(error), constant | vars(error))


def to_error(fault: Fault) -> Exception:
    """Return the error again, as the most special class that needs no torch to be known."""
    kind = next((_KNOWN[name] for name in fault.kinds if name in _KNOWN), RuntimeError)
    error = kind.__new__(kind, fault.text)
    vars(error).update(fault.values)
    return error


def _errors_of(module: ModuleType) -> dict[str, type[Exception]]:
    classes = inspect.getmembers(module, inspect.isclass)
    return {name: kind for name, kind in classes if issubclass(kind, MizzenError)}


_KNOWN: dict[str, type[Exception]] = {
    **_errors_of(errors),
    **_errors_of(engine_errors),
}
