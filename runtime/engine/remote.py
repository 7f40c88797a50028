"""The engine as the server's process has it: the same promises, kept by another process.

Whether it is well is judged from what it says, not from whether it is there: an engine that hangs
holds its socket open.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from mizzen.runtime.engine.api import (
    AdapterState,
    EngineStats,
    GenerationRequest,
    LoanState,
    PromptScores,
    Recorder,
    ScoreRequest,
    TokenOutput,
)
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.errors import EngineDeadError, InvalidRequestError
from mizzen.runtime.engine.messages import (
    Abort,
    AnyCall,
    AskLoan,
    Drain,
    Ended,
    Forget,
    FromEngine,
    Generate,
    Link,
    LoadAdapter,
    LoadWeights,
    Report,
    Returned,
    Score,
    Sleep,
    Start,
    Started,
    StartLoan,
    StopLoan,
    Timings,
    UnloadAdapter,
    Wake,
    check,
    open_link,
    to_error,
)
from mizzen.runtime.engine.spawn import EngineProcess
from mizzen.runtime.engine.streams import Item
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import MizzenError

TICK_S = 0.5
# Counted in ticks of our own, so that a pause of the whole pod is not taken for silence.
READY_TICKS = 6
ALIVE_TICKS = 20
STOP_TIMEOUT_S = 5.0


class RemoteEngine:
    """Keeps `EngineApi`'s promises with an engine in another process."""

    def __init__(
        self,
        process: EngineProcess,
        link: Link[FromEngine],
        tokenizer: Tokenizer,
        recorder: Recorder,
        *,
        started: Started,
        first: Report,
    ) -> None:
        self.tokenizer = tokenizer
        self.model_len = started.model_len
        self.sizes = started.sizes
        self._process = process
        self._link = link
        self._recorder = recorder
        self._streams: dict[str, asyncio.Queue[Item]] = {}
        self._calls: dict[int, asyncio.Future[Returned]] = {}
        self._numbers = count()
        self._adapters: list[AdapterState] = []
        self._draining = False
        self._death: MizzenError | None = None
        self._silent_ticks = 0
        self._heard_at = time.monotonic()
        self._report = first
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._tick())]

    @classmethod
    async def start(
        cls, process: EngineProcess, config: EngineConfig, recorder: Recorder
    ) -> "RemoteEngine":
        """Have the process load the model, and return once it is warm.

        Raises:
            MizzenError: the model or the settings cannot be used; the message says what to change.
        """
        link: Link[FromEngine] = await open_link(process.socket, FromEngine)
        link.send(Start(config))
        answer, tokenizer = await asyncio.gather(
            link.receive(),
            asyncio.to_thread(Tokenizer.load, config.model),
            return_exceptions=True,
        )
        # What is wrong with the model itself comes before what its tokenizer lacks.
        match answer:
            case Started() as started:
                process.clean_up()
                first = await link.receive()
            case Ended(fault):
                raise to_error(fault)
            case _:
                first = None
        if not isinstance(first, Report):
            raise EngineDeadError("The engine's process ended while it started. See its log.")
        if isinstance(tokenizer, BaseException):
            raise tokenizer
        return cls(process, link, tokenizer, recorder, started=started, first=first)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield the answer as it grows; see `api.EngineApi.generate`."""
        self._check_heard()
        if request.request_id in self._streams:
            raise InvalidRequestError(f"Request id {request.request_id!r} is in use.")
        question = Generate(request)
        check(question)
        stream = self._streams[request.request_id] = asyncio.Queue()
        ended = False
        try:
            self._link.send(question)
            while not ended:
                item = await stream.get()
                ended = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            del self._streams[request.request_id]
            if not ended:
                self._link.send(Abort(request.request_id))

    async def score(self, request: ScoreRequest) -> PromptScores:
        """Return what the model thinks of tokens; see `api.EngineApi.score`."""
        number = next(self._numbers)
        try:
            answer = await self._call(Score(number=number, request=request))
        except asyncio.CancelledError:
            self._link.send(Forget(number))
            raise
        assert answer.scores is not None, "what has no fault has scores"
        return answer.scores

    async def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort"."""
        self._link.send(Abort(request_id))

    async def load_adapter(self, name: str, path: Path, digest: str | None = None) -> None:
        """Make an adapter servable; see `api.EngineApi.load_adapter`."""
        number = next(self._numbers)
        await self._call(LoadAdapter(number=number, name=name, path=path, digest=digest))

    async def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter; see `api.EngineApi.unload_adapter`."""
        await self._call(UnloadAdapter(number=next(self._numbers), name=name))

    def adapters(self) -> list[AdapterState]:
        """Return the adapters that can be asked for, by name."""
        return self._adapters

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, abort those left after `timeout_s`."""
        self._draining = True
        await self._call(Drain(number=next(self._numbers), timeout_s=timeout_s))

    async def sleep(self, timeout_s: float) -> None:
        """End what runs, as `drain` does, and give back the memory of weights and KV cache."""
        await self._call(Sleep(number=next(self._numbers), timeout_s=timeout_s))

    async def wake(self) -> None:
        """Read the weights again and take requests; adapters are still there."""
        await self._call(Wake(number=next(self._numbers)))

    async def load_weights(self, path: Path) -> None:
        """Serve other weights of the same model; see `api.EngineApi.load_weights`."""
        await self._call(LoadWeights(number=next(self._numbers), path=path))

    async def start_loan(self, job: str) -> LoanState:
        """Train beside the served weights; see `api.EngineApi.start_loan`."""
        answer = await self._call(StartLoan(number=next(self._numbers), job=job))
        assert answer.loan is not None, "what has no fault has begun"
        return answer.loan

    async def stop_loan(self) -> None:
        """Have the job commit its last whole step and end."""
        await self._call(StopLoan(number=next(self._numbers)))

    async def loan(self) -> LoanState | None:
        """Return the job that is at it, or the last one; None where there was none."""
        return (await self._call(AskLoan(number=next(self._numbers)))).loan

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining

    def in_flight(self) -> int:
        """Return how many requests have not ended."""
        return len(self._streams)

    def stats(self) -> EngineStats:
        """Return the engine's figures of its last report; its heartbeat ages with the silence."""
        stats, silent_s = self._report.stats, time.monotonic() - self._heard_at
        return replace(stats, heartbeat_age_s=stats.heartbeat_age_s + silent_s)

    def is_alive(self) -> bool:
        """Whether the process is there and says that its loop turns."""
        heard = self._death is None and self._silent_ticks < ALIVE_TICKS
        return heard and self._report.is_alive

    def death(self) -> MizzenError | None:
        """Return why it will never be alive again, None while it may."""
        return self._death

    def is_ready(self) -> bool:
        """Whether it is alive, awake, heard of within the last seconds, and takes new requests."""
        return self._is_heard() and self._report.is_ready and not self._draining

    async def stop(self) -> None:
        """End every request and the process; one that does not end by itself is killed."""
        await self._link.close()
        if await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S) is None:
            await asyncio.to_thread(self._process.kill)
        for task in self._tasks:
            task.cancel()
        self._die(EngineDeadError("It has been stopped."))

    async def _call(self, call: AnyCall) -> Returned:
        self._check_heard()
        check(call)
        answer = self._calls[call.number] = asyncio.get_running_loop().create_future()
        self._link.send(call)
        try:
            return await answer
        finally:
            del self._calls[call.number]

    def _is_heard(self) -> bool:
        return self._death is None and self._silent_ticks < READY_TICKS

    def _check_heard(self) -> None:
        if self._death is not None:
            raise self._dead_error()
        if not self._is_heard():
            raise EngineDeadError("The engine's process does not answer. Ask another replica.")

    async def _tick(self) -> None:
        while self._silent_ticks < ALIVE_TICKS:
            await asyncio.sleep(TICK_S)
            self._silent_ticks += 1
        self._die(EngineDeadError("Its process does not answer and is taken for dead."))

    async def _listen(self) -> None:
        while (message := await self._link.receive()) is not None:
            self._silent_ticks, self._heard_at = 0, time.monotonic()
            match message:
                case Report():
                    self._report = message
                    _replay(message.timings, self._recorder)
                    self._hand_out(message)
                case Returned():
                    self._adapters = message.adapters
                    self._answer(message)
                case Ended(fault):
                    error = to_error(fault)
                    dead = EngineDeadError(str(error))
                    self._die(error if isinstance(error, MizzenError) else dead)
        self._die(EngineDeadError("Its process is gone. See its log."))

    def _hand_out(self, report: Report) -> None:
        items: list[tuple[str, Item]] = [*report.outputs]
        items += [(request_id, to_error(fault)) for request_id, fault in report.failures]
        for request_id, item in items:
            if stream := self._streams.get(request_id):  # its client may have left
                stream.put_nowait(item)

    def _answer(self, returned: Returned) -> None:
        answer = self._calls.get(returned.number)
        if answer is None or answer.done():  # nobody waits any more
            return
        if returned.fault is None:
            answer.set_result(returned)
        else:
            answer.set_exception(to_error(returned.fault))

    def _die(self, death: MizzenError) -> None:
        self._death = self._death or death
        for stream in self._streams.values():
            stream.put_nowait(self._dead_error())
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._dead_error())

    def _dead_error(self) -> EngineDeadError:
        return EngineDeadError(f"The engine has ended: {self._death}")


def _replay(timings: Timings, recorder: Recorder) -> None:
    for seconds in timings.first_tokens_s:
        recorder.on_first_token(seconds)
    for seconds in timings.tokens_s:
        recorder.on_token(seconds)
    for seconds, tokens in timings.steps:
        recorder.on_step(seconds, tokens)
    for finished in timings.finished:
        recorder.on_finish(finished)
