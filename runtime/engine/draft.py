"""A small second model guesses what the served one will say; the served one checks it.

It computes every token that the served model computes, into blocks of the same numbers in a KV
cache of its own. So what a prefix hit finds is there for both, and wrong guesses, preemption and
ended requests need no bookkeeping here. It runs on rank 0 alone: guesses are mere token ids.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2023).
"""

# Shapes: N tokens that are sampled from, V vocabulary.
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.attention.base import KvShape
from mizzen.runtime.engine.batch import BatchBuilder, StepInput
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.graphs import graph_rows
from mizzen.runtime.engine.runner import Runner
from mizzen.runtime.engine.scheduler import Chunk
from mizzen.runtime.errors import BadModelError
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder

NOTHING = np.zeros(0, dtype=np.int64)


class DraftUnfitError(BadModelError):
    """The draft model cannot guess for the served one."""

    reason = "DraftUnfit"


def load_draft(config: EngineConfig, device: torch.device) -> Decoder:
    """Return the settings' draft model, whole and ready to compute.

    Raises:
        BadModelError: it cannot be used.
    """
    assert config.speculative_model is not None, "who has none loads none"
    decoder = load_decoder(
        config.speculative_model,
        dtype=config.dtype,
        device=device,
        quantization=config.quantization,
    )
    decoder.prepack()
    return decoder


def check_draft(draft: ArchSpec, served: ArchSpec, *, model_len: int) -> None:
    """Raise DraftUnfitError unless the draft model knows the same tokens and as long a context."""
    if draft.vocab_size != served.vocab_size:
        raise DraftUnfitError(
            f"The draft model knows {draft.vocab_size} tokens and the served one "
            f"{served.vocab_size}. A draft model must share the served one's vocabulary: take a "
            "smaller model of the same family."
        )
    if draft.max_len < model_len:
        raise DraftUnfitError(
            f"The draft model's context has {draft.max_len} tokens and the served one's "
            f"{model_len}. Set the maximum model length to at most {draft.max_len}, or take "
            "another draft model."
        )


def draft_kv(config: EngineConfig, spec: ArchSpec, *, blocks: int) -> KvShape:
    """Return the shape of the draft model's KV cache."""
    return KvShape(
        layers=spec.layers,
        blocks=blocks,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        block_tokens=config.block_size,
    )


def draft_block_bytes(config: EngineConfig, draft: Decoder) -> int:
    """Return what a block costs in the draft model's KV cache."""
    return draft_kv(config, draft.spec, blocks=1).block_bytes(draft.place.dtype)


class DraftModel:
    """The second model with its KV cache; belongs to the loop alone."""

    def __init__(
        self, config: EngineConfig, decoder: Decoder, *, builder: BatchBuilder, kv: KvShape
    ) -> None:
        self._config = config
        self._device = decoder.place.device
        self._builder = builder
        self._runner = Runner(decoder, kv=kv, graph_rows=graph_rows(config, self._device))
        self._is_asleep = False

    def warm_up(self, step: StepInput) -> None:
        """Compute a step that nobody reads."""
        self._runner.run(step)

    def guess(self, chunks: list[Chunk]) -> None:
        """Compute the chunks' tokens, and overwrite the places kept in their drafts."""
        step = self._builder.build([replace(chunk, draft=[]) for chunk in chunks])
        guessing = [chunk for chunk in chunks if chunk.draft]
        logits_NV = self._run(step, samples=bool(guessing))
        if logits_NV is None:
            return
        sampling = [chunk for chunk in chunks if chunk.samples]
        rows = [index for index, chunk in enumerate(sampling) if chunk.draft]
        tokens = logits_NV[rows].argmax(-1).tolist()
        for place in range(max(len(chunk.draft) for chunk in guessing)):
            for chunk, token in zip(guessing, tokens, strict=True):
                chunk.draft[place] = token
            # The last guess is computed for its keys and values alone: if it is right, they stay.
            after = [_guess(c, place) for c in guessing]
            more = [index for index, c in enumerate(guessing) if len(c.draft) > place + 1]
            step = replace(self._builder.build(after), sample_at_N=np.array(more, dtype=np.int64))
            logits_NV = self._run(step, samples=bool(more))
            guessing = [guessing[index] for index in more]
            tokens = [] if logits_NV is None else logits_NV.argmax(-1).tolist()

    def scrub(self, blocks: list[int]) -> None:
        """Make every number in these KV blocks finite."""
        self._runner.scrub(blocks)

    def unfilled_bytes(self) -> int:
        """Return how much memory the KV cache will yet take."""
        return self._runner.unfilled_bytes()

    def release(self) -> None:
        """Give back the memory of weights and KV cache until `wake`."""
        self._runner.release()
        self._is_asleep = True

    def wake(self) -> None:
        """Read the weights again if they were released."""
        if self._is_asleep:
            self._runner.use(load_draft(self._config, self._device))
            self._is_asleep = False

    def _run(self, step: StepInput, *, samples: bool) -> Tensor | None:
        # Adapters belong to the served model; without them a guess is only worse.
        plain = replace(step, lora_slots_S=[0] * len(step.query_lens))
        return self._runner.run(plain if samples else replace(plain, sample_at_N=NOTHING))


def _guess(chunk: Chunk, place: int) -> Chunk:
    start = chunk.start + chunk.count + place
    return Chunk(chunk.seq, start, 0, samples=False, draft=[chunk.draft[place]])
