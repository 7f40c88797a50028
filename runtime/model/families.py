"""The families of decoders: what each fixes, what its files may leave out, how they name things.

This is data: `arch.py` reads a config.json by it, `names.py` a checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mizzen.runtime.model.names import NameMap

_ALL_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
# What config.json calls the fields that we ask for by other names.
_LLAMA_WORDS = {"norm_eps": "rms_norm_eps"}
_BLOOM_WORDS = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "norm_eps": "layer_norm_epsilon",
}
_GPT_WORDS = {
    **_BLOOM_WORDS,
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
}
# What every reader of config.json works out by itself.
_EVEN_HEADS = {"head_dim": "the model's width divided by its heads"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family: `fixed` are fields of ArchSpec, `defaults` and `refused` of config.json."""

    name: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # Variants that would load and compute something else: fields and the value we do compute.
    required: Mapping[str, Any] = field(default_factory=dict)
    names: NameMap = field(default_factory=NameMap)
    is_windowed: bool = False  # whether sliding_window counts when use_sliding_window is missing
    width_ratio: int | None = None  # feed-forward over model width, where it is a rule
    words: Mapping[str, str] = field(default_factory=dict)  # the family's own for config.json
    # Fields that config.json has no word for, and what they are to every reader.
    implied: Mapping[str, str] = field(default_factory=dict)


LLAMA = Family(name="llama", words=_LLAMA_WORDS)
MISTRAL = Family(name="mistral", words=_LLAMA_WORDS, is_windowed=True)
QWEN2 = Family(name="qwen2", words=_LLAMA_WORDS, fixed={"qkv_bias": True})
QWEN3 = Family(name="qwen3", words=_LLAMA_WORDS, fixed={"qk_norm": True})
GPT2 = Family(
    name="gpt2",
    fixed={"norm": "layer", "positions": "learned", "is_gated": False, **_ALL_BIASES},
    defaults={"hidden_act": "gelu_new", "tie_word_embeddings": True, "norm_eps": 1e-5},
    required={"add_cross_attention": False},
    width_ratio=4,
    words=_GPT_WORDS,
    implied=_EVEN_HEADS,
    names=NameMap(
        root="transformer.",
        layer="h.{}.",
        top={"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"},
        in_layer={
            "input_layernorm": "ln_1",
            "self_attn.o_proj": "attn.c_proj",
            "post_attention_layernorm": "ln_2",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused="attn.c_attn",
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
)
OPT = Family(
    name="opt",
    # Two rows of the table belonged to padding once.
    fixed={
        "norm": "layer",
        "positions": "learned",
        "position_offset": 2,
        "is_gated": False,
        **_ALL_BIASES,
    },
    defaults={"hidden_act": "relu", "tie_word_embeddings": True, "norm_eps": 1e-5},
    required={"layer_norm_elementwise_affine": True},
    implied=_EVEN_HEADS,
    names=NameMap(
        root="model.decoder.",
        top={"norm": "final_layer_norm"},
        in_layer={
            "input_layernorm": "self_attn_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "post_attention_layernorm": "final_layer_norm",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
)
BLOOM = Family(
    name="bloom",
    fixed={
        "norm": "layer",
        "positions": "alibi",
        "has_embedding_norm": True,
        "is_gated": False,
        **_ALL_BIASES,
    },
    defaults={"hidden_act": "gelu_new", "tie_word_embeddings": True, "norm_eps": 1e-5},
    required={"apply_residual_connection_post_layernorm": False},
    width_ratio=4,
    words=_BLOOM_WORDS,
    # Slopes of ALiBi follow from the number of heads as well: those left would get others.
    implied={**_EVEN_HEADS, "intermediate_size": "4 times the model's width"},
    names=NameMap(
        root="transformer.",
        layer="h.{}.",
        top={
            "embed_tokens": "word_embeddings",
            "embed_norm": "word_embeddings_layernorm",
            "norm": "ln_f",
        },
        in_layer={
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        fused="self_attention.query_key_value",
        is_fused_by_head=True,
    ),
)
GPTJ = Family(
    name="gptj",
    fixed={
        "norm": "layer",
        "block": "parallel",
        "is_gated": False,
        "mlp_bias": True,
        "has_head_bias": True,
    },
    defaults={"hidden_act": "gelu_new", "norm_eps": 1e-5},
    width_ratio=4,
    words=_GPT_WORDS,
    implied=_EVEN_HEADS,
    names=NameMap(
        root="transformer.",
        layer="h.{}.",
        top={"embed_tokens": "wte", "norm": "ln_f"},
        in_layer={
            "input_layernorm": "ln_1",
            "self_attn.q_proj": "attn.q_proj",
            "self_attn.k_proj": "attn.k_proj",
            "self_attn.v_proj": "attn.v_proj",
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
    ),
)

# Vicuna's checkpoints are LLaMA's.
FAMILIES = {
    "BloomForCausalLM": BLOOM,
    "GPT2LMHeadModel": GPT2,
    "GPTJForCausalLM": GPTJ,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "OPTForCausalLM": OPT,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}


def family_named(name: str) -> Family:
    """Return the family that an ArchSpec names."""
    return next(family for family in FAMILIES.values() if family.name == name)


# llama.cpp's names are the same for all families. It has no OPT and runs no GPT-J.
GGUF_NAMES = NameMap(
    root="",
    layer="blk.{}.",
    top={
        "embed_tokens": "token_embd",
        "embed_positions": "position_embd",
        "embed_norm": "token_embd_norm",
        "norm": "output_norm",
        "lm_head": "output",
    },
    in_layer={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)
GGUF_FAMILIES = {family.name: family for family in (LLAMA, QWEN2, QWEN3, GPT2, BLOOM)}
