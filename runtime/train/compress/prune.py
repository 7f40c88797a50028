"""Parts left out of a model: whole layers, hidden units, heads, or two of each four weights.

What is left out is what the samples use least. The result is worse until it is trained: give it
to a distill job whose teacher is the model it was made from.

Sources: layers by block influence (Men et al., 2024); units and heads by the size of what they
add, input norm times weight norm (Sun et al., 2023, taken per structure).
"""

# Shapes: T packed tokens, I a linear's inputs, O its outputs, F hidden units, H heads, d head
# dimension.
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.block import Block
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.layers import RowLinear
from mizzen.runtime.train.compress.calibration import Flow
from mizzen.runtime.train.compress.candidate import Candidate
from mizzen.runtime.train.compress.quantize import linears, matrices
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.options import Prune
from mizzen.runtime.train.samples import Sample

log = logging.getLogger(__name__)

_UNIT_MULTIPLE = 32  # matmuls and quantization groups want such widths
# What config.json has to say of a model that was cut so.
_TOLD_BY = {"depth": "num_hidden_layers", "width": "intermediate_size", "heads": "head_dim"}


def prune(decoder: Decoder, rules: Prune, samples: Sequence[Sample]) -> Candidate:
    """Return the smaller model.

    Raises:
        JobConfigError: as `smaller_spec` does.
    """
    smaller = smaller_spec(decoder.spec, rules)
    if rules.kind == "nm24":
        log.warning(
            "2:4 sparsity has no kernel in current engines and ruins small models: SmolLM2-135M "
            "went from perplexity 14.7 to 1845. Prefer depth or width, and distill afterwards."
        )
        return _half_of_each_four(decoder)
    flow = Flow(decoder, samples[: rules.calibration_samples])
    cuts = {"depth": _fewer_layers, "width": _fewer_units, "heads": _fewer_heads}
    return cuts[rules.kind](decoder, flow, smaller)


def smaller_spec(spec: ArchSpec, rules: Prune) -> ArchSpec:
    """Return what is left of a model, known before its weights are.

    Raises:
        JobConfigError: nothing would be left, or everything; or the family's files could not
            say what is.
    """
    _check_told(spec, rules.kind)
    if rules.kind == "depth":
        layers = _keep(spec.layers, rules.ratio, of="layers")
        return replace(spec, layers=layers, query_scales=spec.query_scales[:layers])
    if rules.kind == "width":
        units = spec.intermediate_size
        size = _keep(units, rules.ratio, of="hidden units", multiple=_UNIT_MULTIPLE)
        return replace(spec, intermediate_size=size)
    if rules.kind == "heads":
        size = _keep(spec.kv_heads, rules.ratio, of="KV heads")
        return replace(spec, heads=size * (spec.heads // spec.kv_heads), kv_heads=size)
    _check_fours(spec)
    return spec  # zeros stay in their places


def _check_told(spec: ArchSpec, kind: str) -> None:
    implied = family_named(spec.family).implied
    name = _TOLD_BY.get(kind)
    if name in implied:
        others = [other for other, told_by in _TOLD_BY.items() if told_by not in implied]
        raise JobConfigError(
            f"A model of family {spec.family} cannot be cut by prune.kind {kind}: its config.json "
            f"has no word for {name}, which is {implied[name]} to all who read it. Set prune.kind "
            f"to {' or '.join(others)}."
        )


def _check_fours(spec: ArchSpec) -> None:
    widths = (spec.hidden_size, spec.heads * spec.head_dim, spec.intermediate_size)
    if odd := [width for width in widths if width % 4]:
        raise JobConfigError(
            f"Matrices with {odd[0]} inputs do not divide into fours. Set prune.kind to depth."
        )


@torch.no_grad()
def _half_of_each_four(decoder: Decoder) -> Candidate:
    for block in decoder.blocks:
        assert isinstance(block, Block)
        for shard in (shard for linear in linears(block) for shard in matrices(linear)):
            fours = shard.tensor.unflatten(1, (-1, 4))
            smaller = fours.abs().argsort(-1)[..., :2]
            shard.tensor.copy_(fours.scatter(-1, smaller, 0.0).flatten(1))
    return Candidate(spec=decoder.spec, weights=dict(_tensors(decoder)))


def _fewer_layers(decoder: Decoder, flow: Flow, smaller: ArchSpec) -> Candidate:
    influence = []
    for _, block in flow.layers():
        turns = [1 - F.cosine_similarity(x, y).mean() for x, y in flow.outputs(block)]
        influence.append(torch.stack(turns).mean())
    kept = _best(torch.stack(influence), smaller.layers)
    log.info("Keeping the layers %s.", kept)
    weights = {}
    for name, tensor in _tensors(decoder):
        head, dot, tail = name.partition("model.layers.")
        if not dot:
            weights[name] = tensor
            continue
        layer, rest = tail.split(".", 1)
        if int(layer) in kept:
            place = kept.index(int(layer))
            if is_scaled_by_layer(decoder.spec, rest):
                scales = decoder.spec.query_scales
                tensor = tensor * (scales[int(layer)] / scales[place])
            weights[f"{head}{dot}{place}.{rest}"] = tensor
    windows = tuple(decoder.spec.windows[layer] for layer in kept) if decoder.spec.windows else ()
    changes = {"num_hidden_layers": len(kept), "layer_types": _layer_types(windows)}
    return Candidate(spec=replace(smaller, windows=windows), weights=weights, changes=changes)


def is_scaled_by_layer(spec: ArchSpec, path: str) -> bool:
    """Does a tensor make queries whose scale follows from their layer's number?

    In another place it must make up for the scale of that place.
    """
    return len(set(spec.query_scales)) > 1 and "self_attn.q_proj." in path


def _layer_types(windows: Sequence[int | None]) -> list[str] | None:
    """Return how config.json says which layers have a window; None where there are none.

    Its `max_window_layers` counts layers of the base, of which some are gone.
    """
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return kinds or None


def _fewer_units(decoder: Decoder, flow: Flow, smaller: ArchSpec) -> Candidate:
    size = smaller.intermediate_size
    weights = dict(_tensors(decoder))
    for layer, block in flow.layers():
        kept = torch.tensor(_best(_added_by(flow, block, block.feed_forward.down), size))
        _cut(weights, f"model.layers.{layer}.mlp", ("gate_proj", "up_proj"), "down_proj", kept)
    return Candidate(spec=smaller, weights=weights, changes={"intermediate_size": size})


def _fewer_heads(decoder: Decoder, flow: Flow, smaller: ArchSpec) -> Candidate:
    """Leave out KV heads, each with the query heads that read it."""
    spec = decoder.spec
    size, group = smaller.kv_heads, spec.heads // spec.kv_heads
    weights = dict(_tensors(decoder))
    for layer, block in flow.layers():
        added = _added_by(flow, block, block.attention.out)
        kept = torch.tensor(_best(added.unflatten(0, (spec.kv_heads, -1)).sum(1), size))
        prefix = f"model.layers.{layer}.self_attn"
        of_queries = _spread(kept, group * spec.head_dim)
        _cut(weights, prefix, ("q_proj",), "o_proj", of_queries)
        _cut(weights, prefix, ("k_proj", "v_proj"), None, _spread(kept, spec.head_dim))
    return Candidate(spec=smaller, weights=weights, changes=_head_changes(smaller))


def _head_changes(spec: ArchSpec) -> dict[str, int]:
    return {
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        # Without it readers divide the width by the heads that are left.
        "head_dim": spec.head_dim,
    }


def _added_by(flow: Flow, block: Block, out: RowLinear) -> Tensor:
    """Return how much each input of a layer's last matrix adds to the stream, squared."""
    squares: list[Tensor] = []
    flow.read(block, [out], lambda _, x_TI: squares.append(x_TI.float().square().sum(0)))
    return torch.stack(squares).sum(0) * out.weight.detach().float().square().sum(0)


def _cut(
    weights: dict[str, Tensor],
    prefix: str,
    readers: Sequence[str],
    writer: str | None,
    kept: Tensor,
) -> None:
    """Keep some outputs of the matrices that come before, and those inputs of the one after."""
    for name in (f"{prefix}.{reader}.{kind}" for reader in readers for kind in ("weight", "bias")):
        if name in weights:
            weights[name] = weights[name][kept]
    if writer is not None:
        weights[f"{prefix}.{writer}.weight"] = weights[f"{prefix}.{writer}.weight"][:, kept]


def _keep(count: int, ratio: float, *, of: str, multiple: int = 1) -> int:
    kept = round(count * (1 - ratio) / multiple) * multiple
    if not 0 < kept < count:
        raise JobConfigError(
            f"prune.ratio {ratio:g} leaves {kept} of {count} {of}. Choose one that leaves some "
            "and takes some."
        )
    return kept


def _best(value: Tensor, count: int) -> list[int]:
    """Return the places of the largest values, in their own order."""
    return sorted(value.argsort(descending=True)[:count].tolist())


def _spread(heads: Tensor, width: int) -> Tensor:
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    return ((shard.name, shard.tensor.detach()) for shard in decoder.shards())
