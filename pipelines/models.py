"""Loading causal language models, and log-probs without a [batch, tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelines.artefacts import ArtefactError
from pipelines.config import Lora, Model

LOGIT_ROWS = 512
"""Rows of LM-head logits that exist at a time: 512 x 49k in float32 are 100 MB."""


def load_causal_lm(model: Model, *, dtype: str, num_layers: int | None = None) -> nn.Module:
    """The model with dropout off; ArtefactError when a weight is missing or none of the model's.

    `num_layers` keeps the first so many layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(model.path, **where)
    depth = config.num_hidden_layers
    if num_layers is not None:
        if num_layers > depth:
            raise ArtefactError(f"num_layers {num_layers} exceeds the {depth} layers of {model.path}")
        config.num_hidden_layers = num_layers
    lm, info = AutoModelForCausalLM.from_pretrained(
        model.path,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=model.attention,
        output_loading_info=True,
        **where,
    )
    cut = tuple(f".layers.{i}." for i in range(config.num_hidden_layers, depth))
    unexpected = [k for k in info["unexpected_keys"] if not any(layer in k for layer in cut)]
    if info["missing_keys"] or unexpected or info["mismatched_keys"]:
        raise ArtefactError(
            f"{model.path} does not fit its architecture: missing {sorted(info['missing_keys'])[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}, other shape {sorted(info['mismatched_keys'])[:3]}"
        )
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm


def train_top_layers(lm: nn.Module, count: int | None) -> None:
    """Freeze all but the last `count` layers and the final norm; None trains everything."""
    if count is None:
        return
    layers = lm.base_model.layers
    if count > len(layers):
        raise ArtefactError(f"trainable_layers {count} exceeds the model's {len(layers)} layers")
    lm.requires_grad_(False)
    for module in (*layers[len(layers) - count :], lm.base_model.norm):
        module.requires_grad_(True)


def add_lora(lm: nn.Module, lora: Lora) -> nn.Module:
    """`lm` with trainable adapters; the base is frozen."""
    from peft import LoraConfig, get_peft_model

    depth = lm.config.num_hidden_layers
    layers = list(range(depth - lora.top_layers, depth)) if lora.top_layers else None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    # float32 adapters on a bf16 base fail under ZeRO-3 (huggingface/trl#6089); the optimiser keeps float32 masters.
    return get_peft_model(lm, config, autocast_adapter_dtype=False)


def hidden_states(lm: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final-norm hidden states [B, L, H]. Positions follow the mask, so left and right padding agree."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    trunk = lm.get_base_model().base_model if hasattr(lm, "peft_config") else lm.base_model
    return trunk(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def token_logprobs(
    lm_head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `tokens` [M] given `hidden` [M, H], float32, logits `LOGIT_ROWS` rows at a time.

    Backward recomputes the logits of each chunk, so memory is that of one chunk. The entropy [M], in nats,
    is computed when asked for.
    """
    parts = []
    for rows, ids in zip(hidden.split(LOGIT_ROWS), tokens.split(LOGIT_ROWS), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad and len(hidden) > LOGIT_ROWS:
            parts.append(checkpoint(_chunk, lm_head, rows, ids, temperature, with_entropy, use_reentrant=False))
        else:
            parts.append(_chunk(lm_head, rows, ids, temperature, with_entropy))
    if not parts:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if with_entropy else None
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk(lm_head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool):
    logits = lm_head(hidden).float() / temperature
    logps = F.log_softmax(logits, dim=-1)
    entropy = -(logps.exp() * logps).sum(-1) if with_entropy else None
    return logps.gather(-1, tokens[:, None]).squeeze(-1), entropy


def merged_lora(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A in float32, rounded once to the type of W [out, in]."""
    return (base.float() + scaling * (b.float() @ a.float())).to(base.dtype)


def lora_modules(lm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name in the base model, adapted linear layer)."""
    from peft.tuners.lora import LoraLayer

    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def pad_right(sequences: list[list[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both [B, longest]; the mask, not the pad id, says what is real."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[i, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
