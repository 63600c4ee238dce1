"""PPO whose actor and critic are adapters on one base, and reward models that have all, some or none of its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from core.config import Config
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training.weights import named_weights
from rm.checkpoints.adapters import save_adapter_model
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel

REWARD_MODELS = ("same", "upper", "all", "adapter-0", "adapter-1")
"""On the policy's own weights; with another top layer; with other weights everywhere; two adapters on its weights."""
STEPS, SEED = 3, 1


def configuration(base: Path, stage: int, *more: str, dtype: str = "float32") -> Config:
    """Two minibatches of four responses a step."""
    optim = "{lr: 0.002, schedule: constant, warmup: 0.0, eps: 0.001, max_grad_norm: 1.0}"
    variants = ", ".join(f"{name}: {{}}" for name in REWARD_MODELS)
    return load([], [
        f"policy.path={base}", f"rm.base.path={base}", f"rm.variants={{{variants}}}", "policy.attention=eager",
        "ppo.proxy=same", "ppo.lora={rank: 4, alpha: 32}", "ppo.critic_lora={rank: 2, alpha: 32}",
        f"ppo.critic={optim}", f"ppo.actor={optim}", "ppo.rollouts=8", "ppo.minibatches=2", "ppo.micro_batch=2",
        "ppo.epochs=2", "ppo.steps=3", "ppo.lam=0.95", "ppo.kl.coef=0.1", "ppo.reuse_frozen_layers=false",
        f"engine.zero_stage={stage}", f"engine.dtype={dtype}", "engine.float32_head=false",
        "engine.overrides={zero_optimization: {stage3_param_persistence_threshold: 0}}", *more,
    ])  # fmt: skip


def write_reward_models(cfg: Config, folder: Path) -> None:
    """Those of REWARD_MODELS, with random heads."""
    tokenizer = ChatTokenizer(cfg.policy)
    for number, name in enumerate(REWARD_MODELS):
        torch.manual_seed(20 + number)
        lm = load_causal_lm(cfg.policy, dtype="float32")
        if is_adapter := name.startswith("adapter"):
            lm = add_lora(lm, cfg.ppo.lora.model_copy(update={"top_layers": 1}))
        changed = {
            "upper": list(lm.parameters())[-11:-2], "all": lm.parameters(),
        }.get(name, [p for n, p in lm.named_parameters() if "lora_B" in n])  # fmt: skip
        with torch.no_grad():
            for parameter in changed:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model = RewardModel(lm, "mlp", tokenizer, mean=0.1, std=0.7)
        head = {key: tensor.detach().clone() for key, tensor in model.head.state_dict().items()}
        if is_adapter:
            save_adapter_model(folder / name, model, head, base=cfg.rm.base)
        else:
            save_reward_model(folder / name, model, named_weights(lm), head)
