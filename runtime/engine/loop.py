"""The engine's loop, in its own thread: schedule, launch, land, hand out.

One step ahead: while a step is in flight the next one is decided and launched, and only then are
the first one's tokens read and handed out. Whoever ends by them has a place too many in the next
step, which is dropped when that one lands. Where the next step hangs on tokens, and before a call
between two steps, the loop lands first (`_may_run_ahead`).

Other threads only add and abort requests under the lock, or ask for a call between two steps.
The model, the sampler and the batch arrays belong to the loop alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from mizzen.runtime.engine.adapters import AdapterTable, SlotUse
from mizzen.runtime.engine.api import FinishReason, Recorder, TokenOutput
from mizzen.runtime.engine.errors import EngineDeadError, GenerationFailedError
from mizzen.runtime.engine.flight import Flight, Launcher
from mizzen.runtime.engine.idle import IdleQueue, IdleWork
from mizzen.runtime.engine.live import Live
from mizzen.runtime.engine.ranks import ModelRanks
from mizzen.runtime.engine.sampler import Sampled
from mizzen.runtime.engine.scheduler import Chunk, Scheduler
from mizzen.runtime.engine.sequence import State
from mizzen.runtime.engine.streams import Outbox
from mizzen.runtime.errors import RankLostError

log = logging.getLogger(__name__)
T = TypeVar("T")

IDLE_WAKE_S = 1.0  # the heartbeat is stamped at least this often while there is nothing to do
RATE_WEIGHT = 0.1  # of the newest step in the moving average of tokens per second


class Loop:
    """Runs steps until stopped. If a step fails, every request ends with EngineDeadError."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        launcher: Launcher,
        ranks: ModelRanks,
        adapters: AdapterTable,
        eos_ids: frozenset[int],
        recorder: Recorder,
        is_ahead: bool,
    ) -> None:
        """Make a loop; `is_ahead`: it launches a step before the one in flight has landed."""
        self.scheduler = scheduler
        self.adapters = adapters
        self.live: dict[str, Live] = {}
        self.lock = threading.Lock()
        self.heartbeat_at = time.monotonic()
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.death: BaseException | None = None
        self._launcher = launcher
        self._ranks = ranks
        self._is_ahead = is_ahead
        self._flight: Flight | None = None
        self._landed_at = 0.0
        self.eos_ids = eos_ids
        self._recorder = recorder
        self._outbox = Outbox()
        self._work = threading.Condition(self.lock)
        self._calls: deque[tuple[Callable[[], object], Future[Any]]] = deque()
        self._idle = IdleQueue(self.lock)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mizzen-engine", daemon=True)

    def start(self) -> None:
        """Begin to take steps."""
        self._thread.start()

    def is_running(self) -> bool:
        """Whether the thread is there and has not failed."""
        return self.death is None and self._thread.is_alive()

    def add(self, live: Live) -> None:
        """Queue a request; raises what `Scheduler.add` raises, or EngineDeadError."""
        with self._work:
            if self.death is not None or self._stopping:
                raise self._dead_error()
            self.scheduler.add(live.seq)
            self.live[live.seq.request_id] = live
            self._work.notify()

    def abort(self, request_id: str) -> None:
        """Mark a request to end before the next step; ended and unknown ones are left alone."""
        with self._work:
            if live := self.live.get(request_id):
                self.scheduler.abort(live.seq)
                self._work.notify()

    def release_adapter(self, use: SlotUse) -> None:
        """End one use of an adapter by who is no request that was added: those end their own."""
        with self._work:
            self._release(use)

    def call_between_steps(self, call: Callable[[], T]) -> "Future[T]":
        """Have the loop's thread run `call` while no step is under way."""
        future: Future[T] = Future()
        with self._work:
            if self.death is not None or self._stopping:
                future.set_exception(self._dead_error())
            else:
                self._calls.append((call, future))
                self._work.notify()
        return future

    def add_idle(self, work: IdleWork) -> None:
        """Have the loop's thread do `work` whenever no request wants the model.

        Raises:
            EngineBusyError: too much of that waits already.
            EngineDeadError: the loop has ended.
        """
        with self._work:
            if self.death is not None or self._stopping:
                raise self._dead_error()
            self._idle.add(work)
            self._work.notify()

    def remove_idle(self, work: IdleWork) -> None:
        """Have the work done no more; what is under way goes on until it looks up."""
        with self._work:
            self._idle.remove(work)

    def is_wanted(self) -> bool:
        """Whether a request or other idle work is there, or the end; asked at every layer."""
        return bool(self.live) or bool(self._idle) or self._stopping

    def wait_until_empty(self, timeout_s: float | None) -> bool:
        """Block until no request is left, or the time is up; return whether none is left."""
        with self._work:
            return self._work.wait_for(lambda: not self.live, timeout_s)

    def stop(self) -> None:
        """End the loop after its step and every request with it; returns when it has ended."""
        with self._work:
            self._stopping = True
            self._work.notify()
        # A lost rank may hold the thread in a collective; the process ends without it.
        if self._thread.ident is not None and not isinstance(self.death, RankLostError):
            self._thread.join()

    def fail(self, error: BaseException) -> None:
        """End every request from outside: the loop may wait for a rank that is gone."""
        with self.lock:
            self.death = self.death or error
        self._end_everything()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.heartbeat_at = time.monotonic()
                self._turn()
            if self.death is None:
                self._land_flight()
        except BaseException as error:
            log.exception("The engine's loop has failed; every request ends now.")
            self.death = self.death or error
        finally:
            self._outbox.flush()
            self._end_everything()
            self._ranks.stop()

    def _turn(self) -> None:
        if not self._may_run_ahead():
            self._land_flight()
            self._run_calls()
        chunks = self._next_chunks()
        self._outbox.flush()
        before, self._flight = self._flight, None
        if chunks:
            self._flight = self._launcher.launch(chunks, before, now=time.monotonic())
        if before is not None:
            self._land(before)
        elif not chunks:
            self._idle.do_first(self._look_up)

    def _may_run_ahead(self) -> bool:
        if self._flight is None or not self._is_ahead or self._calls:
            return False
        with self.lock:
            return self.scheduler.may_run_ahead()

    def _land_flight(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            self._land(flight)

    def _look_up(self) -> bool:
        """Return whether idle work has to give way; its thread is seen to be alive by this."""
        self.heartbeat_at = time.monotonic()
        return self.scheduler.has_work() or bool(self._calls) or self._stopping

    def _next_chunks(self) -> list[Chunk]:
        now = time.monotonic()
        with self._work:
            for seq in self.scheduler.reap():
                live = self.live[seq.request_id]
                self._outbox.put(live.stream, live.aborted())
                self._forget(live, "abort", now)
            chunks = self.scheduler.schedule()
            has_more = chunks or self._flight is not None or self._calls or self._idle
            if not has_more and not self._stopping:
                self._outbox.flush()
                self._ranks.check()
                self._work.wait(IDLE_WAKE_S)
            for chunk in chunks:
                live = self.live[chunk.seq.request_id]
                if live.scheduled_at is None:
                    live.scheduled_at = now
        return chunks

    def _land(self, flight: Flight) -> None:
        sampled = None if flight.choice is None else flight.choice.read()
        now = time.monotonic()
        with self.lock:
            self.scheduler.advance(flight.chunks)
            if sampled is not None:
                for chunk in flight.chunks:
                    seq = chunk.seq
                    if chunk.samples and seq.state is State.RUNNING and not seq.abort_wanted:
                        self._take(chunk, sampled, flight, now)
            self._count(flight.chunks, now - max(flight.began_at, self._landed_at))
        self._landed_at = now
        self._outbox.flush()

    def _take(self, chunk: Chunk, sampled: Sampled, flight: Flight, now: float) -> None:
        """Hand out a sequence's new token, and those after it for as long as guesses were right."""
        seq, live = chunk.seq, self.live[chunk.seq.request_id]
        row = flight.row_of[seq]
        right = 0
        for guess in (*chunk.draft, None):
            if error := sampled.failures.get(row + right):
                self._fail(live, error, now)
                break
            if seq.sampling.embed:
                self._hand_out(live, live.embedded(flight.embeddings[seq]), now)
                break
            token_id = sampled.token_ids[row + right]
            output = live.take(token_id, sampled.logprobs[row + right], self.eos_ids)
            self._hand_out(live, output, now)
            if output.finish_reason is not None or token_id != guess:
                break
            right += 1
        self.scheduler.accept(chunk, right)

    def _hand_out(self, live: Live, output: TokenOutput, now: float) -> None:
        if live.seq.is_demand:
            self._measure(live, output, now)
        if live.first_token_at is None:
            live.first_token_at = now
        live.last_token_at = now
        if output.finish_reason is not None:
            output = replace(output, finished=live.finished(output.finish_reason, now))
        self._outbox.put(live.stream, output)
        if output.finish_reason is not None:
            self.scheduler.finish(live.seq, output.finish_reason)
            self._forget(live, output.finish_reason, now)

    def _measure(self, live: Live, output: TokenOutput, now: float) -> None:
        if live.first_token_at is None:
            self.prompt_tokens += live.seq.prompt_tokens
            self._recorder.on_first_token(now - live.arrived_at)
        else:
            self._recorder.on_token(now - (live.last_token_at or now))
        self.generation_tokens += len(output.token_ids)

    def _fail(self, live: Live, error: Exception, now: float) -> None:
        """End one request whose numbers or grammar went wrong, and leave nothing of it behind."""
        if isinstance(error, GenerationFailedError):
            # Masked keys are still multiplied, by zero: what is not finite would reach whoever
            # gets these blocks next, or finds them in the prefix cache.
            self._ranks.scrub(live.seq.blocks)
            self.scheduler.pool.forget_all()
        self._outbox.put(live.stream, error)
        self.scheduler.finish(live.seq, "abort")
        self._forget(live, "abort", now)

    def _forget(self, live: Live, reason: FinishReason, now: float) -> None:
        del self.live[live.seq.request_id]
        if live.adapter_use is not None:
            self._release(live.adapter_use)
        if live.seq.is_demand:
            self._recorder.on_finish(live.finished(reason, now))
        if not self.live:
            self._work.notify_all()

    def _release(self, use: SlotUse) -> None:
        if (slot := self.adapters.release(use)) is not None:
            self._calls.append((lambda: self._ranks.clear_adapter(slot), Future()))

    def _count(self, chunks: list[Chunk], step_s: float) -> None:
        tokens = sum(chunk.size for chunk in chunks)
        self.steps += 1
        rate, old = tokens / max(step_s, 1e-6), self.scheduler.tokens_per_s
        self.scheduler.tokens_per_s = old + RATE_WEIGHT * (rate - old) if old else rate
        self._recorder.on_step(step_s, tokens)

    def _run_calls(self) -> None:
        while (waiting := self._next_call()) is not None:
            call, future = waiting
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)

    def _next_call(self) -> tuple[Callable[[], object], Future[Any]] | None:
        with self.lock:  # `fail` may be ending them
            return self._calls.popleft() if self._calls else None

    def _end_everything(self) -> None:
        outbox = Outbox()  # another than the loop's, which may be at work with that one
        with self.lock:
            self._stopping = True
            for live in self.live.values():
                outbox.put(live.stream, self._dead_error())
            self.live.clear()
            self._work.notify_all()
            while self._calls:
                future = self._calls.popleft()[1]
                if future.set_running_or_notify_cancel():  # its asker may have left
                    future.set_exception(self._dead_error())
            self._idle.fail(self._dead_error())
        outbox.flush()

    def _dead_error(self) -> EngineDeadError:
        if self.death is None:
            return EngineDeadError("The engine has been stopped.")
        if isinstance(self.death, RankLostError):
            return EngineDeadError(f"{self.death} The engine goes down.")
        return EngineDeadError(f"The engine's loop has failed: {self.death!r}. See its log.")
