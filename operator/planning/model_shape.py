"""The sizes of a model, read from its config.json, and what follows from them. Pure arithmetic.

Fields differ by family; what is common to them is the decoder: attention with its four matrices, a
feed-forward block of two or three, and a table of tokens. Must not know accelerators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelShapeError(ValueError):
    """A config.json from which no sizes can be read; the text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What decides how much memory a model takes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    parameters: int
    layer_parameters: int  # of one layer
    table_parameters: int  # of a vector for every token

    def stage_parameters(self, stages: int) -> int:
        """Return how many parameters the largest stage holds: the last, with the output layer.

        Source: runtime/parallel/stages.py, `Stages.layers`.
        """
        if stages == 1:
            return self.parameters
        ends = self.parameters - self.layers * self.layer_parameters
        # Two tables are the first stage's and the last one's; a single one is held by both.
        own = ends - self.table_parameters if ends >= 2 * self.table_parameters else ends
        return self.stage_layers(stages) * self.layer_parameters + own

    def stage_layers(self, stages: int) -> int:
        """Return how many layers the largest of so many stages holds."""
        return -(-self.layers // stages)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Return what one token's keys and values take over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Anatomy:
    """The parts of a decoder, whose numbers are counted."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_len: int
    is_gated: bool = True  # three feed-forward matrices instead of two
    is_tied: bool = False  # the token table is the output layer too
    has_biases: bool = False  # on every matrix; the norms then have them as well
    has_qkv_biases: bool = False
    has_qk_norm: bool = False
    positions: int = 0  # rows of a learned table
    norms_per_layer: int = 2
    embedded: int | None = None  # width of the token table, where it is not the model's
    extra: int = 0  # further parameters
    layer_extra: int = 0  # further ones in each layer

    @property
    def parameters(self) -> int:
        """Return how many numbers the weights are."""
        table = self.table * (1 if self.is_tied else 2)
        if self.embedded:
            table += 2 * self.embedded * self.hidden
        norm = self.hidden * (2 if self.has_biases else 1)
        final = norm + self.positions * self.hidden + self.extra
        return table + final + self.layers * self.layer

    @property
    def table(self) -> int:
        """Return how many numbers a vector for every token takes."""
        return self.vocab * (self.embedded or self.hidden)

    @property
    def layer(self) -> int:
        """Return how many numbers the weights of a layer are."""
        norm = self.hidden * (2 if self.has_biases else 1)
        return self._matrices + self.norms_per_layer * norm + self.layer_extra

    @property
    def _matrices(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = 3 if self.is_gated else 2
        count = 2 * self.hidden * (q + kv) + matrices * self.hidden * self.intermediate
        if self.has_biases:
            count += q + 2 * kv + self.hidden + self.intermediate + self.hidden
        elif self.has_qkv_biases:
            count += q + 2 * kv
        return count + (2 * self.head_dim if self.has_qk_norm else 0)

    @property
    def shape(self) -> ModelShape:
        """Return what is asked of a model beside its parts."""
        return ModelShape(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_len=self.max_len,
            parameters=self.parameters,
            layer_parameters=self.layer,
            table_parameters=self.table,
        )


def read_model_shape(config: Mapping[str, object]) -> ModelShape:
    """Read a Hugging Face config.json of a decoder that the runtime knows or will know.

    Raises:
        ModelShapeError: the architecture is another, or a size is missing or no number.
    """
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    family = _FAMILIES.get(name)
    if family is None:
        raise ModelShapeError(
            f"config.json names the architecture {name or 'nowhere'}, whose sizes are not known. "
            f"Known: {', '.join(sorted(_FAMILIES))}."
        )
    fields = _Fields(config)
    return _READERS.get(family, _llama)(family, fields).shape


class _Fields:
    """A config.json whose sizes are checked as they are read."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config

    def size(self, *names: str, default: int | None = None) -> int:
        """Return the first of these fields that is set."""
        for name in names:
            value = self._config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelShapeError(f"config.json: {name} is {value!r}, not a size.")
            return value
        if default is None:
            raise ModelShapeError(
                f"config.json has no field {' or '.join(names)}. Copy the checkpoint's own again."
            )
        return default

    def is_set(self, name: str, *, default: bool = False) -> bool:
        return bool(self._config.get(name, default))


def _llama(family: str, fields: _Fields) -> _Anatomy:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    has_attention_biases = fields.is_set("attention_bias")
    return _Anatomy(
        family=family,
        layers=fields.size("num_hidden_layers"),
        hidden=hidden,
        intermediate=fields.size("intermediate_size"),
        heads=heads,
        kv_heads=fields.size("num_key_value_heads", default=heads),
        head_dim=fields.size("head_dim", default=hidden // heads),
        vocab=fields.size("vocab_size"),
        max_len=fields.size("max_position_embeddings", default=2048),
        is_tied=fields.is_set("tie_word_embeddings"),
        has_qkv_biases=has_attention_biases or family == "qwen2",
        has_qk_norm=family == "qwen3",
    )


def _gpt2(family: str, fields: _Fields) -> _Anatomy:
    """GPT-2 and GPT-J: the latter has rotary positions, one norm per layer and an output bias."""
    hidden, heads = fields.size("n_embd"), fields.size("n_head")
    is_gptj = family == "gptj"
    vocab, max_len = fields.size("vocab_size"), fields.size("n_positions", default=1024)
    inner = fields.size("n_inner", default=4 * hidden)
    return _Anatomy(
        family=family,
        layers=fields.size("n_layer"),
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=vocab,
        max_len=max_len,
        is_gated=False,
        is_tied=fields.is_set("tie_word_embeddings", default=not is_gptj),
        has_biases=True,
        positions=0 if is_gptj else max_len,
        norms_per_layer=1 if is_gptj else 2,
        extra=vocab if is_gptj else 0,
        layer_extra=-4 * hidden if is_gptj else 0,  # its attention alone has no biases
    )


def _opt(family: str, fields: _Fields) -> _Anatomy:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    embedded = fields.size("word_embed_proj_dim", default=hidden)
    max_len = fields.size("max_position_embeddings", default=2048)
    has_final_norm = fields.is_set("do_layer_norm_before", default=True)
    return _Anatomy(
        family=family,
        layers=fields.size("num_hidden_layers"),
        hidden=hidden,
        intermediate=fields.size("ffn_dim"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=fields.size("vocab_size"),
        max_len=max_len,
        is_gated=False,
        is_tied=fields.is_set("tie_word_embeddings", default=True),
        has_biases=True,
        positions=max_len + 2,  # the first two rows are never used
        embedded=embedded if embedded != hidden else None,
        extra=0 if has_final_norm else -2 * hidden,
    )


def _bloom(family: str, fields: _Fields) -> _Anatomy:
    hidden, heads = (
        fields.size("hidden_size", "n_embed"),
        fields.size("n_head", "num_attention_heads"),
    )
    return _Anatomy(
        family=family,
        layers=fields.size("n_layer", "num_hidden_layers"),
        hidden=hidden,
        intermediate=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=fields.size("vocab_size"),
        max_len=fields.size("seq_length", default=2048),
        is_gated=False,
        is_tied=True,
        has_biases=True,
        extra=2 * hidden,  # the norm after the token table
    )


_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
    "GPTJForCausalLM": "gptj",
    "OPTForCausalLM": "opt",
    "BloomForCausalLM": "bloom",
}
_READERS = {"gpt2": _gpt2, "gptj": _gpt2, "opt": _opt, "bloom": _bloom}
