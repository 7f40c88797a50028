"""Many adapters beside one base model: a step may use a different one for each sequence."""

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, R adapter rank.
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.errors import BadAdapterError
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora.adapter import Adapter, Pair, Site
from mizzen.runtime.model.lora.sites import site_shapes


class LoraSlots:
    """The adapters a served model holds, by slot. Slot 0 is the base model and always empty.

    Each adapter keeps its own rank and its own set of linears: nothing is padded.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._place = decoder.place
        self._layers = decoder.spec.layers
        self._held = range(decoder.layers.start, decoder.layers.stop)
        self._shapes = site_shapes(decoder)
        self._slots: dict[int, dict[Site, Pair]] = {}

    def load(self, slot: int, adapter: Adapter) -> None:
        """Put this rank's part of an adapter into a slot.

        Raises:
            BadAdapterError: it was trained for another model.
        """
        if slot < 1:
            raise ValueError("slot 0 is the base model")
        for site, pair in adapter.pairs.items():
            self._check(site, pair, adapter)
        self._slots[slot] = {
            site: self._prepare(site, pair, adapter)
            for site, pair in adapter.pairs.items()
            if site.layer in self._held
        }

    def clear(self, slot: int) -> None:
        """Empty a slot; its tensors live on while a step still uses them."""
        self._slots.pop(slot, None)

    def batch(self, slots: Sequence[int], query_lens: Sequence[int]) -> "LoraBatch | None":
        """Return the additions for packed sequences, each with its slot; None if all are base."""
        if not any(slots):
            return None
        rows: dict[int, list[int]] = {}
        start = 0
        for slot, query_len in zip(slots, query_lens, strict=True):
            rows.setdefault(slot, []).extend(range(start, start + query_len))
            start += query_len
        if len(rows) == 1:
            return LoraBatch([_Segment(self._slots[slots[0]], None)])
        device = self._place.device
        return LoraBatch(
            [
                _Segment(self._slots[slot], torch.tensor(rows[slot], device=device))
                for slot in sorted(rows)
                if slot
            ]
        )

    def _check(self, site: Site, pair: Pair, adapter: Adapter) -> None:
        if not self._fits(site, pair, rank=adapter.config.rank):
            raise BadAdapterError(
                f"The adapter's {site.target} of layer {site.layer} does not fit this model. "
                "Load it on the base model it was trained for."
            )

    def _fits(self, site: Site, pair: Pair, *, rank: int) -> bool:
        shape = self._shapes.get(site.target)
        if shape is None or site.layer >= self._layers:
            return False
        return (pair.a_RI.shape, pair.b_OR.shape) == (
            (rank, shape.width_in),
            (shape.width_out, rank),
        )

    def _prepare(self, site: Site, pair: Pair, adapter: Adapter) -> Pair:
        a_RI, b_OR = self._shapes[site.target].cut(pair)
        # The scale goes into B, so that serving does not pay for it.
        b_OR = b_OR.float() * adapter.config.scale
        device, dtype = self._place.device, self._place.dtype
        return Pair(a_RI.to(device, dtype).contiguous(), b_OR.to(device, dtype).contiguous())


class _Segment(NamedTuple):
    """The tokens of a step that use one adapter."""

    pairs: Mapping[Site, Pair]
    rows: Tensor | None  # None: all of them


class LoraBatch:
    """One step's adapters: each token gets the addition of its own, or none."""

    def __init__(self, segments: list[_Segment]) -> None:
        self._segments = segments

    def delta(self, layer: int, target: str, x_TI: Tensor) -> Tensor | None:
        """Return the additions of all tokens, zero for those without an adapter here."""
        site = Site(layer, target)
        out_TO = None
        for pairs, rows in self._segments:
            if (pair := pairs.get(site)) is None:
                continue
            if rows is None:
                return _apply(pair, x_TI)
            if out_TO is None:
                out_TO = x_TI.new_zeros(x_TI.shape[0], pair.b_OR.shape[0])
            out_TO.index_copy_(0, rows, _apply(pair, x_TI.index_select(0, rows)))
        return out_TO


def _apply(pair: Pair, x_TI: Tensor) -> Tensor:
    return F.linear(F.linear(x_TI, pair.a_RI), pair.b_OR)
