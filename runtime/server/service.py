"""What every protocol needs of the engine: is it there, whose name is this, run this request.

Knows neither HTTP nor gRPC. All of it runs on the server's event loop.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import cast

from mizzen.runtime.config import ServeConfig
from mizzen.runtime.engine.api import (
    AdapterState,
    EngineApi,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)
from mizzen.runtime.server.errors import ApiError, not_ready, to_api_error, unknown_model
from mizzen.runtime.server.files import ModelFiles
from mizzen.runtime.server.metrics import Metrics
from mizzen.runtime.server.traces import trace_asked, trace_finished
from mizzen.runtime.tracing import Tracing, current_span, start_tracing
from mizzen.runtime.train.digest import POLICY_PREFIX, mark_weights

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """Where the process is between its start and its end."""

    STARTING = "starting"
    LOADING_MODEL = "loading-model"
    LOADING_ADAPTERS = "loading-adapters"
    SERVING = "serving"
    ASLEEP = "asleep"  # weights and KV cache are gone until it is woken
    LAME_DUCK = "lame-duck"  # not ready, yet what still arrives is served
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(slots=True)
class ModelUse:
    """How a model or adapter was used since start, as Triton's statistics count it."""

    succeeded: int = 0
    succeeded_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    tokens: int = 0
    last_used_ms: int = 0


@dataclass(slots=True)
class Service:
    """The one engine of this process and what is known around it."""

    config: ServeConfig
    metrics: Metrics
    phase: Phase = Phase.STARTING
    files: ModelFiles = field(default_factory=ModelFiles)
    tracing: Tracing = field(default_factory=lambda: start_tracing("mizzen-runtime"))
    uses: dict[str, ModelUse] = field(default_factory=dict)
    started_at: int = field(default_factory=lambda: int(time.time()))
    change_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    adapter_errors: dict[str, str] = field(default_factory=dict)
    adapter_digests: dict[str, str | None] = field(default_factory=dict)
    weights: Path = Path()  # where those lie that are served
    swaps: int = 0  # how often they were changed, perhaps in the same place
    _mark: tuple[int, str] | None = None  # of the weights, after so many swaps
    _engine: EngineApi | None = None
    _open: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def served_name(self) -> str:
        """The base model's name."""
        return self.config.served_name

    def attach(self, engine: EngineApi) -> None:
        """Begin to use a started engine."""
        self._engine = engine

    @property
    def engine(self) -> EngineApi:
        """The engine.

        Raises:
            ApiError: it has not been started yet.
        """
        if self._engine is None:
            raise not_ready(self.phase)
        return self._engine

    @property
    def engine_or_none(self) -> EngineApi | None:
        """The engine, or None while the model loads."""
        return self._engine

    async def load_weights(self, path: Path) -> None:
        """Serve other weights of the same model; raises as `EngineApi.load_weights` does."""
        await self.engine.load_weights(path)
        self.weights, self.swaps = path, self.swaps + 1

    async def weights_mark(self) -> str:
        """Return what the served weights are told apart by, read once for each swap.

        Raises:
            OSError: their files are gone.
        """
        swaps = self.swaps
        if self._mark is None or self._mark[0] != swaps:
            self._mark = swaps, await asyncio.to_thread(mark_weights, self.weights)
        return self._mark[1]

    def is_alive(self) -> bool:
        """Whether a restart would not help: the loop moves, or the model is still loading."""
        return self._engine is None or self._engine.is_alive()

    def is_ready(self) -> bool:
        """Whether this replica should get new requests."""
        return self.phase is Phase.SERVING and self._engine is not None and self._engine.is_ready()

    @property
    def is_draining(self) -> bool:
        """Whether a stop has begun."""
        return self.phase in (Phase.LAME_DUCK, Phase.DRAINING, Phase.STOPPED)

    def in_flight(self) -> int:
        """Return how many answers are still being made or sent."""
        return max(self._open, self._engine.in_flight() if self._engine else 0)

    def open_request(self) -> None:
        """Count a request whose answer is not yet wholly sent."""
        self._open += 1
        self._idle.clear()

    def close_request(self) -> None:
        """The counterpart of `open_request`."""
        self._open -= 1
        if self._open == 0:
            self._idle.set()

    async def wait_until_sent(self) -> None:
        """Wait until no answer is being made or sent."""
        if self._open:
            await self._idle.wait()

    def model_names(self) -> list[str]:
        """Return every name that can be asked for, the base model first."""
        return [self.served_name, *(adapter.name for adapter in self.adapters())]

    def adapters(self) -> list[AdapterState]:
        """Return the adapters that anybody may ask for: no policy that is being trained."""
        loaded = self._engine.adapters() if self._engine else []
        return [adapter for adapter in loaded if not adapter.name.startswith(POLICY_PREFIX)]

    def resolve(self, name: str) -> str | None:
        """Return the adapter that a model name stands for, None for the base model.

        Raises:
            ApiError: nothing is served under that name.
        """
        if name == self.served_name:
            return None
        if self._engine is None:
            raise not_ready(self.phase)  # adapters are not known yet
        wanted = name.removeprefix(f"{self.served_name}:")
        names = self.model_names()
        if wanted in names[1:]:
            return wanted
        raise unknown_model(name, names)

    async def generate(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        adapter: str | None,
        priority: int = 0,
        cache_salt: str = "",
        place: int = 0,
        continues_text: bool = False,
    ) -> AsyncGenerator[TokenOutput, None]:
        """Yield the answer to a prompt; closing the iterator frees what it holds.

        `place` is the answer's among those to the same prompt, whose tokens count once. An answer
        that `continues_text` begins in the middle of one, as its tokens say.

        Raises:
            ApiError: whatever the engine had against it, or that it was cut by a stop.
        """
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            sampling=sampling,
            adapter=adapter,
            priority=priority,
            cache_salt=cache_salt,
            continues_text=continues_text,
        )
        engine = self.engine
        trace_asked(current_span.get(), request)
        began_ns, tokens, succeeded = time.monotonic_ns(), 0, False
        try:
            # The engine's iterators are generators; the protocol promises only the iterator.
            outputs = cast("AsyncGenerator[TokenOutput, None]", engine.generate(request))
            async with aclosing(outputs):
                async for output in outputs:
                    if output.finish_reason == "abort":
                        raise ApiError(
                            503,
                            "The answer was cut short because the server is stopping.",
                            code="aborted",
                            retry_after_s=1,
                        )
                    tokens = output.output_tokens
                    succeeded = output.finish_reason is not None
                    if output.finished is not None:
                        trace_finished(current_span.get(), output.finished, place=place)
                    yield output
        except Exception as error:
            raise self._refused(error) from error
        finally:
            self._count(adapter, time.monotonic_ns() - began_ns, tokens, succeeded=succeeded)

    def _refused(self, error: Exception) -> ApiError:
        answer = to_api_error(error)
        kind = answer.code or str(answer.status)
        current_span.get().failed(kind, is_ours=answer.status >= 500)
        if answer.status == 500:
            log.error("a request failed", exc_info=error)
        self.metrics.reject(answer)
        return answer

    def _count(self, adapter: str | None, took_ns: int, tokens: int, *, succeeded: bool) -> None:
        use = self.uses.setdefault(adapter or self.served_name, ModelUse())
        use.last_used_ms = int(time.time() * 1000)
        use.tokens += tokens
        if succeeded:
            use.succeeded += 1
            use.succeeded_ns += took_ns
        else:
            use.failed += 1
            use.failed_ns += took_ns
