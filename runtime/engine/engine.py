"""The engine as others use it: asynchronous, cancellable, drainable. The work is the loop's."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path

from torch import Tensor

from mizzen.runtime.engine.adapters import AdapterTable, SlotUse, content_hash, names_of
from mizzen.runtime.engine.admission import check_request, check_scored
from mizzen.runtime.engine.api import (
    AdapterState,
    EngineStats,
    GenerationRequest,
    LoanState,
    PromptScores,
    Recorder,
    SamplingParams,
    ScoreRequest,
    TokenOutput,
)
from mizzen.runtime.engine.blocks import root_hash
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.detokenizer import DetokenizerFactory
from mizzen.runtime.engine.errors import (
    AdapterLoadError,
    AsleepError,
    DrainingError,
    EngineDeadError,
    InvalidRequestError,
)
from mizzen.runtime.engine.grammar import GrammarCompiler, GrammarState
from mizzen.runtime.engine.idle import busy
from mizzen.runtime.engine.lender import Lender
from mizzen.runtime.engine.live import Live
from mizzen.runtime.engine.sampler import is_edited, needs_tokens
from mizzen.runtime.engine.scoring import WAIT_S, IsWanted, Scoring, rows_of_ranks, rows_of_whole
from mizzen.runtime.engine.sequence import Sequence
from mizzen.runtime.engine.speculation import DraftPlaces, Guesser, NgramIndex
from mizzen.runtime.engine.startup import Parts, start_parts
from mizzen.runtime.engine.streams import Item, Stream
from mizzen.runtime.errors import BadAdapterError, BadModelError, MizzenError, RankLostError
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora import load_adapter

DRAIN_RETRY_S = 1.0


class Engine:
    """One model, loaded and warm. All methods may be called from any event loop."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self.tokenizer = parts.tokenizer
        self.arch = parts.arch
        self.model_len = parts.model_len
        self.sizes = parts.sizes
        self.start_seconds = parts.start_seconds
        self._config = config
        self._loop = parts.loop
        self._ranks = parts.ranks
        self._detokenizers = DetokenizerFactory(parts.tokenizer)
        self._grammars = GrammarCompiler(
            parts.tokenizer, vocab_size=parts.arch.vocab_size, eos_ids=tuple(parts.loop.eos_ids)
        )
        self._adapters: AdapterTable = parts.loop.adapters
        self._arrivals = count()
        self._lender = Lender(parts.loop, parts.ranks)
        self._change_lock = asyncio.Lock()  # adapters and weights change one at a time
        self._draining = False
        self._asleep = False
        self._weights = 0  # how often they were changed
        self._weights_path = config.model

    @classmethod
    def start(cls, config: EngineConfig, recorder: Recorder | None = None) -> "Engine":
        """Load the model, warm it up and start the loop.

        Raises:
            MizzenError: the model or the settings cannot be used; the message says what to change.
        """
        parts = start_parts(config, recorder)
        parts.loop.start()
        return cls(config, parts)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield the answer as it grows; see `api.EngineApi.generate`."""
        outputs: asyncio.Queue[Item] = asyncio.Queue()
        await self.submit(request, outputs.put_nowait)
        ended = False
        try:
            while not ended:
                item = await outputs.get()
                ended = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if not ended:
                self._loop.abort(request.request_id)

    async def submit(self, request: GenerationRequest, deliver: Callable[[Item], None]) -> None:
        """Queue a request; `deliver` is called on this event loop with what comes of it.

        The last is an output with a `finish_reason`, or an error. Raises as `generate` does.
        """
        check_request(request, vocab_size=self.arch.vocab_size)
        wanted = request.sampling.grammar
        grammar = await self._grammars.start(wanted) if wanted else None
        self._submit(request, grammar, Stream(asyncio.get_running_loop(), deliver))

    async def score(self, request: ScoreRequest) -> PromptScores:
        """Return what the model thinks of tokens, once no request wants it; see `api`."""
        check_scored(request, vocab_size=self.arch.vocab_size, model_len=self.model_len)
        self._check_open()
        with self._loop.lock:
            use = self._adapters.acquire(request.adapter) if request.adapter else None
        slot = use.slot if use else 0
        scoring = Scoring(request, lambda is_wanted: self._rows(request, slot, is_wanted))
        try:
            return await self._when_idle(scoring)
        finally:
            if use is not None:
                self._loop.release_adapter(use)

    async def _when_idle(self, scoring: Scoring) -> PromptScores:
        self._loop.add_idle(scoring)
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.wrap_future(scoring.done)
        except TimeoutError:
            raise busy(
                f"The replica is busy with requests that come first: {WAIT_S:g} seconds did not "
                "suffice to wait for a moment without them and to compute in it."
            ) from None
        finally:
            self._loop.remove_idle(scoring)

    def _rows(self, request: ScoreRequest, slot: int, is_wanted: IsWanted) -> Iterator[Tensor]:
        decoder = self._resident()
        if self._ranks.is_whole:
            lora = self._ranks.adapter_of(slot, len(request.token_ids))
            return rows_of_whole(decoder, request, lora, is_wanted)
        return rows_of_ranks(self._ranks, self._loop.scheduler, request, slot, is_wanted)

    def _resident(self) -> Decoder:
        self._check_open()  # again: it may have fallen asleep since it was asked
        return self._ranks.resident()

    async def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort"."""
        self._loop.abort(request_id)

    async def load_adapter(self, name: str, path: Path, digest: str | None = None) -> None:
        """Make an adapter servable under `name`; running requests keep the weights they have.

        Raises:
            AdapterLoadError: it does not exist, does not fit the model, or there are too many.
        """
        async with self._change_lock:
            try:
                content = await asyncio.to_thread(content_hash, path)
                if self._adapters.has_content(name, content):
                    return
                limit = self._config.max_lora_rank
                adapter = await asyncio.to_thread(load_adapter, path, max_rank=limit)
                slot = self._adapters.reserve(name)
                await self._between_steps(lambda: self._ranks.load_adapter(slot, adapter, path))
            except (OSError, BadAdapterError, BadModelError) as error:
                raise AdapterLoadError(f"Adapter {name} cannot be loaded: {error}") from error
            state = AdapterState(
                name=name, path=str(path), digest=digest or content, rank=adapter.config.rank
            )
            with self._loop.lock:
                replaced = self._adapters.publish(SlotUse(slot, content, state))
            await self._clear(replaced)

    async def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter; its running requests finish first.

        Raises:
            UnknownAdapterError: it is not loaded.
        """
        async with self._change_lock:
            with self._loop.lock:
                unused = self._adapters.withdraw(name)
            await self._clear(unused)

    async def start_loan(self, job: str) -> LoanState:
        """Train beside the served weights while no request wants them; see `api`."""
        async with self._change_lock:
            if not self._ranks.can_lend:
                raise InvalidRequestError(
                    "Loans need a model that one pod holds and that is not cut into stages. Ask a "
                    "deployment with spec.parallelism.pipeline and nodes 1."
                )
            decoder, path = self._resident(), self._weights_path
            state = await asyncio.to_thread(self._lender.lend, job, decoder, path)
            if self._draining:
                # Since it was asked, which takes the trainer's imports: it had no job to stop then.
                self._lender.ask_to_stop()
            return state

    async def stop_loan(self) -> None:
        """Have the job commit its last whole step and end."""
        self._lender.ask_to_stop()

    async def loan(self) -> LoanState | None:
        """Return the job that is at it, or the last one; None where there was none."""
        return self._lender.state()

    def adapters(self) -> list[AdapterState]:
        """Return the adapters that can be asked for, by name."""
        with self._loop.lock:
            return self._adapters.states()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, abort those left after `timeout_s`."""
        self._draining = True
        self._lender.ask_to_stop()
        await self._run_empty(timeout_s)
        await asyncio.to_thread(self._lender.take_back)

    async def _run_empty(self, timeout_s: float) -> None:
        if not await asyncio.to_thread(self._loop.wait_until_empty, timeout_s):
            for request_id in list(self._loop.live):
                self._loop.abort(request_id)
            await asyncio.to_thread(self._loop.wait_until_empty, None)

    async def sleep(self, timeout_s: float) -> None:
        """End what runs, as `drain` does, and give back the memory of weights and KV cache."""
        async with self._change_lock:
            # All of it again if asked again: the first may have been cut off half way.
            self._asleep = True
            self._lender.ask_to_stop()
            await self._run_empty(timeout_s)
            await asyncio.to_thread(self._lender.take_back)
            await self._between_steps(self._fall_asleep)

    async def wake(self) -> None:
        """Read the weights again and take requests; adapters are still there."""
        async with self._change_lock:
            if self._asleep:
                await self._use_weights(self._weights_path)
                self._asleep = False

    async def load_weights(self, path: Path) -> None:
        """Serve other weights of the same model; what runs goes on with them.

        Raises:
            BadModelError: they cannot be used; what is served stays as it was.
            InvalidRequestError: the engine is asleep.
        """
        async with self._change_lock:
            if self._asleep:
                raise InvalidRequestError("The engine is asleep. Wake it before changing weights.")
            await self._use_weights(path)

    async def _use_weights(self, path: Path) -> None:
        await asyncio.to_thread(self._ranks.check_same_model, path)
        await self._between_steps(lambda: self._ranks.announce(path))
        try:
            decoder = await asyncio.to_thread(self._ranks.prepare, path)
        except BaseException:
            await self._between_steps(self._ranks.forgo)
            raise

        await asyncio.to_thread(self._lender.take_back)

        def swap() -> None:
            self._ranks.swap(decoder)
            self._weights, self._weights_path = self._weights + 1, path
            self._loop.scheduler.pool.forget_all()

        await self._between_steps(swap)

    def _fall_asleep(self) -> None:
        self._ranks.release()
        self._loop.scheduler.pool.forget_all()

    @property
    def draining(self) -> bool:
        """Whether `drain` was called."""
        return self._draining

    def in_flight(self) -> int:
        """Return how many requests have not ended."""
        return len(self._loop.live)

    def stats(self) -> EngineStats:
        """Return the engine's figures of now."""
        loop, scheduler = self._loop, self._loop.scheduler
        with loop.lock:
            pool = scheduler.pool
            return EngineStats(
                running=sum(seq.is_demand for seq in scheduler.running),
                waiting=sum(seq.is_demand for seq in scheduler.waiting),
                blocks_total=pool.total,
                blocks_free=pool.free,
                kv_usage_ratio=pool.used / pool.total,
                prompt_tokens=loop.prompt_tokens,
                generation_tokens=loop.generation_tokens,
                preemptions=scheduler.preemptions,
                prefix_queries=scheduler.prefix_queries,
                prefix_hits=scheduler.prefix_hits,
                draft_tokens=scheduler.draft_tokens,
                accepted_tokens=scheduler.accepted_tokens,
                steps=loop.steps,
                heartbeat_age_s=time.monotonic() - loop.heartbeat_at,
                block_size=pool.block_size,
                max_loras=self._adapters.max_loras,
                running_adapters=names_of(scheduler.running),
                waiting_adapters=names_of(scheduler.waiting),
                start_seconds=self.start_seconds,
                loan_step=self._lender.step,
            )

    def is_alive(self) -> bool:
        """Whether the loop still turns; an idle one stamps its heartbeat too."""
        age_s = time.monotonic() - self._loop.heartbeat_at
        return self._loop.is_running() and age_s < self._config.heartbeat_limit_s

    def death(self) -> MizzenError | None:
        """Return why it will never be alive again, None while it may."""
        why = self._loop.death
        if why is None or isinstance(why, RankLostError):
            return why
        return EngineDeadError(f"The engine's loop has failed: {why!r}. See its log.")

    def is_ready(self) -> bool:
        """Whether it is alive, awake, and takes new requests."""
        return self.is_alive() and not self._draining and not self._asleep

    async def stop(self) -> None:
        """End every request, the loop and the other ranks."""
        self._lender.ask_to_stop()
        await asyncio.to_thread(self._loop.stop)
        await asyncio.to_thread(self._lender.take_back)

    def _submit(
        self, request: GenerationRequest, grammar: GrammarState | None, stream: Stream
    ) -> None:
        self._check_open()
        if request.request_id in self._loop.live:
            raise InvalidRequestError(f"Request id {request.request_id!r} is in use.")
        with self._loop.lock:
            use = self._adapters.acquire(request.adapter) if request.adapter else None
        live = Live(
            seq=self._sequence(request, use, grammar),
            detokenizer=self._detokenizers.make(
                request.sampling.stop,
                before=request.prompt_token_ids if request.continues_text else (),
            ),
            stream=stream,
            arrived_at=time.monotonic(),
            adapter_use=use,
        )
        try:
            self._loop.add(live)
        except BaseException:
            if use is not None:
                self._loop.release_adapter(use)
            raise

    def _check_open(self) -> None:
        if self._draining:
            raise DrainingError(
                "This replica is draining. Send the request again: another will take it.",
                retry_after_s=DRAIN_RETRY_S,
            )
        if self._asleep:
            raise AsleepError("This replica sleeps. Wake it, or ask another.", retry_after_s=5.0)
        if not self._loop.is_running():
            raise EngineDeadError("The engine's loop has ended. See its log.")

    def _sequence(
        self, request: GenerationRequest, use: SlotUse | None, grammar: GrammarState | None
    ) -> Sequence:
        sampling, guesser = request.sampling, self._guesser(request.sampling)
        room = self.model_len - len(request.prompt_token_ids)
        return Sequence(
            request_id=request.request_id,
            arrival=next(self._arrivals),
            token_ids=list(request.prompt_token_ids),
            sampling=sampling,
            priority=request.priority,
            lora_slot=use.slot if use else 0,
            adapter=request.adapter,
            parent_hash=root_hash(
                adapter_digest=use.content if use else "",
                cache_salt=request.cache_salt,
                weights=self._weights,
            ),
            max_tokens=min(sampling.max_tokens or room, room),
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            grammar=grammar,
            guesser=guesser,
            needs_tokens=guesser is not None or needs_tokens(sampling),
        )

    def _guesser(self, sampling: SamplingParams) -> Guesser | None:
        # Where each token changes what the next may be, a guess cannot be checked in one step.
        if is_edited(sampling) or sampling.grammar or sampling.embed:
            return None
        if self._config.speculative_tokens == 0:
            return None
        return DraftPlaces() if self._config.speculative_model else NgramIndex()

    async def _clear(self, slot: int | None) -> None:
        if slot is not None:
            await self._between_steps(lambda: self._ranks.clear_adapter(slot))

    async def _between_steps(self, call: Callable[[], None]) -> None:
        await asyncio.wrap_future(self._loop.call_between_steps(call))
