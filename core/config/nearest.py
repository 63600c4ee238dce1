"""Which configuration key was meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Sequence

from core.config.fields import all_fields
from core.config.spelling import alike

OTHER_NAMES = {
    "adv_estimator": ("estimator",), "advantage_estimator": ("estimator",), "algorithm": ("estimator",),
    "base_model": ("base.path", "policy.path"), "batch_size": ("global_batch", "rollouts", "batch_tokens"),
    "beta": ("kl.coef",), "checkpointing_steps": ("checkpoint_every",), "clip_range": ("clip.low",),
    "cliprange": ("clip.low",), "cliprange_value": ("clip.value",), "dataset": ("prompts", "sources"),
    "discount": ("gamma",), "ema_decay": ("ema",), "entropy_coeff": ("entropy_coef",), "epsilon": ("clip.low",),
    "gae_lambda": ("lam",), "grad_clip": ("max_grad_norm",),
    "gradient_clipping": ("max_grad_norm",), "init_kl_coef": ("kl.coef",), "kl_beta": ("kl.coef",),
    "kl_ctl": ("kl.coef",), "kl_penalty": ("kl.coef",), "lambda": ("lam",), "learning_rate": ("lr",),
    "lora_r": ("lora.rank",), "lr_scheduler_type": ("schedule",),
    "max_length": ("max_tokens", "max_model_len"), "max_seq_length": ("max_tokens", "max_model_len"),
    "max_steps": ("steps",), "micro_batch_size": ("micro_batch",), "mini_batch_size": ("minibatches",),
    "model": ("base", "path"), "model_name_or_path": ("path",), "n": ("samples", "samples_per_prompt"),
    "num_epochs": ("epochs",), "num_gpus": ("processes",), "num_iterations": ("steps",),
    "num_mini_batches": ("minibatches",), "num_samples": ("samples", "samples_per_prompt"),
    "num_train_epochs": ("epochs",), "output_dir": ("run.dir",), "per_device_train_batch_size": ("micro_batch",),
    "ppo_epochs": ("epochs",), "random_seed": ("seed",), "report_to": ("trackers",),
    "response_length": ("max_new_tokens",), "rollout_batch_size": ("rollouts",), "save_steps": ("save_every",),
    "scheduler": ("schedule",), "total_steps": ("steps",), "train_batch_size": ("global_batch", "rollouts"),
    "vf_clip": ("clip.value",), "wandb": ("trackers",), "warmup_ratio": ("warmup",), "warmup_steps": ("warmup",),
    "world_size": ("processes",), "zero": ("zero_stage",),
}  # fmt: skip
"""What other trainers call an option -> the ends of the keys that it has here, the likeliest first."""
FARTHEST = {"section": 0.4, "stage": 0.34, "tree": 0.2}
"""Edits a letter up to which two names are taken for each other: in the same section, in the same top-level section,
anywhere in the tree. A key farther away must be the more alike."""
NEARER = {"section": 0.4, "stage": 0.3, "tree": 0.0}
"""What a key's place adds to its likeness, which is 1 for the same name."""


def nearest(location: Sequence[str | int]) -> str | None:
    """The key that was most likely meant by the unknown one at `location`; None when nothing is near.

    Compared are the last component and names that other trainers use. A key of the same section is preferred to one of
    the same stage, and that to any other.
    """
    *section, wrong = map(str, location)
    wrong = wrong.lower().replace("-", "_")
    best, highest = None, 0.0
    for key in _keys(section):
        parts = key.split(".")
        place = "tree"
        if section and parts[0] == section[0]:
            place = "section" if parts[:-1] == section else "stage"
        elif not section and len(parts) == 1:
            place = "section"
        likeness = _likeness(wrong, parts, FARTHEST[place])
        if place == "section" and wrong in parts[-1].split("_"):  # noise for label_noise
            likeness = max(likeness, 0.5)
        # Of equals the one that is least deep, then the first in the tree.
        score = likeness + NEARER[place] - 0.001 * len(parts)
        if likeness and score > highest:
            best, highest = key, score
    return best


def _likeness(wrong: str, parts: list[str], farthest: float) -> float:
    """Of a wrong name to the end of a key, from 0 to 1; 0 when they are too far apart."""
    here = alike(wrong, parts[-1], farthest)
    if len(parts) > 1:  # kl_coef for kl.coef
        here = max(here, alike(wrong, "_".join(parts[-2:]), farthest))
    for name, ends in OTHER_NAMES.items():
        for rank, end in enumerate(ends):
            if parts[-1 - end.count(".") :] == end.split("."):
                here = max(here, (0.95 - 0.02 * rank) * alike(wrong, name, farthest))
    return here


def keys_of(section: Sequence[str | int]) -> list[str]:
    """The names of a section's own fields."""
    path = list(map(str, section))
    keys = [key.split(".") for key in _keys(path)]
    return [parts[-1] for parts in keys if parts[:-1] == path]


def _keys(section: list[str]) -> list[str]:
    """Every key; names of a mapping's entries are those in `section`, and `*` elsewhere."""
    keys = []
    for field in all_fields():
        parts = field.key.split(".")
        same = True
        for i, part in enumerate(parts):
            given = section[i] if i < len(section) else None
            if part == "*":
                parts[i] = given if same and given else "*"
            same = same and given in (part, parts[i])
        keys.append(".".join(parts))
    return keys
