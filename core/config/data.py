"""Configuration of prompts, sampling, gold labels and preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from core.config.base import NATIVE_DTYPE, Dtype, Fraction, Section


class Splits(Section):
    """Shares of the prompts, cut by prompt hash: a prompt never changes its split when others come or go."""

    rm_train: Fraction = 0.45
    rm_val: Fraction = 0.12
    rl_train: Fraction = 0.25
    calibration: Fraction = 0.06
    eval: Fraction = 0.12

    @model_validator(mode="after")
    def _sums_to_one(self) -> Splits:
        total = sum(self.model_dump().values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares sum to {total:.4f}, not 1")
        return self


class Data(Section):
    prompts: Path = Path("data/prompts.jsonl")
    """JSON Lines: one object a line with `prompt` (a string) or `messages` (ending with a user turn)."""
    system: str | None = None
    """System message put before every prompt that has none."""
    max_prompt_tokens: int = Field(256, ge=8)
    """Longer prompts are dropped, counted and listed in `rejected.jsonl`."""
    splits: Splits = Splits()


class Vllm(Section):
    dtype: Dtype = NATIVE_DTYPE
    """Default: what the machine computes fast."""
    max_model_len: int = Field(512, ge=16)
    """Prompt plus response, in tokens."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences decoded together."""
    block_size: int | None = 32
    """KV-cache block in tokens (null: vLLM's choice). Prefixes are shared by whole blocks; CPU's own 128 is long."""
    enforce_eager: bool = True
    """False compiles and captures graphs: faster after a minute of warm-up. Right for long GPU runs."""
    gpu_memory_utilization: float = Field(0.4, gt=0, lt=1)
    """Share of GPU memory for weights and KV cache; in PPO the trainer needs the rest."""
    sleep: bool = True
    """In PPO on a GPU, free vLLM's memory while the trainer works. No effect on CPU."""
    cpu_kvcache_gib: int = Field(1, ge=1)
    """KV cache of one engine on CPU, GiB."""


class Generation(Section):
    temperature: float = Field(1.0, gt=0)
    """Of every sample in the study. Trainer log-probs are divided by it too, so KL is that of what is sampled."""
    max_new_tokens: int = Field(64, ge=1)
    vllm: Vllm = Vllm()


class Gold(Section):
    kind: Literal["judge", "hub", "checkpoint", "linear"] = "judge"
    """judge: the built-in scorer; hub or checkpoint: a trained reward model; linear: known E[gold | proxy], tests."""
    path: str = "models/all-MiniLM-L6-v2"
    """The sentence-embedding model of `judge`; the hub id or folder of the others."""
    batch_tokens: int = Field(16384, ge=64)

    @property
    def is_local(self) -> bool:
        return self.kind != "hub"


class PreferenceSource(Section):
    """A set of labelled pairs, local or on the hub."""

    path: Path
    """A .jsonl, .json or .parquet file, a folder of such, or a hub id."""
    layout: Literal["auto", "unified", "trl", "hh", "ratings"] = "auto"
    """auto: told from the columns. The layouts are described in `core/data/sources.py`."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Of a hub dataset; in a folder, files whose names begin with it are read alone, where there are any."""
    revision: str | None = None
    """Hub revision; pin one for a run that others shall repeat."""
    stride: int = Field(1, ge=1)
    """Take every so manieth pair, ties not counted: 20 and 2 are the 40K and 400K of Unified-Feedback."""
    max_pairs: int | None = Field(None, ge=2)
    """At most so many, chosen by hash."""
    weight: float = Field(1.0, gt=0)
    """How often a training pair of this source is seen in an epoch; a fraction is the share of pairs seen."""


class Preferences(Section):
    sources: dict[str, PreferenceSource] = {}
    """Pairs of others in place of sampled ones; their labels then stand for gold in held-out accuracy."""
    max_rejected_share: Fraction = 0.01
    """Malformed rows of a source beyond this share are an error; all of them are listed in `rejected.jsonl`."""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation sets (what `grm rm-eval --set` reads) whose prompts no pair may have."""
    label_noise: Fraction = Field(0.0, le=0.5)
    """Share of pairs whose label is flipped; flips are marked, so held-out accuracy is known against both."""
    shard_prompts: int = Field(256, ge=1)
    """Prompts sampled between two writes to disk: what a killed stage loses at most."""
    max_train_pairs: int | None = Field(None, ge=2)
    max_val_pairs: int | None = Field(None, ge=2)
    max_calibration_prompts: int | None = Field(None, ge=2)
