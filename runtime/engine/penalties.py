"""Changes of logits that a request asks for before its token is chosen. All edit in place."""

# Shapes: N rows that sample, V vocabulary.
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from mizzen.runtime.engine.sequence import Sequence


def apply_bias(logits_NV: Tensor, rows: list[Sequence]) -> None:
    """Add each row's `logit_bias`."""
    for index, seq in enumerate(rows):
        bias = seq.sampling.logit_bias
        if bias:
            ids = _ids(bias, logits_NV)
            values = torch.tensor(list(bias.values()), dtype=torch.float32)
            logits_NV[index, ids] += values.to(logits_NV.device)


def apply_penalties(logits_NV: Tensor, rows: list[Sequence]) -> None:
    """Make seen tokens less likely.

    Repetition counts the prompt too (as Keskar et al., CTRL, 2019, and transformers); presence and
    frequency count the output only (as OpenAI).
    """
    for logits_V, seq in zip(logits_NV, rows, strict=True):
        params = seq.sampling
        if params.repetition_penalty != 1:
            ids = _ids(set(seq.token_ids), logits_NV)
            seen = logits_V[ids]
            factor = params.repetition_penalty
            logits_V[ids] = torch.where(seen > 0, seen / factor, seen * factor)
        if (params.presence_penalty or params.frequency_penalty) and seq.output_tokens:
            counts = Counter(seq.token_ids[seq.prompt_tokens :])
            ids = _ids(counts, logits_NV)
            times = torch.tensor(list(counts.values()), dtype=torch.float32).to(logits_NV.device)
            logits_V[ids] -= params.presence_penalty + params.frequency_penalty * times


def forbid_ends(logits_NV: Tensor, rows: list[Sequence], eos: tuple[int, ...]) -> None:
    """Keep rows below their `min_tokens` from ending."""
    for index, seq in enumerate(rows):
        if seq.output_tokens < seq.sampling.min_tokens:
            ids = _ids({*eos, *seq.sampling.stop_token_ids}, logits_NV)
            logits_NV[index, ids] = -torch.inf


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)
