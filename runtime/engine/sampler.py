"""Chooses the next token of each sequence from its logits, for the whole batch at once.

A sequence's random number depends on its seed and position only, so what it draws does not depend
on its neighbours in the batch.
"""

# Shapes: N rows that sample, V vocabulary, C candidates kept of it, best first.
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.engine.api import SamplingParams, TokenLogprob
from mizzen.runtime.engine.draw_row import draw_row
from mizzen.runtime.engine.errors import GenerationFailedError, InvalidRequestError
from mizzen.runtime.engine.grammar import GrammarState
from mizzen.runtime.engine.penalties import apply_bias, apply_penalties, forbid_ends
from mizzen.runtime.engine.sequence import Sequence

# Sorting a whole vocabulary costs more than the model's step; nearly always far fewer tokens hold
# the wanted mass, and where they do not, the whole vocabulary is sorted after all.
CANDIDATES = 1024
NOT_FINITE = "The model's numbers overflowed on this input. Change the prompt or the adapter."


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row, and its log probability where it was asked for.

    A row in `failures` has no token: only its own request ends.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    failures: dict[int, Exception]


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens chosen on the device, on their way to the host."""

    token_ids_N: Tensor
    _plan: "_Plan"
    _raw_LV: Tensor | None  # log probabilities of the rows that want them
    _failures: dict[int, Exception]
    _on_host_2N: Tensor  # tokens, and whether their row's numbers are finite
    _arrival: torch.cuda.Event | None  # None: it is there

    def read(self) -> Sampled:
        """Wait for the tokens and return them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        token_ids, is_finite = self._on_host_2N.tolist()
        failures = dict(self._failures)
        for index in [i for i, good in enumerate(is_finite) if not good]:
            failures.setdefault(index, GenerationFailedError(NOT_FINITE))
        rows, wanted = self._plan.rows, self._plan.wants_logprobs
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        if self._raw_LV is not None:
            for values_V, index in zip(self._raw_LV, wanted, strict=True):
                count = rows[index].sampling.logprobs or 0
                logprobs[index] = _logprob(values_V, token_ids[index], count)
        return Sampled(token_ids, logprobs, failures)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the rows' parameters say; the same for as long as the rows are."""

    rows: list[Sequence]
    greedy_N: Tensor | None  # None: all rows are greedy
    temperature_N1: Tensor
    top_p_N1: Tensor
    top_k_N: Tensor
    log_min_p_N1: Tensor
    cut: Tensor  # which rows have top-p or top-k
    whole: Tensor  # and which have not
    has_min_p: bool
    seeds_N: np.ndarray
    wants_logprobs: list[int]
    logprob_scale_N1: Tensor | None  # of those; None: all of them are 1
    is_edited: bool  # some row changes its logits before the choice
    grammars: list[tuple[int, GrammarState]]


class Sampler:
    """Keeps the last batch's plan, because decoding asks for the same rows again and again."""

    def __init__(self, *, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids
        self._plan: _Plan | None = None

    @torch.inference_mode()
    def choose(self, logits_NV: Tensor, rows: list[Sequence], outputs: list[int]) -> Choice:
        """Choose the rows' next tokens, each after so many `outputs` of its sequence.

        A GPU is only told to: nothing here waits for it, unless a row has top-p or top-k. The
        float32 `logits_NV` may be changed.
        """
        plan = self._plan
        if plan is None or plan.rows != rows:
            plan = self._plan = _make_plan(rows, logits_NV.device)
        raw = _log_probs(logits_NV, plan) if plan.wants_logprobs else None
        if plan.is_edited:
            apply_bias(logits_NV, rows)
            apply_penalties(logits_NV, rows)
            forbid_ends(logits_NV, rows, self._eos)
        failures = _apply_grammars(logits_NV, plan.grammars)
        chosen_N = _argmax(logits_NV)
        # A row's maximum is NaN or infinite where any of its numbers is.
        is_finite_N = logits_NV.gather(-1, chosen_N[:, None])[:, 0].isfinite()
        if plan.greedy_N is not None:
            numbers_N = uniform_numbers(plan.seeds_N, np.array(outputs, dtype=np.uint64))
            if logits_NV.device.type == "cpu":
                _draw_rows(chosen_N, is_finite_N, logits_NV, plan, numbers_N)
            else:
                logits_NV.masked_fill_(~is_finite_N[:, None], 0)
                chosen_N = torch.where(plan.greedy_N, chosen_N, _draw(logits_NV, plan, numbers_N))
        # One transfer: each takes as long as any.
        both_2N = torch.stack((chosen_N, is_finite_N.long())).to("cpu", non_blocking=True)
        arrival = None
        if chosen_N.is_cuda:
            arrival = torch.cuda.Event()
            arrival.record()
        return Choice(chosen_N, plan, raw, failures, both_2N, arrival)


def uniform_numbers(seeds_N: np.ndarray, positions_N: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each (seed, position).

    Source: Steele et al., "Fast splittable pseudorandom number generators" (2014), splitmix64.
    """
    with np.errstate(over="ignore"):
        z = seeds_N + (positions_N + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    numbers: np.ndarray = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _make_plan(rows: list[Sequence], device: torch.device) -> _Plan:
    params = [seq.sampling for seq in rows]

    def column(values: Rows[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    greedy = [p.temperature == 0 for p in params]
    drawn = [p for p in params if p.temperature > 0]
    is_cut = [p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params]

    def rows_where(wanted: bool) -> Tensor:
        at = [i for i, cut in enumerate(is_cut) if cut == wanted]
        return torch.tensor(at, dtype=torch.int64, device=device)

    told = [p for p in params if p.logprobs is not None]
    scales = [(p.temperature or 1.0) if p.logprobs_as_drawn else 1.0 for p in told]
    return _Plan(
        rows=list(rows),
        greedy_N=torch.tensor(greedy, device=device) if drawn else None,
        temperature_N1=column([p.temperature or 1.0 for p in params]),
        top_p_N1=column([p.top_p for p in params]),
        top_k_N=torch.tensor([p.top_k for p in params], device=device),
        log_min_p_N1=column([p.min_p for p in params]).log(),
        cut=rows_where(True),
        whole=rows_where(False),
        has_min_p=any(p.min_p > 0 for p in drawn),
        seeds_N=np.array([seq.seed & (2**64 - 1) for seq in rows], dtype=np.uint64),
        wants_logprobs=[i for i, p in enumerate(params) if p.logprobs is not None],
        logprob_scale_N1=column(scales) if set(scales) - {1.0} else None,
        is_edited=any(is_edited(p) for p in params),
        grammars=[(i, seq.grammar) for i, seq in enumerate(rows) if seq.grammar],
    )


def is_edited(p: SamplingParams) -> bool:
    """Whether a row's logits are changed before its token is chosen."""
    return bool(
        p.logit_bias
        or p.presence_penalty
        or p.frequency_penalty
        or p.repetition_penalty != 1
        or p.min_tokens
    )


def needs_tokens(p: SamplingParams) -> bool:
    """Whether the host must know such a sequence's token before its next step can be launched.

    Because that step's logits are changed by it, or because the choice reads the device back.
    """
    is_cut = p.temperature > 0 and (p.top_k > 0 or p.top_p < 1)
    return is_edited(p) or is_cut or p.grammar is not None or p.logprobs is not None


def _argmax(logits_NV: Tensor) -> Tensor:
    if logits_NV.device.type != "cpu":
        return logits_NV.argmax(-1)
    # torch's own is not vectorised on a CPU: 20 times slower, for 32 rows longer than attention.
    return torch.from_numpy(logits_NV.numpy().argmax(-1))


def _apply_grammars(
    logits_NV: Tensor, grammars: list[tuple[int, GrammarState]]
) -> dict[int, Exception]:
    failures: dict[int, Exception] = {}
    for index, grammar in grammars:
        try:
            allowed_V = torch.from_numpy(grammar.allowed()[: logits_NV.shape[-1]])
        except InvalidRequestError as error:
            failures[index] = error
        else:
            logits_NV[index].masked_fill_(~allowed_V.to(logits_NV.device), -torch.inf)
    return failures


def _draw_rows(
    chosen_N: Tensor, is_finite_N: Tensor, logits_NV: Tensor, plan: _Plan, numbers_N: np.ndarray
) -> None:
    rows_NV = logits_NV.numpy()
    drawn = zip(plan.rows, is_finite_N.tolist(), numbers_N.tolist(), strict=True)
    for index, (seq, is_finite, number) in enumerate(drawn):
        if is_finite and seq.sampling.temperature > 0:
            chosen_N[index] = draw_row(rows_NV[index], seq.sampling, number)


def _draw(logits_NV: Tensor, plan: _Plan, numbers_N: np.ndarray) -> Tensor:
    """Return a token for each row by inverting its cumulative distribution."""
    numbers = torch.from_numpy(numbers_N.astype(np.float32))
    uniform_N1 = numbers.to(logits_NV.device, non_blocking=True)[:, None]
    scaled_NV = logits_NV / plan.temperature_N1
    if plan.has_min_p:
        floor_N1 = scaled_NV.amax(-1, keepdim=True) + plan.log_min_p_N1
        scaled_NV = scaled_NV.masked_fill(scaled_NV < floor_N1, -torch.inf)
    cut, whole = plan.cut, plan.whole
    if not len(cut):
        return _invert(scaled_NV.softmax(-1), uniform_N1)
    if not len(whole):
        return _draw_cut(scaled_NV, uniform_N1, plan.top_k_N, plan.top_p_N1)
    drawn_N = torch.empty(len(plan.rows), dtype=torch.int64, device=logits_NV.device)
    drawn_N[whole] = _invert(scaled_NV[whole].softmax(-1), uniform_N1[whole])
    drawn_N[cut] = _draw_cut(scaled_NV[cut], uniform_N1[cut], plan.top_k_N[cut], plan.top_p_N1[cut])
    return drawn_N


def _draw_cut(scaled_NV: Tensor, uniform_N1: Tensor, top_k_N: Tensor, top_p_N1: Tensor) -> Tensor:
    """Draw among each row's `top_k` best tokens, of those the fewest that hold `top_p`."""
    vocab = scaled_NV.shape[-1]
    top_k_N1 = torch.where(top_k_N > 0, top_k_N, vocab)[:, None].clamp(max=vocab)
    total_N1 = scaled_NV.logsumexp(-1, keepdim=True)
    count = min(CANDIDATES, vocab)
    best_NC, ids_NC = scaled_NV.topk(count, dim=-1)
    held_N1 = (best_NC - total_N1).exp().sum(-1, keepdim=True)
    if not bool(((top_k_N1 <= count) | (held_N1 >= top_p_N1)).all()):
        best_NC, ids_NC = scaled_NV.sort(dim=-1, descending=True)
    ranks_C = torch.arange(best_NC.shape[-1], device=scaled_NV.device)
    best_NC = best_NC.masked_fill(ranks_C >= top_k_N1, -torch.inf)
    # With top-k the mass is that of the k best; without, that of the whole vocabulary.
    mass_N1 = torch.where(top_k_N1 < vocab, best_NC.logsumexp(-1, keepdim=True), total_N1)
    probs_NC = (best_NC - mass_N1).exp()
    before_NC = probs_NC.cumsum(-1) - probs_NC
    probs_NC = probs_NC.masked_fill((before_NC >= top_p_N1) & (ranks_C > 0), 0.0)
    return ids_NC.gather(-1, _invert(probs_NC, uniform_N1)[:, None])[:, 0]


def _invert(probs_NC: Tensor, uniform_N1: Tensor) -> Tensor:
    """Return the first index whose cumulative share passes the row's number."""
    sums_NC = probs_NC.cumsum(-1)
    # A rounded product may reach the total itself, beyond the last token of any probability.
    total_N1 = sums_NC[:, -1:]
    below_total_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    target_N1 = torch.minimum(uniform_N1 * total_N1, below_total_N1)
    return torch.searchsorted(sums_NC, target_N1, right=True)[:, 0]


def _log_probs(logits_NV: Tensor, plan: _Plan) -> Tensor:
    """Return what is told of the rows that want it, before anything edits their logits."""
    told_NV = logits_NV[plan.wants_logprobs]
    if plan.logprob_scale_N1 is not None:
        told_NV = told_NV / plan.logprob_scale_N1
    return told_NV.log_softmax(-1)


def _logprob(values_V: Tensor, token_id: int, count: int) -> TokenLogprob:
    top: tuple[tuple[int, float], ...] = ()
    if count:
        best = values_V.topk(min(count, values_V.shape[-1]))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(values_V[token_id]), top=top)
