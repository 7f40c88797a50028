"""Which weights move: all of them, or a low-rank addition beside frozen ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import (
    PATHS,
    Adapter,
    LoraConfig,
    Pair,
    TrainableLora,
    save_adapter,
    site_shapes,
)
from mizzen.runtime.model.packed import Quantization
from mizzen.runtime.model.rounding import GROUP
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.shard import check_trainable, even_span, head_shard
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.device import choose_dtype, products_in
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.export import check_exportable, published_dtype, write_model
from mizzen.runtime.train.trainable import NamedView, Trainable, full_views, views_of

Weights = Iterable[tuple[str, Tensor]]


class Adapted(Protocol):
    """A model made ready to be trained in one of the two ways."""

    trainable: Trainable

    def precision(self) -> AbstractContextManager[object]:
        """Return what the decoder computes inside of, forwards."""
        ...

    def set_training(self, is_training: bool) -> None:
        """Switch what differs between training and evaluation, such as dropout."""
        ...

    def round_for_publishing(self) -> None:
        """Give the weights the values that will be published: the gate must see those."""
        ...

    def write(
        self, folder: Path, weights: Weights, *, base_model: Path, tokenizer: Tokenizer
    ) -> None:
        """Write the artifact's files, of these whole tensors by their checkpoint names."""
        ...


class FullAdaptation:
    """Every weight moves. They stay float32; bfloat16 is for the matrix products alone."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        heads: Sequence[NamedView],
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        check_exportable(decoder.spec)
        self.trainable = Trainable(
            full_views(decoder), heads=heads, lora=None, weight_decay=weight_decay
        )
        self._decoder = decoder
        self._dtype = dtype

    def precision(self) -> AbstractContextManager[object]:
        """Return autocast where products are in bfloat16."""
        return products_in(self._dtype, self._decoder.place.device)

    def set_training(self, is_training: bool) -> None:
        """Tell the decoder."""
        self._decoder.train(is_training)

    @torch.no_grad()
    def round_for_publishing(self) -> None:
        """Round to the published type and back."""
        dtype = published_dtype(self._decoder.spec)
        for _, tensor in self.trainable.weights():
            tensor.copy_(tensor.to(dtype))

    def write(
        self, folder: Path, weights: Weights, *, base_model: Path, tokenizer: Tokenizer
    ) -> None:
        """Write a complete model."""
        write_model(
            folder,
            weights,
            spec=self._decoder.spec,
            base_model=base_model,
            tokenizer=tokenizer,
        )


class LoraAdaptation:
    """A low-rank addition moves, in float32, whatever type the frozen weights are kept in."""

    def __init__(
        self, lora: TrainableLora, *, heads: Sequence[NamedView], weight_decay: float
    ) -> None:
        self._lora = lora
        views = views_of(lora.shards(), ranks=lora.ranks)
        self.trainable = Trainable(views, heads=heads, lora=lora, weight_decay=weight_decay)

    def precision(self) -> AbstractContextManager[object]:
        """Return nothing special: the decoder's own type decides."""
        return nullcontext()

    def set_training(self, is_training: bool) -> None:
        """Tell the adapter: dropout is its own."""
        self._lora.train(is_training)

    def round_for_publishing(self) -> None:
        """Do nothing: an adapter is published in the type it was trained in."""

    def write(
        self, folder: Path, weights: Weights, *, base_model: Path, tokenizer: Tokenizer
    ) -> None:
        """Write the adapter in PEFT's layout; the tokenizer stays the base model's."""
        named = dict(weights)
        pairs = {
            site: Pair(named[site.tensor_name("A")], named[site.tensor_name("B")])
            for site, _ in self._lora.pairs()
        }
        adapter = Adapter(self._lora.config, pairs)
        save_adapter(folder, adapter, base_model=str(base_model))


def adapt(
    decoder: Decoder, config: TrainConfig, *, heads: Sequence[NamedView], dtype: torch.dtype
) -> Adapted:
    """Make a decoder trainable in the way the job asks for, and a method's heads with it.

    Raises:
        JobConfigError: the job names linears there are not, or its result could not be written.
        TensorParallelInvalidError: ranks would share a KV head.
    """
    check_trainable(kv_heads=decoder.spec.kv_heads, size=decoder.group.size)
    weight_decay = config.hyperparameters.weight_decay
    if config.adaptation.type == "full":
        return FullAdaptation(decoder, heads=heads, weight_decay=weight_decay, dtype=dtype)
    lora = build_lora(decoder, config)
    return LoraAdaptation(lora, heads=heads, weight_decay=weight_decay)


def build_lora(decoder: Decoder, config: TrainConfig) -> TrainableLora:
    """Return the adapter that the job trains, as it is before the first step.

    Raises:
        JobConfigError: the job names linears there are not.
    """
    adaptation = config.adaptation
    targets = tuple(PATHS) if adaptation.targets == "all-linear" else adaptation.targets
    # A feed-forward without a gate has nothing to adapt there.
    sites = site_shapes(decoder)
    if unknown := sorted(set(targets) - PATHS.keys()):
        raise JobConfigError(
            f"adaptation.targets names {', '.join(unknown)}. "
            f"Use all-linear, or some of {', '.join(PATHS)}."
        )
    rules = LoraConfig(
        rank=adaptation.rank,
        alpha=adaptation.alpha,
        dropout=adaptation.dropout,
        targets=tuple(target for target in targets if target in sites),
    )
    return TrainableLora(decoder, rules, seed=config.hyperparameters.seed)


def load_base(config: TrainConfig, device: torch.device, group: RankGroup | None = None) -> Decoder:
    """Read the base as it is trained, rounded where the adapter learns beside a rounded one.

    Raises:
        BadModelError: the checkpoint is not one we can use.
    """
    return load_decoder(
        config.base_model,
        dtype=load_dtype(config, device),
        device=device,
        group=group,
        quantization=frozen_bits(config),
        is_trained_beside=True,
    )


def load_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the type the base weights are kept in; weights that move are always float32."""
    if config.adaptation.type == "full":
        return torch.float32
    return choose_dtype(config.hyperparameters.dtype, device)


def frozen_bits(config: TrainConfig) -> Quantization:
    """Return in how many bits the base weights are kept."""
    adaptation = config.adaptation
    return adaptation.quantization if adaptation.type == "qlora" else "none"


def check_groups(config: TrainConfig, spec: ArchSpec) -> None:
    """Refuse int4 where ranks would cut groups of inputs that share a scale.

    Raises:
        QuantizationUnsupportedError: on some rank the inputs are no multiple of a group.
    """
    size = config.parallelism.tensor
    if size == 1 or frozen_bits(config) != "int4":
        return
    check_trainable(kv_heads=spec.kv_heads, size=size)
    heads = (
        head_shard(heads=spec.heads, kv_heads=spec.kv_heads, rank=rank, size=size)
        for rank in range(size)
    )
    hidden = (even_span(spec.intermediate_size, rank=rank, size=size) for rank in range(size))
    inputs = {
        "o_proj": {shard.queries.size * spec.head_dim for shard in heads},
        "down_proj": {span.size for span in hidden},
    }
    for name, widths in inputs.items():
        if odd := sorted(width for width in widths if width % GROUP):
            raise QuantizationUnsupportedError(
                f"Over {size} ranks some have {' or '.join(map(str, odd))} of the inputs of "
                f"{name}: int4 needs multiples of {GROUP}. Set adaptation.quantization to int8, "
                "or change parallelism.tensor."
            )
