"""What the model thinks of tokens it is given: asked by trainers, done while nobody else asks.

Source: drawn ids instead of the likeliest ones, because those are a biased picture of a
distribution: Anshumann et al., 2025, "Sparse Logit Sampling" (arXiv 2503.16870).
"""

# Shapes: T tokens of the prompt, N = T - 1 of them that are predicted, V vocabulary, K drawn ids.
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import torch
from torch import Tensor

from mizzen.runtime.engine.api import PromptScores, ScoreRequest, TokenLogprob
from mizzen.runtime.engine.errors import GenerationFailedError
from mizzen.runtime.engine.idle import InterruptibleAttention
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta

# So long is waited for and computed in. Then it is better that the asker comes back, or that a
# gateway asks another replica.
WAIT_S = 20.0
_ROWS = 256  # of logits that live at once: they are the largest tensor here


class Scoring:
    """One prompt's scores: an `IdleWork`."""

    def __init__(
        self,
        request: ScoreRequest,
        decoder: Callable[[], Decoder],
        lora: Callable[[], LoraDelta | None],
    ) -> None:
        self.done: Future[PromptScores] = Future()
        self._request = request
        self._decoder = decoder
        self._lora = lora

    def do(self, is_wanted: Callable[[], bool]) -> None:
        """Compute the scores, and hand them out; see `IdleWork.do`."""
        if self.done.done():
            return
        scores = score(
            self._decoder(), self._request, self._lora(), lambda: is_wanted() or self.done.done()
        )
        with suppress(InvalidStateError):  # the asker has left at the last moment
            self.done.set_result(scores)

    def fail(self, error: Exception) -> None:
        """Hand out an error instead."""
        with suppress(InvalidStateError):
            self.done.set_exception(error)


@torch.inference_mode()
def score(
    decoder: Decoder,
    request: ScoreRequest,
    lora: LoraDelta | None,
    is_wanted: Callable[[], bool],
) -> PromptScores:
    """Return each token's log-probability after the tokens before it, and what else was asked for.

    Raises:
        Interrupted: somebody else wants the model.
        GenerationFailedError: the model's numbers are not finite here.
    """
    device = decoder.place.device
    token_ids_T = torch.tensor(request.token_ids, device=device)
    positions_T = torch.arange(len(token_ids_T), device=device)
    attend = InterruptibleAttention([len(token_ids_T)], is_wanted)
    hidden_TD = decoder(token_ids_T, positions_T, attend, lora)
    # On the CPU, whose generator gives the same numbers wherever the model runs.
    random = torch.Generator().manual_seed(request.seed)
    logprobs: list[TokenLogprob] = []
    drawn: list[tuple[int, ...]] = []
    parts = zip(hidden_TD[:-1].split(_ROWS), token_ids_T[1:].split(_ROWS), strict=True)
    for hidden_ND, target_N in parts:
        attend.look_up()
        log_probs_NV = (decoder.logits(hidden_ND) / request.temperature).log_softmax(-1)
        chosen_N = log_probs_NV.gather(1, target_N[:, None])[:, 0]
        if not chosen_N.isfinite().all():
            raise GenerationFailedError("The model's numbers overflowed. Change the prompt.")
        logprobs += _with_alternatives(log_probs_NV, target_N, chosen_N, request.alternatives)
        drawn += _draw(log_probs_NV, request.samples, random)
    return PromptScores(logprobs=tuple(logprobs), drawn=tuple(drawn))


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
