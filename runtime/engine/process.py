"""The engine's process: `python -m mizzen.runtime.engine.process FD SPAWNED_AT`, see `spawn`.

Serves an `Engine` over a socket, reports twice a second even if nothing happens, and ends with
the other end of the socket, with its loop, or with a model that cannot be used.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from functools import partial

from mizzen.runtime.engine.api import FinishedRequest, GenerationRequest
from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.engine.heap import Rest, give_back_freed
from mizzen.runtime.engine.messages import (
    Abort,
    AnyCall,
    AskLoan,
    Drain,
    Ended,
    Forget,
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
    ToEngine,
    UnloadAdapter,
    Wake,
    open_link,
    to_fault,
)
from mizzen.runtime.engine.streams import Item
from mizzen.runtime.errors import MizzenError

log = logging.getLogger(__name__)

BEAT_S = 0.5
# Then the memory of the last steps goes back; the next one pays for it with some milliseconds.
REST_BEATS = 3
EXIT_CRASHED = 1
# For a loop that hangs in a step: this process must not outlive the one that started it.
STOP_LIMIT_S = 20.0
GOODBYE_S = 5.0


class TimingLog:
    """A `Recorder` that gathers what it is told until it is taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gathered = Timings()

    def on_first_token(self, ttft_s: float) -> None:
        """Take a request's time to its first token."""
        with self._lock:
            self._gathered.first_tokens_s.append(ttft_s)

    def on_token(self, itl_s: float) -> None:
        """Take the time between two tokens."""
        with self._lock:
            self._gathered.tokens_s.append(itl_s)

    def on_step(self, step_s: float, tokens: int) -> None:
        """Take a step's time and size."""
        with self._lock:
            self._gathered.steps.append((step_s, tokens))

    def on_finish(self, finished: FinishedRequest) -> None:
        """Take a request's life."""
        with self._lock:
            self._gathered.finished.append(finished)

    def take(self) -> Timings:
        """Return what was gathered, and begin anew."""
        with self._lock:
            taken, self._gathered = self._gathered, Timings()
        return taken


class Host:
    """Does with an engine what the messages say."""

    def __init__(self, engine: Engine, timings: TimingLog, link: Link[ToEngine]) -> None:
        self._engine = engine
        self._timings = timings
        self._link = link
        self._outputs: list[tuple[str, Item]] = []
        # What may be called off: requests by id, whose grammars compile, and scores by number.
        self._open: dict[str | int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rest = Rest(REST_BEATS)

    async def run(self) -> int:
        """Serve until the other end closes or the loop fails; return the exit code."""
        self._link.send(Started(self._engine.model_len, self._engine.sizes))
        self._report()
        listening = asyncio.create_task(self._listen())
        while (death := self._engine.death()) is None and not listening.done():
            await asyncio.wait([listening], timeout=BEAT_S)
            self._report()
            self._rest_if_idle()
        _end_within(STOP_LIMIT_S)
        await self._engine.stop()
        if death is not None:
            self._report()
            self._link.send(Ended(to_fault(death)))
            # The other end goes first: what it still sends to a closed socket fails, and it reads
            # no more, not even why this engine has ended.
            await asyncio.wait([listening], timeout=GOODBYE_S)
            return death.exit_code
        listening.result()  # raises what was wrong with a message
        return 0

    async def _listen(self) -> None:
        while (message := await self._link.receive()) is not None:
            match message:
                case Generate(request):
                    self._keep(request.request_id, self._submit(request))
                case Abort(request_id):
                    self._call_off(request_id)
                    await self._engine.abort(request_id)
                case Score(number=number):
                    self._keep(number, self._return(message))
                case Forget(number):
                    self._call_off(number)
                case Start():
                    log.error("The engine was told to start twice.")
                case _:
                    self._begin(self._return(message))

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)
        return task

    def _keep(self, key: str | int, work: Coroutine[None, None, None]) -> None:
        """Begin what may be called off, also before its first line has run."""
        task = self._open[key] = self._begin(work)
        task.add_done_callback(lambda _: self._open.pop(key))

    def _call_off(self, key: str | int) -> None:
        if task := self._open.get(key):
            task.cancel()

    async def _submit(self, request: GenerationRequest) -> None:
        deliver = partial(self._collect, request.request_id)
        try:
            await self._engine.submit(request, deliver)
        except Exception as error:
            deliver(error)

    async def _return(self, call: AnyCall) -> None:
        returned = Returned(number=call.number, adapters=[])
        try:
            await _perform(self._engine, call, returned)
        except Exception as error:
            returned.fault = to_fault(error)
        returned.adapters = self._engine.adapters()
        self._report()
        self._link.send(returned)

    def _rest_if_idle(self) -> None:
        stats = self._engine.stats()
        if self._rest.begins(stats.steps, is_busy=stats.running + stats.waiting > 0):
            give_back_freed()

    def _collect(self, request_id: str, item: Item) -> None:
        if not self._outputs:  # the outputs of a step come together, and leave together
            asyncio.get_running_loop().call_soon(self._report)
        self._outputs.append((request_id, item))

    def _report(self) -> None:
        items, self._outputs = self._outputs, []
        self._link.send(
            Report(
                stats=self._engine.stats(),
                is_alive=self._engine.is_alive(),
                is_ready=self._engine.is_ready(),
                timings=self._timings.take(),
                outputs=[(name, item) for name, item in items if not isinstance(item, Exception)],
                failures=[
                    (name, to_fault(item)) for name, item in items if isinstance(item, Exception)
                ],
            )
        )


async def _perform(engine: Engine, call: AnyCall, returned: Returned) -> None:
    match call:
        case Score(request=request):
            returned.scores = await engine.score(request)
        case StartLoan(job=job):
            returned.loan = await engine.start_loan(job)
        case StopLoan():
            await engine.stop_loan()
        case AskLoan():
            returned.loan = await engine.loan()
        case LoadAdapter(name=name, path=path, digest=digest):
            await engine.load_adapter(name, path, digest)
        case UnloadAdapter(name=name):
            await engine.unload_adapter(name)
        case Drain(timeout_s=timeout_s):
            await engine.drain(timeout_s)
        case Sleep(timeout_s=timeout_s):
            await engine.sleep(timeout_s)
        case Wake():
            await engine.wake()
        case LoadWeights(path=path):
            await engine.load_weights(path)


def _end_within(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, [EXIT_CRASHED])
    timer.daemon = True
    timer.start()


async def _serve(end: socket.socket, imports_s: float) -> int:
    link: Link[ToEngine] = await open_link(end, ToEngine)
    first = await link.receive()
    if not isinstance(first, Start):
        return 0
    timings = TimingLog()
    try:
        engine = await asyncio.to_thread(Engine.start, first.config, timings)
    except MizzenError as error:
        link.send(Ended(to_fault(error)))
        await link.close()
        return error.exit_code
    engine.start_seconds["imports"] = imports_s
    code = await Host(engine, timings, link).run()
    await link.close()
    return code


def main() -> None:
    """Serve an engine over the inherited socket."""
    end, spawned_at = socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])
    imports_s = time.monotonic() - spawned_at  # what is imported above takes seconds
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for each in (signal.SIGINT, signal.SIGTERM):
        # A terminal, or an init system, may tell the whole group: the server's process decides.
        signal.signal(each, signal.SIG_IGN)
    # The loop gives Python up at each kernel and takes it back after: waiting the usual 5 ms for
    # whoever hands out tokens meanwhile would cost more than the kernels.
    sys.setswitchinterval(0.0005)
    code = asyncio.run(_serve(end, imports_s))
    logging.shutdown()
    os._exit(code)  # without the interpreter's own end, in which libraries wait for their threads


if __name__ == "__main__":
    main()
