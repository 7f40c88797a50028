"""Does a loan fit beside what its replica holds? What a step keeps is seen on a few tokens.

A pod of its own that runs out of memory costs a job one try. A replica would be ended with all its
requests, so here activations count too, and so does the largest step of the replica itself.
"""

# Shapes: T packed tokens.
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora import TrainableLora
from mizzen.runtime.train.adaptation import build_lora
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.errors import LoanDoesNotFitError
from mizzen.runtime.train.giving_way import GivingWay
from mizzen.runtime.train.memory import memory_limit, need_of
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.token_loss import LOGIT_ROWS
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.surroundings import Resident
from mizzen.runtime.train.together import Together

log = logging.getLogger(__name__)

_PROBE_TOKENS = 64
# What is taken for what is kept, by the allocator. On a CPU glibc leaves gaps: in steps of 512 to
# 2,048 tokens of SmolLM2-135M the process grew by 1.5 to 1.7 times what was kept in bfloat16 and by
# 1.8 to 2.1 in float32, with logits and the largest matrix, which are counted apart here.
_TAKEN_RATIO = {"cpu": 1.75, "cuda": 1.1}
_LOGIT_BYTES = 3 * 4  # of each: itself, its probability and its gradient


@dataclass(frozen=True, slots=True)
class Activations:
    """What is kept of samples between the way forwards and the way back, in bytes."""

    per_token: float
    per_pair: float  # of tokens of one sample: some attention keeps its scores

    def of(self, lens: Iterable[int]) -> int:
        """Return what samples of these lengths keep when they run at once."""
        return int(sum(self.per_token * n + self.per_pair * n * n for n in lens))


def fit_loan(
    config: TrainConfig, resident: Resident, method: Method, data: Prepared, ranks: Together
) -> int:
    """Return how many samples can run at once: as many as the job asks for, or a half of a half.

    Each rank looks at its own memory, and the least of them counts.

    Raises:
        LoanDoesNotFitError: not even the longest sample fits alone.
        YieldRequested: somebody asked to stop.
    """
    decoder = resident.decoder
    lora = build_lora(decoder, config)
    adapter = need_of((), lora.parameters()).total
    kept = watch_activations(method, resident, lora)
    longest = max(len(item) for part in data.train for item in part)
    resident.give_way()  # what a request takes while it runs is not held for good
    spare = resident.spare_bytes() - _largest_step(kept, resident)
    at_once = config.hyperparameters.micro_batch
    while (step := _step_bytes(kept, decoder, [longest] * at_once)) + adapter > spare:
        at_once //= 2
        if at_once == 0:
            break
    at_once = ranks.least(at_once)
    if at_once == 0:
        raise LoanDoesNotFitError(
            adapter_bytes=adapter,
            step_bytes=step,
            tokens=longest,
            spare_bytes=max(0, spare),
            limit_bytes=memory_limit(decoder.place.device),
        )
    if at_once < config.hyperparameters.micro_batch:
        log.warning("The replica has memory for %d samples at once.", at_once)
    return at_once


def watch_activations(method: Method, resident: Resident, lora: TrainableLora) -> Activations:
    """Return what autograd keeps, from two samples of which one is twice as long."""
    short = min(_PROBE_TOKENS, resident.decoder.spec.max_len // 2)
    one, two = (_kept_bytes(method, resident, lora, tokens) for tokens in (short, 2 * short))
    per_pair = max(0.0, (two - 2 * one) / (2 * short * short))
    return Activations(per_token=one / short - per_pair * short, per_pair=per_pair)


def _kept_bytes(method: Method, resident: Resident, lora: TrainableLora, tokens: int) -> int:
    decoder, held = resident.decoder, dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_T = np.arange(tokens, dtype=np.int32) % decoder.spec.vocab_size
    sample = Sample(ids_T, np.arange(tokens) > 0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = method.loss_sum(decoder, [sample], GivingWay(lora, resident.give_way))
    for weight in (*decoder.parameters(), *decoder.buffers(), *lora.parameters()):
        held.pop(weight.untyped_storage().data_ptr(), None)
    del loss  # it kept what was noted, so that no place was noted twice
    return sum(held.values())


def _step_bytes(kept: Activations, decoder: Decoder, lens: Sequence[int]) -> int:
    """Return what a micro-batch takes at most."""
    spec, place = decoder.spec, decoder.place
    activations = kept.of(lens)
    # On the way back a layer's gradients are as large as what was kept of it.
    activations += activations // spec.layers
    rows = min(LOGIT_ROWS, sum(lens))
    # Packed weights are laid out again one by one, the largest of them among the rest.
    empty = Decoder(spec, replace(place, device=torch.device("meta")))
    matrix = max(part.weight.nbytes for part in empty.parts())
    logits = rows * spec.vocab_size * _LOGIT_BYTES
    return int(activations * _TAKEN_RATIO[place.device.type]) + matrix + logits


def _largest_step(kept: Activations, resident: Resident) -> int:
    """Return what the replica takes for its own largest step: no more than one layer is kept."""
    decoder = resident.decoder
    return kept.of([resident.step_tokens]) // decoder.spec.layers
