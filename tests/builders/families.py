"""A tiny model of every family of causal language models that transformers has, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

VOCABULARY, WIDTH, LAYERS, HEADS = 96, 64, 2, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "dim": WIDTH,
    "word_embed_proj_dim": WIDTH, "embedding_size": WIDTH, "d_embed": WIDTH, "emb_dim": WIDTH,
    "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96, "d_inner": 96,
    "dff": 96, "ffn_hidden_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS,
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Settings by the names that families give them; each family takes those that it has."""
LARGEST = 20_000_000
"""Parameters: a larger model is one whose settings have names that are not known here."""
LATENT = {"num_key_value_heads": HEADS, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
"""Multi-head latent attention."""
MIXED = ["linear_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), LATENT
    ),
    "falcon_h1": {"lm_head_multiplier": 0.25},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_5_text": {"layer_types": MIXED},
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings of families whose own sizes do not fit together otherwise."""


def tiny(family: str) -> Any:
    """A causal LM of this model type of transformers, in eval mode and float32."""
    torch.manual_seed(0)
    name = NAMES[family]
    network = getattr(transformers, name if isinstance(name, str) else name[0])
    config = CONFIG_MAPPING[family](**settings(CONFIG_MAPPING[family], family))
    with torch.device("meta"):
        size = sum(p.numel() for p in network(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:.1e} parameters: a size is missing in tests/builders/families.py")
    return network(config).eval()


def settings(kind: type, family: str) -> dict[str, Any]:
    """The sizes that a configuration of this class takes, those of its sections included."""
    known = kind().to_dict()
    taken = {key: value for key, value in SIZES.items() if key in known or key in kind.attribute_map}
    sections = {k: settings(s, "") for k, s in kind.sub_configs.items() if s.__name__ != "AutoConfig"}
    return {**taken, **sections, **OWN.get(family, {})}
