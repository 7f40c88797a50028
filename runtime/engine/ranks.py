"""How the loop reaches the model: this rank, and the others of its group if there are any."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.draft import DraftModel
from mizzen.runtime.engine.graphs import graph_rows
from mizzen.runtime.engine.heap import give_back_freed
from mizzen.runtime.engine.kv_room import free_bytes, least_room, own_kv, room_for_blocks
from mizzen.runtime.engine.lending_rank import LendingRank, RecentSteps
from mizzen.runtime.engine.runner import Runner
from mizzen.runtime.engine.scheduler import Chunk
from mizzen.runtime.engine.unknown import fill_unknown
from mizzen.runtime.engine.wire import (
    Allocate,
    Clear,
    Forgo,
    Lend,
    Load,
    Message,
    Prepare,
    Release,
    Scrub,
    Swap,
    decode,
    encode,
)
from mizzen.runtime.errors import RankLostError, WeightShapeError
from mizzen.runtime.handover import wait_for_memory
from mizzen.runtime.kernels.team import dismiss_team
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Placement
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import Adapter, load_adapter
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.processes import Inbox
from mizzen.runtime.parallel.ranks import Ranks


class ModelRanks:
    """Every rank of the model, driven as one: tells the others what it does, then does it."""

    def __init__(
        self,
        config: EngineConfig,
        decoder: Decoder,
        ranks: Ranks,
        blocks: int,
        *,
        draft: DraftModel | None = None,
    ) -> None:
        """Take over what `agree_on_blocks` has prepared on the other ranks."""
        self._config = config
        self._ranks = ranks
        self._place = decoder.place
        self._spec = decoder.spec
        self._runner = _runner(config, decoder, blocks)
        self._draft = draft
        self.last_hidden = self._runner.last_hidden
        self.adapter_of = self._runner.adapter_of
        self.check = ranks.check
        self.serve = ranks.serve

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of the model."""
        return self._ranks.size == 1

    @property
    def can_lend(self) -> bool:
        """Whether a job can learn beside the weights: it knows no stages, and ranks of one pod."""
        return self._config.pipeline_parallel_size == 1 and self._config.nodes is None

    def resident(self) -> Decoder:
        """Return the served weights, for what is computed beside the steps."""
        return self._runner.decoder

    def spare_bytes(self) -> int:
        """Return the memory that is left beside what the models hold and their caches may fill."""
        unfilled = self._draft.unfilled_bytes() if self._draft is not None else 0
        return spare_bytes(self._config, self._runner, self._place.device, unfilled)

    def announce_loan(self, message: Lend) -> None:
        """Have the other ranks begin their parts of a loan, beside what they compute."""
        self._tell(message)

    def warm_up(self, step: StepInput) -> None:
        """Compute a step on the block nobody reads, with every model there is."""
        self.run(step)
        if self._draft is not None:
            self._draft.warm_up(step)

    def guess(self, chunks: list[Chunk]) -> None:
        """Have the draft model fill the places that were kept for its guesses, if there is one."""
        if self._draft is not None:
            self._draft.guess(chunks)

    def run(self, step: StepInput, before_N: Tensor | None = None) -> Tensor | None:
        """Compute a step; return float32 logits_NV of the tokens to sample from.

        `before_N` are the tokens that the step before has sampled, where this one lacks some.
        """
        if before_N is not None and self._ranks.size > 1:
            # The other ranks are told tokens, so this one has to wait for them.
            fill_unknown(torch.from_numpy(step.token_ids_T), step, before_N.cpu())
            before_N = None
        self._tell(step)
        return self._runner.run(step, before_N)

    def load_adapter(self, slot: int, adapter: Adapter, path: Path) -> None:
        """Fill a slot on every rank; the others read the files, which may go afterwards."""
        # Own rank first: what does not fit is refused here, before anyone else has seen it.
        self._runner.load_adapter(slot, adapter)
        self._tell(Load(slot, path))
        _wait_for_all(self._place)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot on every rank."""
        self._tell(Clear(slot))
        self._runner.clear_adapter(slot)

    def scrub(self, blocks: list[int]) -> None:
        """Make every number in these KV blocks finite, on every rank."""
        self._tell(Scrub(blocks))
        self._runner.scrub(blocks)
        if self._draft is not None:
            self._draft.scrub(blocks)

    def check_same_model(self, path: Path) -> None:
        """Look at the description beside the weights; may be called from any thread.

        Raises:
            BadModelError: it cannot be read, or is not of the model that is served.
        """
        if ArchSpec.from_dir(path) != self._spec:
            raise WeightShapeError(
                f"{path} holds another model than the one that is served. Weights can be swapped "
                "only for weights with an equal config.json."
            )

    def announce(self, path: Path) -> None:
        """Have the other ranks read new weights, beside what they compute."""
        self._tell(Prepare(path))

    def prepare(self, path: Path) -> Decoder:
        """Read this rank's new weights; may be called from any thread.

        Raises:
            BadModelError: they cannot be used.
        """
        config = replace(self._config, model=path)
        return load_rank(config, self._place.device, self._place.group)

    def forgo(self) -> None:
        """Have the other ranks let go of what they were told to read."""
        self._tell(Forgo())

    def swap(self, decoder: Decoder) -> None:
        """Compute with the prepared weights from now on, on every rank."""
        self._tell(Swap())
        self._runner.use(decoder)
        if self._draft is not None:
            self._draft.wake()

    def release(self) -> None:
        """Give back the memory of weights and KV cache, on every rank, until `swap`."""
        self._tell(Release())
        self._runner.release()
        if self._draft is not None:
            self._draft.release()

    def stop(self) -> None:
        """End the other ranks; nothing is computed any more."""
        # Captured collectives go before their group, whose end would wait for them. With a rank
        # lost one may hang, and so would giving back its memory: the process must end as it is.
        with suppress(RankLostError):
            self._ranks.check()
            self._runner.release()
        self._ranks.stop()

    def _tell(self, message: Message) -> None:
        if self._ranks.size > 1:
            self._ranks.send(encode(message))


def load_rank(config: EngineConfig, device: torch.device, group: RankGroup) -> Decoder:
    """Load this rank's weights, ready to serve; the thread that does keeps no team for it."""
    decoder = load_decoder(
        config.model,
        dtype=config.dtype,
        device=device,
        group=group,
        quantization=config.quantization,
    )
    decoder.prepack()
    give_back_freed()
    dismiss_team()
    return decoder


def follow(
    group: RankGroup, inbox: Inbox, config: EngineConfig, device_type: str, threads: int
) -> None:
    """Be a rank above 0: do what rank 0 says until it says no more."""
    if device_type == "cuda":
        device = torch.device(device_type, torch.cuda.current_device())
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads)
    wait_for_memory(device)
    decoder = load_rank(config, device, group)
    messages = (decode(data) for data in inbox)
    first = next(messages, None)
    if first is None:  # rank 0 found the model or its settings unusable
        return
    assert isinstance(first, Allocate), "the KV cache comes before the first step"
    room = min(first.room, room_for_blocks(config, decoder))
    runner = _runner(config, decoder, least_room(decoder, room) + 1)
    place = decoder.place
    del decoder  # the runner's, which may let go of it
    reader, prepared = ThreadPoolExecutor(1), Future[Decoder]()
    steps, lending = RecentSteps(), LendingRank(group.rank, group.size)
    for message in messages:
        match message:
            case StepInput():
                with steps.one():
                    runner.run(message)
            case Lend():
                spare = partial(spare_bytes, config, runner, device)
                lending.begin(message, runner.decoder, steps.are_recent, spare_bytes=spare)
            case Load(slot, path):
                runner.load_adapter(slot, load_adapter(path))
                _wait_for_all(place)
            case Clear(slot):
                runner.clear_adapter(slot)
            case Scrub(blocks):
                runner.scrub(blocks)
            case Prepare(path):
                prepared = reader.submit(load_rank, replace(config, model=path), device, group)
            case Forgo():
                prepared = Future()
            case Swap():
                lending.take_back()
                runner.use(prepared.result())
                prepared = Future()
            case Release():
                lending.take_back()
                runner.release()
    runner.release()  # captured collectives go before their group


def spare_bytes(
    config: EngineConfig, runner: Runner, device: torch.device, unfilled_bytes: int = 0
) -> int:
    """Return a rank's share of the memory that is left beside what models hold and caches may fill.

    `unfilled_bytes` is what a draft model's cache may yet fill.
    """
    # Each GPU has memory of its own.
    sharing = config.ranks_per_pod if device.type == "cpu" else 1
    unfilled_bytes += runner.unfilled_bytes()
    return max(0, free_bytes(device) // sharing - unfilled_bytes)


def _wait_for_all(place: Placement) -> None:
    """Return once every rank has come here; reading the number waits for the device too."""
    place.group.stages.least(torch.zeros(1, device=place.device)).item()


def _runner(config: EngineConfig, decoder: Decoder, blocks: int) -> Runner:
    return Runner(
        decoder,
        kv=own_kv(config, decoder, blocks=blocks),
        graph_rows=graph_rows(config, decoder.place.device),
    )


def agree_on_blocks(ranks: Ranks, decoder: Decoder, room: int) -> int:
    """Have every rank make room for the KV cache; return how many blocks they all have.

    `room` is what rank 0 would take.
    """
    if ranks.size > 1:
        ranks.send(encode(Allocate(room)))
    return least_room(decoder, room)
