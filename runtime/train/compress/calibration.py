"""What flows through a decoder's layers when it reads some samples, one layer at a time.

Only one layer's statistics live at once, and a layer may be changed before the next one reads
what it makes of the samples.
"""

# Shapes: T packed tokens, D model width, I a linear's input width.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mizzen.runtime.model.block import Block
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.methods.token_loss import hidden_states
from mizzen.runtime.train.samples import Sample


class _Reached(Exception):
    """The first layer was reached; the rest need not be computed."""


class Flow:
    """The residual stream of some samples, carried through the layers by whoever asks."""

    def __init__(self, decoder: Decoder, samples: Sequence[Sample]) -> None:
        self._decoder = decoder
        self._streams = [_before_first_layer(decoder, [sample]) for sample in samples]

    def layers(self) -> Iterator[tuple[int, Block]]:
        """Yield each layer; its successor reads what it computes after the caller is done."""
        for index, block in enumerate(self._decoder.blocks):
            assert isinstance(block, Block)
            yield index, block
            with torch.no_grad():
                self._streams = [(block(x, *rest), *rest) for x, *rest in self._streams]

    @torch.no_grad()
    def read(self, block: Block, watched: Sequence[nn.Module], see: Callable[..., None]) -> None:
        """Let a layer read the samples; `see(module, x_TI)` gets what each watched module reads."""
        with _watching(watched, see):
            for x, *rest in self._streams:
                block(x, *rest)

    @torch.no_grad()
    def outputs(self, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the stream before and after a layer, sample by sample."""
        for x, *rest in self._streams:
            yield x, block(x, *rest)


@torch.no_grad()
def _before_first_layer(decoder: Decoder, samples: Sequence[Sample]) -> tuple[Any, ...]:
    caught: list[tuple[Any, ...]] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args)
        raise _Reached

    hook = decoder.blocks[0].register_forward_pre_hook(catch)
    try:
        hidden_states(decoder, pack(samples, decoder.place.device), None)
    except _Reached:
        pass
    finally:
        hook.remove()
    return caught[0]


@contextmanager
def _watching(modules: Sequence[nn.Module], see: Callable[..., None]) -> Iterator[None]:
    def tell(module: nn.Module, args: tuple[Any, ...]) -> None:
        see(module, args[0])

    hooks = [module.register_forward_pre_hook(tell) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
