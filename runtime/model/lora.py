"""LoRA adapters: their files in PEFT's layout, and their sums in training and in serving.

An adapter adds `scale * B A x` to a linear's output. The decoder knows only `LoraDelta`;
`TrainableLora` is one, and so is the `LoraBatch` in which each sequence has its own adapter.

Source: LoRA (Hu et al., 2021); file layout: PEFT 0.21, `LoraConfig` and `save_pretrained`.
"""

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, R adapter rank.
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mizzen.runtime.errors import BadAdapterError, TensorParallelInvalidError
from mizzen.runtime.model.decoder import Block, Decoder
from mizzen.runtime.model.safetensors_dir import check_whole
from mizzen.runtime.parallel.shard import Span

PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)
# What PEFT can write and we do not compute: each must be absent or empty.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "fan_in_fan_out",
    "lora_bias",
)


class Site(NamedTuple):
    """One linear of one layer."""

    layer: int
    target: str

    def tensor_name(self, side: str) -> str:
        """Return PEFT's name of matrix "A" or "B" at this linear."""
        path = f"layers.{self.layer}.{PATHS[self.target]}"
        return f"base_model.model.model.{path}.lora_{side}.weight"


class Pair(NamedTuple):
    """An adapter's two matrices at one linear: B A x has the linear's output width."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Size and places of an adapter."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(PATHS)
    is_rank_stabilized: bool = False

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilized else self.rank)

    @classmethod
    def from_peft(cls, document: Mapping[str, Any]) -> "LoraConfig":
        """Read PEFT's adapter_config.json; `targets` come from the tensors, not from here."""
        if document.get("peft_type") != "LORA":
            raise BadAdapterError(
                f"The adapter's peft_type is {document.get('peft_type')}; only LORA is supported."
            )
        used = [name for name in _UNSUPPORTED if document.get(name)]
        if document.get("bias", "none") != "none":
            used.append("bias")
        if used:
            raise BadAdapterError(
                f"The adapter uses {', '.join(used)}, which Mizzen does not compute. "
                "Train it without, or merge it into the base model."
            )
        if not document.get("r"):
            raise BadAdapterError(f"{CONFIG_FILE} states no rank (r).")
        return cls(
            rank=document["r"],
            alpha=document.get("lora_alpha", 8),
            dropout=document.get("lora_dropout", 0.0),
            is_rank_stabilized=bool(document.get("use_rslora", False)),
        )

    def to_peft(self, *, base_model: str) -> dict[str, Any]:
        """Return the document PEFT and other engines read."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted(self.targets),
            "use_rslora": self.is_rank_stabilized,
            "bias": "none",
            "inference_mode": True,
        }


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter as its files hold it: unscaled, not sharded."""

    config: LoraConfig
    pairs: Mapping[Site, Pair]


def load_adapter(directory: Path, *, max_rank: int | None = None) -> Adapter:
    """Read an adapter directory in PEFT's layout.

    Raises:
        BadAdapterError: files are missing, or it is of a kind or size we do not compute.
        ShardTruncatedError: its weights were cut short.
    """
    try:
        config = LoraConfig.from_peft(json.loads((directory / CONFIG_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise BadAdapterError(
            f"{directory} has no readable {CONFIG_FILE}: {type(error).__name__}. An adapter is a "
            f"directory with {CONFIG_FILE} and {WEIGHTS_FILE}."
        ) from None
    if max_rank is not None and config.rank > max_rank:
        raise BadAdapterError(
            f"The adapter's rank is {config.rank}, above the limit of {max_rank}. "
            "Raise --max-lora-rank or train with a smaller rank."
        )
    if not (directory / WEIGHTS_FILE).exists():
        raise BadAdapterError(f"{directory} has no {WEIGHTS_FILE}. Other formats are not read.")
    check_whole(directory / WEIGHTS_FILE)
    pairs = _pair_up(load_file(directory / WEIGHTS_FILE))
    targets = tuple(t for t in PATHS if any(site.target == t for site in pairs))
    return Adapter(_with_targets(config, targets), pairs)


def save_adapter(directory: Path, adapter: Adapter, *, base_model: str) -> None:
    """Write an adapter so that PEFT, and any engine that reads its layout, can load it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        site.tensor_name(side): matrix.detach().cpu().contiguous()
        for site, pair in adapter.pairs.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    document = adapter.config.to_peft(base_model=base_model)
    (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def _with_targets(config: LoraConfig, targets: tuple[str, ...]) -> LoraConfig:
    return LoraConfig(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=targets,
        is_rank_stabilized=config.is_rank_stabilized,
    )


def _pair_up(tensors: Mapping[str, Tensor]) -> dict[Site, Pair]:
    sides: dict[Site, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR_NAME.fullmatch(name)
        if found is None or found[2] not in PATHS:
            raise BadAdapterError(
                f"The adapter changes {name.removeprefix('base_model.model.')}, which is not a "
                f"linear we adapt. Supported: {', '.join(PATHS)}."
            )
        sides.setdefault(Site(int(found[1]), found[2]), {})[found[3]] = tensor
    if any(len(side) < 2 for side in sides.values()):
        raise BadAdapterError("The adapter has a lora_A without its lora_B, or the reverse.")
    return {site: Pair(sides[site]["A"], sides[site]["B"]) for site in sorted(sides)}


@dataclass(frozen=True, slots=True)
class SiteShape:
    """A linear's whole size, and the part of it that this rank holds."""

    width_in: int
    width_out: int
    rows: Span | None  # column-parallel: this rank has these outputs, so B is cut
    columns: Span | None  # row-parallel: this rank reads these inputs, so A is cut

    def cut(self, pair: Pair) -> Pair:
        """Return this rank's part of an adapter's matrices."""
        a_RI, b_OR = pair
        if self.columns is not None:
            a_RI = a_RI[:, self.columns.start : self.columns.stop]
        if self.rows is not None:
            b_OR = b_OR[self.rows.start : self.rows.stop]
        return Pair(a_RI, b_OR)


def site_shapes(decoder: Decoder) -> dict[str, SiteShape]:
    """Return each target's shape; all layers of a model are alike."""
    spec, block = decoder.spec, cast(Block, decoder.blocks[0])
    q, k, v = (part.span for part in block.attention.qkv.parts)
    wide, ff = spec.hidden_size, spec.intermediate_size
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden = block.feed_forward.down.part.span
    return {
        "q_proj": SiteShape(wide, q_width, q, None),
        "k_proj": SiteShape(wide, kv_width, k, None),
        "v_proj": SiteShape(wide, kv_width, v, None),
        "o_proj": SiteShape(q_width, wide, None, q),
        "gate_proj": SiteShape(wide, ff, hidden, None),
        "up_proj": SiteShape(wide, ff, hidden, None),
        "down_proj": SiteShape(ff, wide, None, hidden),
    }


class TrainableLora(nn.Module):
    """An adapter being trained. Kept in float32, so that small steps are not rounded away.

    B starts at zero: before the first step the model is the base model.
    """

    def __init__(self, decoder: Decoder, config: LoraConfig, *, seed: int = 0) -> None:
        super().__init__()
        if decoder.group.size > decoder.spec.kv_heads:
            # Ranks that share a KV head would each see only a share of its gradient.
            raise TensorParallelInvalidError(
                f"Training over {decoder.group.size} ranks needs as many KV heads, and the model "
                f"has {decoder.spec.kv_heads}. Use fewer ranks."
            )
        self.config = config
        self._group = decoder.group
        self._shapes = site_shapes(decoder)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for layer in range(decoder.spec.layers):
            for target in config.targets:
                pair = self._shapes[target].cut(self._initial(target, generator))
                for side, matrix in ((self.a, pair.a_RI), (self.b, pair.b_OR)):
                    side[_key(layer, target)] = nn.Parameter(
                        matrix.to(decoder.place.device, torch.float32, copy=True)
                    )

    def _initial(self, target: str, generator: torch.Generator) -> Pair:
        # Every rank draws the whole matrix, so that the start does not depend on their number.
        shape, rank = self._shapes[target], self.config.rank
        bound = 1 / math.sqrt(shape.width_in)  # as nn.Linear starts
        a_RI = (torch.rand(rank, shape.width_in, generator=generator) * 2 - 1) * bound
        return Pair(a_RI, torch.zeros(shape.width_out, rank))

    def delta(self, layer: int, target: str, x_TI: Tensor) -> Tensor | None:
        """Return the adapter's addition, in the type of `x`."""
        key = _key(layer, target)
        if key not in self.a:
            return None
        a_RI, b_OR = self.a[key], self.b[key]
        # The matrix that every rank holds whole is used by each in part: its gradient is a sum.
        if self._shapes[target].columns is None:
            a_RI = self._group.copy(a_RI)
        else:
            b_OR = self._group.copy(b_OR)
        x_TI, dtype = x_TI.to(a_RI.dtype), x_TI.dtype
        x_TI = F.dropout(x_TI, self.config.dropout, self.training)
        return (F.linear(F.linear(x_TI, a_RI), b_OR) * self.config.scale).to(dtype)

    def pairs(self) -> Iterator[tuple[Site, Pair]]:
        """Yield this rank's matrices; views, so that a checkpoint can be copied into them."""
        for key, a_RI in self.a.items():
            layer, target = key.split(":")
            yield Site(int(layer), target), Pair(a_RI, self.b[key])

    def adapter(self) -> Adapter:
        """Return the adapter as its files hold it. For a group of one rank."""
        return Adapter(self.config, dict(self.pairs()))


def _key(layer: int, target: str) -> str:
    return f"{layer}:{target}"


class LoraSlots:
    """The adapters a served model holds, by slot. Slot 0 is the base model and always empty.

    Each adapter keeps its own rank and its own set of linears: nothing is padded.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._place = decoder.place
        self._layers = decoder.spec.layers
        self._shapes = site_shapes(decoder)
        self._slots: dict[int, dict[Site, Pair]] = {}

    def load(self, slot: int, adapter: Adapter) -> None:
        """Put this rank's part of an adapter into a slot.

        Raises:
            BadAdapterError: it was trained for another model.
        """
        if slot < 1:
            raise ValueError("slot 0 is the base model")
        pairs = {site: self._prepare(site, pair, adapter) for site, pair in adapter.pairs.items()}
        self._slots[slot] = pairs

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

    def _prepare(self, site: Site, pair: Pair, adapter: Adapter) -> Pair:
        shape, rank = self._shapes[site.target], adapter.config.rank
        expected = ((rank, shape.width_in), (shape.width_out, rank))
        if site.layer >= self._layers or (pair.a_RI.shape, pair.b_OR.shape) != expected:
            raise BadAdapterError(
                f"The adapter's {site.target} of layer {site.layer} does not fit this model. "
                "Load it on the base model it was trained for."
            )
        a_RI, b_OR = shape.cut(pair)
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
