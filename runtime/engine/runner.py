"""Computes a step on one rank: weights, KV cache, attention. Knows no request and no scheduler."""

# Shapes: T packed tokens, S sequences, N tokens that are sampled from, V vocabulary.
import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.attention.base import KvShape, PagedBatch
from mizzen.runtime.attention.select import paged_attention
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.graphs import CudaCapture, DecodeGraphs
from mizzen.runtime.engine.heap import give_back_freed
from mizzen.runtime.engine.memory import untouched_bytes, zeros_when_touched
from mizzen.runtime.engine.unknown import fill_unknown
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora import Adapter, LoraBatch, LoraSlots


class Runner:
    """One rank's share of the model, with its share of the KV cache."""

    def __init__(self, decoder: Decoder, *, kv: KvShape, graph_rows: int = 0) -> None:
        """Allocate the KV cache; decodes of up to `graph_rows` sequences become CUDA graphs."""
        self._kv = kv
        self._graph_rows = graph_rows
        self._graphs: DecodeGraphs | None = None
        self._device = decoder.place.device
        self._lora = LoraSlots(decoder)
        self._hidden_ND: Tensor | None = None  # what the last logits were made of
        self._cache: Tensor | None = None
        self.use(decoder)

    def use(self, decoder: Decoder) -> None:
        """Compute with these weights from now on; adapters and what is cached stay."""
        self._decoder: Decoder | None = decoder
        if self._cache is None:
            self._cache = _allocate(self._kv, decoder.place.dtype, self._device)
        if self._graph_rows:
            # Those of earlier weights are of no more use: a graph holds addresses.
            self._graphs = DecodeGraphs(
                decoder,
                self._cache,
                max_rows=self._graph_rows,
                max_blocks=min(self._kv.blocks, -(-decoder.spec.max_len // self._kv.block_tokens)),
                capture=CudaCapture(),
            )

    @property
    def decoder(self) -> Decoder:
        """The weights that are served; they are there unless the engine sleeps."""
        assert self._decoder is not None, "asleep"
        return self._decoder

    def adapter_of(self, slot: int, tokens: int) -> LoraBatch | None:
        """Return what a slot's adapter adds to so many tokens; None for the base model."""
        return self._lora.batch([slot], [tokens])

    def unfilled_bytes(self) -> int:
        """Return what the KV cache will yet take: on a CPU it is held only where it is used."""
        cache = self._cache
        return untouched_bytes(cache) if cache is not None and cache.device.type == "cpu" else 0

    def release(self) -> None:
        """Give back the memory of weights and KV cache until `use`."""
        self._decoder = self._cache = self._graphs = self._hidden_ND = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_freed()

    @torch.inference_mode()
    def run(self, step: StepInput, before_N: Tensor | None = None) -> Tensor | None:
        """Return float32 logits_NV, or None if the step samples nothing.

        `before_N` are the tokens that the step before has sampled: those that this one lacks come
        from there, on the device, without waiting for them. With several ranks each must run the
        same step; each returns the same, but for stages between the first and the last.
        """
        decoder, cache = self._decoder, self._cache
        assert decoder is not None and cache is not None, "asleep"
        if self._graphs is not None and self._graphs.can_run(step):
            return self._pick(step, *self._graphs.run(step, before_N))
        batch = PagedBatch(
            query_lens=step.query_lens,
            context_lens=step.context_lens,
            block_tables_SB=self._to_device(step.block_tables_SB),
            slots_T=self._to_device(step.slots_T),
        )
        token_ids_T = self._to_device(step.token_ids_T)
        fill_unknown(token_ids_T, step, before_N)
        hidden_TD = decoder(
            token_ids_T,
            self._to_device(step.positions_T),
            paged_attention(cache, batch),
            self._lora.batch(step.lora_slots_S, step.query_lens),
        )
        if not len(step.sample_at_N):
            return None
        if len(step.sample_at_N) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD.index_select(0, self._to_device(step.sample_at_N))
        ending = decoder.finish(hidden_TD)
        if ending is None:
            return None
        self._hidden_ND = ending.hidden_ND
        return ending.logits_NV

    def _pick(self, step: StepInput, hidden_SD: Tensor, logits_SV: Tensor) -> Tensor | None:
        if not len(step.sample_at_N):
            return None
        if len(step.sample_at_N) < len(hidden_SD):
            at_N = self._to_device(step.sample_at_N)
            hidden_SD, logits_SV = hidden_SD.index_select(0, at_N), logits_SV.index_select(0, at_N)
        self._hidden_ND = hidden_SD
        return logits_SV

    def last_hidden(self, row: int) -> list[float]:
        """Return the hidden state behind a row of the last step's logits."""
        assert self._hidden_ND is not None, "a step comes first"
        values: list[float] = self._hidden_ND[row].float().tolist()
        return values

    def load_adapter(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot; raises BadAdapterError if it does not fit."""
        self._lora.load(slot, adapter)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot that no running sequence uses."""
        self._lora.clear(slot)

    @torch.inference_mode()
    def scrub(self, blocks: list[int]) -> None:
        """Make every number in these KV blocks finite; those that are stay as they are."""
        assert self._cache is not None, "asleep"
        ids = torch.tensor(blocks, device=self._device)
        self._cache[:, :, ids] = self._cache[:, :, ids].nan_to_num(0.0, 0.0, 0.0)

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _allocate(kv: KvShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return kv.allocate(dtype=dtype, device=device)
    sides = (2, kv.layers, kv.blocks, kv.block_tokens, kv.kv_heads, kv.head_dim)
    return zeros_when_touched(sides, dtype)
