"""Which configuration key somebody meant who wrote one that does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from core.config.fields import all_fields

OTHER_NAMES = {
    "learning_rate": "lr", "batch_size": "global_batch", "train_batch_size": "global_batch",
    "per_device_train_batch_size": "micro_batch", "micro_batch_size": "micro_batch", "mini_batch_size": "minibatches",
    "num_mini_batches": "minibatches", "num_train_epochs": "epochs", "num_epochs": "epochs", "ppo_epochs": "epochs",
    "max_length": "max_tokens", "max_seq_length": "max_tokens", "response_length": "max_new_tokens",
    "kl_coef": "kl.coef", "kl_beta": "kl.coef", "init_kl_coef": "kl.coef", "kl_penalty": "kl.coef",
    "clip_range": "clip.low", "cliprange": "clip.low", "cliprange_value": "clip.value", "vf_clip": "clip.value",
    "lambda": "lam", "gae_lambda": "lam", "discount": "gamma", "model_name_or_path": "path", "model_path": "path",
    "lora_rank": "lora.rank", "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "grad_clip": "max_grad_norm",
    "gradient_clipping": "max_grad_norm", "lr_scheduler_type": "schedule", "warmup_ratio": "warmup",
    "adv_estimator": "estimator", "advantage_estimator": "estimator", "num_samples": "samples", "max_steps": "steps",
    "zero": "zero_stage", "num_gpus": "processes", "world_size": "processes", "random_seed": "seed",
    "output_dir": "dir",
}  # fmt: skip
"""What other trainers call an option -> the end of its key here."""
LEAST = 0.65
"""Similarity of two names, from 0 to 1, below which they are not taken for one another."""


def nearest(location: Sequence[str | int]) -> str | None:
    """The key that the unknown one at `location` most likely stands for; None where nothing is near."""
    *parent, wrong = map(str, location)
    best, best_score = None, 0.0
    for key in keys_near(parent):
        alike = _alike(wrong, key)
        if alike < LEAST:
            continue
        path = key.split(".")
        # A key of the same section is the likelier one; then one of the same stage.
        shared = sum(1 for a, b in zip(parent, path, strict=False) if a == b)
        score = alike + 0.25 * shared - 0.01 * len(path)
        if score > best_score + 1e-9:
            best, best_score = key, score
    return best


def keys_of(section: Sequence[str | int]) -> list[str]:
    """The names that a section may hold."""
    prefix = list(map(str, section))
    keys = [key.split(".") for key in keys_near(prefix)]
    return list(dict.fromkeys(k[len(prefix)] for k in keys if len(k) > len(prefix) and k[: len(prefix)] == prefix))


def keys_near(location: Sequence[str]) -> list[str]:
    """Every key, with the names of mapping entries (`rm.variants.grm`) taken from `location`."""
    keys = []
    for field in all_fields():
        parts = field.key.split(".")
        names = [*location[: len(parts)], *parts[len(location) :]]
        keys.append(".".join(b if a == "*" else a for a, b in zip(parts, names, strict=True)))
    return keys


def _alike(wrong: str, key: str) -> float:
    """Of an unknown name and the end of a key: its last part, its last two, or another name that it goes by."""
    wrong = wrong.lower().replace("-", "_")
    parts = key.split(".")
    ends = [parts[-1], "_".join(parts[-2:])]
    others = [name for name, end in OTHER_NAMES.items() if parts[-end.count(".") - 1 :] == end.split(".")]
    return max(SequenceMatcher(None, wrong, name).ratio() for name in (*ends, *others))
