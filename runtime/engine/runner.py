"""Computes a step on one rank: weights, KV cache, attention. Knows no request and no scheduler."""

# Shapes: T packed tokens, S sequences, N tokens that are sampled from, V vocabulary.
import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.attention.base import KvShape, PagedBatch
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora import Adapter, LoraSlots


class Runner:
    """One rank's share of the model, with its share of the KV cache."""

    def __init__(self, decoder: Decoder, *, kv: KvShape) -> None:
        self._decoder = decoder
        self._device = decoder.place.device
        self._kv = kv
        self._lora = LoraSlots(decoder)
        self._cache = _allocate(kv, decoder.place.dtype, self._device)

    @torch.inference_mode()
    def run(self, step: StepInput) -> Tensor | None:
        """Return float32 logits_NV, or None if the step samples nothing.

        With several ranks each must run the same step; each returns the same.
        """
        batch = PagedBatch(
            query_lens=step.query_lens,
            context_lens=step.context_lens,
            block_tables_SB=self._to_device(step.block_tables_SB),
            slots_T=self._to_device(step.slots_T),
        )
        hidden_TD = self._decoder(
            self._to_device(step.token_ids_T),
            self._to_device(step.positions_T),
            PagedSdpa(self._cache, batch),
            self._lora.batch(step.lora_slots_S, step.query_lens),
        )
        if not len(step.sample_at_N):
            return None
        if len(step.sample_at_N) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD.index_select(0, self._to_device(step.sample_at_N))
        return self._decoder.logits(hidden_TD)

    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot; raises BadAdapterError if it does not fit."""
        self._lora.load(slot, adapter)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot that no running sequence uses."""
        self._lora.clear(slot)

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _allocate(kv: KvShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return kv.allocate(dtype=dtype, device=device)
    # The same zeros, but mapped only when a block is first used: a large cache costs neither
    # start-up time nor memory until it is needed.
    count = kv.blocks * kv.block_bytes(dtype)
    sides = (2, kv.layers, kv.blocks, kv.block_tokens, kv.kv_heads, kv.head_dim)
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(sides)
