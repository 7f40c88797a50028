"""What the model thinks of tokens it is given: asked by trainers, done while nobody else asks.

Source: drawn ids instead of the likeliest ones, because those are a biased picture of a
distribution: Anshumann et al., 2025, "Sparse Logit Sampling" (arXiv 2503.16870).
"""

# Shapes: T tokens of the prompt, N of them that others follow, V vocabulary, K drawn ids.
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import torch
from torch import Tensor

from mizzen.runtime.engine.api import PromptScores, ScoreRequest, TokenLogprob
from mizzen.runtime.engine.batch import lone_step
from mizzen.runtime.engine.errors import GenerationFailedError
from mizzen.runtime.engine.idle import Interrupted, InterruptibleAttention
from mizzen.runtime.engine.ranks import ModelRanks
from mizzen.runtime.engine.scheduler import Scheduler
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta

# So long is waited for and computed in. Then it is better that the asker comes back, or that a
# gateway asks another replica.
WAIT_S = 20.0
_ROWS = 256  # of logits that live at once: they are the largest tensor here
# What a request waits for at most where a step cannot be given up: on a GPU so few tokens take
# little longer than one does.
_STEP_TOKENS = {"cpu": 32, "cuda": 256}

IsWanted = Callable[[], bool]
# Yields logits_NV of the tokens before the last, in order, some at a time.
Rows = Callable[[IsWanted], Iterator[Tensor]]


class Scoring:
    """One prompt's scores: an `IdleWork`."""

    def __init__(self, request: ScoreRequest, rows: Rows) -> None:
        self.done: Future[PromptScores] = Future()
        self._request = request
        self._rows = rows

    def do(self, is_wanted: IsWanted) -> None:
        """Compute the scores, and hand them out; see `IdleWork.do`."""
        if self.done.done():
            return
        rows = self._rows(lambda: is_wanted() or self.done.done())
        scores = score(self._request, rows)
        with suppress(InvalidStateError):  # the asker has left at the last moment
            self.done.set_result(scores)

    def fail(self, error: Exception) -> None:
        """Hand out an error instead."""
        with suppress(InvalidStateError):
            self.done.set_exception(error)


def rows_of_whole(
    decoder: Decoder, request: ScoreRequest, lora: LoraDelta | None, is_wanted: IsWanted
) -> Iterator[Tensor]:
    """Yield the rows of a model that this rank holds whole, without its KV cache.

    Raises:
        Interrupted: somebody else wants the model.
    """
    device = decoder.place.device
    token_ids_T = torch.tensor(request.token_ids, device=device)
    positions_T = torch.arange(len(token_ids_T), device=device)
    attend = InterruptibleAttention([len(token_ids_T)], is_wanted)
    hidden_TD = decoder(token_ids_T, positions_T, attend, lora)
    for hidden_ND in hidden_TD[:-1].split(_ROWS):
        attend.look_up()
        yield decoder.logits(hidden_ND)


def rows_of_ranks(
    ranks: ModelRanks,
    scheduler: Scheduler,
    request: ScoreRequest,
    lora_slot: int,
    is_wanted: IsWanted,
) -> Iterator[Tensor]:
    """Yield the rows of a model that ranks share, by steps that all of them take.

    A step that has begun is ended: the ranks wait for each other in it.

    Raises:
        Interrupted: somebody else wants the model.
        GenerationFailedError: the model's numbers are not finite here.
    """
    tokens = request.token_ids[:-1]
    pool = scheduler.pool
    blocks = pool.lend(pool.blocks_for(len(tokens)))
    device_type = ranks.resident().place.device.type
    size = min(_STEP_TOKENS[device_type], scheduler.limits.step_tokens)
    for start in range(0, len(tokens), size):
        if is_wanted():
            raise Interrupted
        step = lone_step(tokens[start : start + size], start, blocks, pool.block_size, lora_slot)
        logits_NV = ranks.run(step)
        assert logits_NV is not None, "every token of the step was asked for"
        if not logits_NV.isfinite().all():
            # Masked keys are multiplied too, by zero: whoever gets these blocks next would see it.
            ranks.scrub(blocks)
            raise _overflow()
        yield logits_NV


@torch.inference_mode()
def score(request: ScoreRequest, rows: Iterator[Tensor]) -> PromptScores:
    """Return each token's log-probability after the tokens before it, and what else was asked for.

    Raises:
        GenerationFailedError: the model's numbers are not finite here.
    """
    # On the CPU, whose generator gives the same numbers wherever the model runs.
    random = torch.Generator().manual_seed(request.seed)
    logprobs: list[TokenLogprob] = []
    drawn: list[tuple[int, ...]] = []
    for logits_NV in rows:
        begin = 1 + len(logprobs)
        targets = request.token_ids[begin : begin + len(logits_NV)]
        target_N = torch.tensor(targets, dtype=torch.int64, device=logits_NV.device)
        log_probs_NV = (logits_NV / request.temperature).log_softmax(-1)
        chosen_N = log_probs_NV.gather(1, target_N[:, None])[:, 0]
        if not chosen_N.isfinite().all():
            raise _overflow()
        logprobs += _with_alternatives(log_probs_NV, target_N, chosen_N, request.alternatives)
        drawn += _draw(log_probs_NV, request.samples, random)
    return PromptScores(logprobs=tuple(logprobs), drawn=tuple(drawn))


def _overflow() -> GenerationFailedError:
    return GenerationFailedError("The model's numbers overflowed. Change the prompt.")


def _with_alternatives(
    log_probs_NV: Tensor, target_N: Tensor, chosen_N: Tensor, count: int
) -> list[TokenLogprob]:
    best = log_probs_NV.topk(min(count, log_probs_NV.shape[1]))
    rows = zip(
        target_N.tolist(),
        chosen_N.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token_id=token_id, logprob=value, top=tuple(zip(ids, values, strict=True)))
        for token_id, value, ids, values in rows
    ]


def _draw(log_probs_NV: Tensor, samples: int, random: torch.Generator) -> list[tuple[int, ...]]:
    if not samples:
        return []
    probabilities = log_probs_NV.exp().cpu()
    drawn_NK = torch.multinomial(probabilities, samples, replacement=True, generator=random)
    return [tuple(row) for row in drawn_NK.tolist()]
