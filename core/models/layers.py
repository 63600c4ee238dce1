"""Loading causal language models, and log-probs without a [batch, tokens, vocabulary] tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.artefacts import ArtefactError
from core.config import Lora, Model

KEPT_LOGITS = 1 << 27
"""LM-head logits that exist at a time: 256 MiB in bfloat16, 2,700 tokens at a vocabulary of 49k and 520 at 256k."""


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
        if getattr(config, "layer_types", None):  # kinds of attention, one a layer (Qwen, Gemma)
            config.layer_types = config.layer_types[:num_layers]
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
        if hasattr(module, "attention_dropout"):  # a number, applied inside the attention kernels
            module.attention_dropout = 0.0
    return lm


def train_top_layers(lm: nn.Module, count: int | None) -> None:
    """Freeze all but the last `count` layers and the final norm; None trains everything, 0 nothing."""
    if count is None:
        return
    layers = lm.base_model.layers
    if count > len(layers):
        raise ArtefactError(f"trainable_layers {count} exceeds the model's {len(layers)} layers")
    lm.requires_grad_(False)
    for module in (*layers[len(layers) - count :], lm.base_model.norm) if count else ():
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


class Lower(NamedTuple):
    """What the frozen lowest `depth` layers computed, to go on from."""

    depth: int
    states: Tensor  # [B, L, H]


def hidden_states(
    lm: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    positions: Tensor | None = None,
    lower: Lower | None = None,
) -> Tensor:
    """Final-norm hidden states [B, L, H].

    Args:
        attention_mask: [B, L], or bool [B, 1, L, L] of `core.batching.pack` (eager and sdpa attention only).
        positions: [B, L]; by default they follow the mask, so left and right padding agree.
        lower: states of `LowerLayers`; the layers below are then not run.
    """
    trunk = _trunk(lm)
    if lower is None:
        return _states(trunk, {"input_ids": input_ids}, attention_mask, positions)
    with _layers_from(trunk, lower.depth):
        return _states(trunk, {"inputs_embeds": lower.states}, attention_mask, positions)


def _states(trunk: nn.Module, inputs: dict[str, Tensor], attention_mask: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    if attention_mask.dim() == 4:
        if trunk.config._attn_implementation.startswith("flash"):
            raise ValueError("flash attention takes no mask of shared prompts: use sdpa, or give rows of one response")
        dtype = next(trunk.parameters()).dtype
        additive = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
        attention_mask = additive.masked_fill(~attention_mask, torch.finfo(dtype).min)
    return trunk(**inputs, attention_mask=attention_mask, position_ids=positions, use_cache=False).last_hidden_state


class LowerLayers(nn.Module):
    """The embedding and first `depth` layers of `lm`, frozen: models that differ above them only share their output.

    The parameters are those of `lm`, not copies.
    """

    def __init__(self, lm: nn.Module, depth: int):
        super().__init__()
        self.depth = depth
        trunk = copy.copy(_trunk(lm))
        trunk._modules = dict(trunk._modules)  # a shallow copy shares the table of submodules
        trunk.layers, trunk.norm = nn.ModuleList(trunk.layers[:depth]), nn.Identity()
        self.trunk = trunk.requires_grad_(False)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None = None) -> Lower:
        return Lower(self.depth, _states(self.trunk, {"input_ids": input_ids}, attention_mask, positions))

    @torch.no_grad()
    def check(self, lm: nn.Module) -> None:
        """ArtefactError unless `lm` gives the same states from these layers on as it does whole."""
        ids = torch.arange(3, 19, device=next(lm.parameters()).device)[None]
        mask = torch.ones_like(ids)
        whole, split = hidden_states(lm, ids, mask), hidden_states(lm, ids, mask, lower=self(ids, mask))
        if not torch.allclose(whole, split, rtol=0.02, atol=0.02 * float(whole.abs().mean())):
            raise ArtefactError(
                f"the first {self.depth} layers of {lm.config.name_or_path} are not those of the base model, or its "
                "architecture cannot be cut there: set rm.cache_frozen_layers and ppo.reuse_frozen_layers to false"
            )


def _trunk(lm: nn.Module) -> nn.Module:
    return lm.get_base_model().base_model if hasattr(lm, "peft_config") else lm.base_model


@contextmanager
def _layers_from(trunk: nn.Module, start: int) -> Iterator[None]:
    """`trunk` without its first `start` layers."""
    layers, types = trunk.layers, getattr(trunk.config, "layer_types", None)
    trunk.layers = nn.ModuleList(layers[start:])
    if types:
        trunk.config.layer_types = types[start:]
    try:
        yield
    finally:
        trunk.layers = layers
        if types:
            trunk.config.layer_types = types


def shared_depth(*lms: nn.Module) -> int:
    """How many of the lowest layers (and the embedding) are frozen in all models and equal in all, bit for bit."""
    trunks = [_trunk(lm) for lm in lms]
    if not _same_and_frozen([t.embed_tokens for t in trunks]):
        return 0
    levels = zip(*(t.layers for t in trunks), strict=False)
    return next(
        (i for i, modules in enumerate(levels) if not _same_and_frozen(modules)), min(len(t.layers) for t in trunks)
    )


def _same_and_frozen(modules: Sequence[nn.Module]) -> bool:
    states = [dict(m.named_parameters()) for m in modules]
    if any(p.requires_grad for state in states for p in state.values()):
        return False
    first = states[0]
    return all(
        state.keys() == first.keys() and all(torch.equal(p, first[k]) for k, p in state.items()) for state in states[1:]
    )


def token_logprobs(
    lm_head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float = 1.0, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of `tokens` [M] given `hidden` [M, H], float32; with their entropy [M], nats, when asked for.

    Up to `KEPT_LOGITS` logits are kept for the backward pass, in the model's own type. More are computed in chunks of
    so many, and again in the backward pass, so that memory is that of one chunk.
    """
    rows = max(1, KEPT_LOGITS // lm_head.out_features)
    parts = []
    for part, ids in zip(hidden.split(rows), tokens.split(rows), strict=True):
        if torch.is_grad_enabled() and hidden.requires_grad and len(hidden) > rows:
            parts.append(checkpoint(_chunk, lm_head, part, ids, temperature, with_entropy, use_reentrant=False))
        else:
            parts.append(_chunk(lm_head, part, ids, temperature, with_entropy))
    if not parts:
        empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if with_entropy else None
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _chunk(lm_head: nn.Module, hidden: Tensor, tokens: Tensor, temperature: float, with_entropy: bool):
    return _OfLogits.apply(lm_head(hidden), tokens, temperature, with_entropy)


class _OfLogits(torch.autograd.Function):
    """log softmax(z / T) at the tokens, and its entropy, in float32 from logits z [M, V] of any type.

    A few rows at a time: float32 copies of all logits, of which autograd would keep several, cost more than the matrix
    product where the vocabulary is large. With p the softmax and H the entropy,
    d logp / d z_j = (1[j = token] - p_j) / T and d H / d z_j = -p_j (log p_j + H) / T.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool):
        chosen = logits.new_empty(len(logits), dtype=torch.float32)
        entropy = torch.empty_like(chosen) if with_entropy else None
        for at in _blocks(logits):
            logps = _log_softmax(logits[at], temperature)
            chosen[at] = logps.gather(-1, tokens[at, None]).squeeze(-1)
            if with_entropy:
                entropy[at] = -torch.linalg.vecdot(logps.exp(), logps)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.temperature = temperature
        return chosen, entropy

    @staticmethod
    def backward(ctx, of_logp: Tensor, of_entropy: Tensor | None):
        logits, tokens, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for at in _blocks(logits):
            logps, scale = _log_softmax(logits[at], ctx.temperature), of_logp[at, None] / ctx.temperature
            p = logps.exp()
            if entropy is None:
                found = p.mul_(-scale)
            else:
                found = p.mul_((logps + entropy[at, None]) * (of_entropy[at, None] / -ctx.temperature) - scale)
            gradient[at] = found.scatter_add_(-1, tokens[at, None], scale)
        return gradient, None, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits if temperature == 1 else logits.float() / temperature, dim=-1, dtype=torch.float32)


def _blocks(logits: Tensor) -> list[slice]:
    """Rows whose float32 copies stay in the cache of a core; on a GPU fewer and larger blocks, for fewer kernels."""
    rows = max(1, (1 << 26 if logits.is_cuda else 1 << 20) // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def lora_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * B A [out, in] in float32: what an adapter adds to its weight."""
    return scaling * (b.float() @ a.float())


def merged_lora(base: Tensor, product: Tensor) -> Tensor:
    """W + product in float32, rounded once to the type of W [out, in]."""
    return (base.float() + product).to(base.dtype)


def lora_modules(lm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name in the base model, adapted linear layer)."""
    from peft.tuners.lora import LoraLayer

    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module
