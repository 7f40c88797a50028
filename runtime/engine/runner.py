"""Computes a step on one rank: weights, KV cache, attention. Knows no request and no scheduler."""

# Shapes: T packed tokens, S sequences, N tokens that are sampled from, V vocabulary.
import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.attention.base import KvShape, PagedBatch
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.decode_window import DecodeWindow, WindowAttend
from mizzen.runtime.engine.memory import zeros_when_touched
from mizzen.runtime.model.decoder import Attend, Decoder
from mizzen.runtime.model.lora import Adapter, LoraSlots

# The dense copy of what decodes may take this much, and this share of the cache's own size.
WINDOW_BYTES, WINDOW_SHARE = 1 << 30, 0.5


class Runner:
    """One rank's share of the model, with its share of the KV cache."""

    def __init__(self, decoder: Decoder, *, kv: KvShape, max_rows: int) -> None:
        self._decoder = decoder
        self._device = decoder.place.device
        self._lora = LoraSlots(decoder)
        self._cache = _allocate(kv, decoder.place.dtype, self._device)
        self._window: DecodeWindow | None = None
        if self._device.type == "cpu" and max_rows and decoder.spec.is_plain_causal:
            limit = min(WINDOW_BYTES, int(self._cache.nbytes * WINDOW_SHARE))
            self._window = DecodeWindow(self._cache, max_rows=max_rows, max_bytes=limit)

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
        attend = self._attend(batch, step.sequence_ids_S)
        hidden_TD = self._decoder(
            self._to_device(step.token_ids_T),
            self._to_device(step.positions_T),
            attend,
            self._lora.batch(step.lora_slots_S, step.query_lens),
        )
        if isinstance(attend, WindowAttend):
            attend.finish()
        if not len(step.sample_at_N):
            return None
        if len(step.sample_at_N) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD.index_select(0, self._to_device(step.sample_at_N))
        return self._decoder.logits(hidden_TD)

    def _attend(self, batch: PagedBatch, sequence_ids: list[int]) -> Attend:
        if self._window is None:
            return PagedSdpa(self._cache, batch)
        return self._window.attend(batch, sequence_ids)

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
    sides = (2, kv.layers, kv.blocks, kv.block_tokens, kv.kv_heads, kv.head_dim)
    return zeros_when_touched(sides, dtype)
