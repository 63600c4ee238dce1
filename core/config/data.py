"""Configuration of prompts, sampling, gold labels and preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from core.config.base import NATIVE_DTYPE, Dtype, Fraction, Section
from core.config.vllm_arguments import name_faults


class Splits(Section):
    """Shares of the prompts, which sum to 1. A prompt's split follows from its hash alone, so it stays the same when
    other prompts are added or removed."""

    rm_train: Fraction = 0.45
    """Prompts whose pairs reward models are trained on. Imported pairs are divided in the ratio rm_train : rm_val."""
    rm_val: Fraction = 0.12
    """Prompts whose pairs measure the held-out accuracy of reward models."""
    rl_train: Fraction = 0.25
    """Prompts that PPO samples responses to."""
    calibration: Fraction = 0.06
    """Prompts whose samples give each reward model its mean and standard deviation under the reference."""
    eval: Fraction = 0.12
    """Prompts that best-of-n and policies are measured on. Nothing is trained on them."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Splits:
        total = sum(self.model_dump().values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares sum to {total:.4f}, not 1")
        return self


class Data(Section):
    prompts: Path = Path("data/prompts.jsonl")
    """File of rows with `prompt` (a text, or messages that end with a user turn, as TRL writes prompts) or `messages`.
    `system`, `history` and `input` are used as in [data.md](data.md)."""
    eval_prompts: Path | None = None
    """Another file of prompts that best-of-n and policies are measured on, such as prompts of another kind, in place of
    the split eval of `prompts`, which is then not used (null: that split). Prompts that a prompt of another split
    repeats, exactly or nearly, are left out, counted."""
    system: str | None = None
    """System message put before every prompt that has none (null: none is added)."""
    metadata: tuple[str, ...] = ()
    """Columns of the file that are kept with each prompt for ppo.reward.function and ppo.reward.url, such as the right
    answer. A row without one of them is malformed. No model reads them (empty: none)."""
    max_prompt_tokens: int = Field(default=256, ge=8)
    """Longer prompts are dropped, counted and listed in `rejected.jsonl`."""
    max_rejected_share: Fraction = 0.01
    """A larger share of malformed rows in `prompts` is an error. Repeated and long prompts are not malformed."""
    splits: Splits = Splits()
    """What each prompt is used for."""

    @model_validator(mode="after")
    def _other_file(self) -> Data:
        if self.eval_prompts == self.prompts:
            raise ValueError("eval_prompts is the file of prompts itself: leave it out, or name another one")
        return self


class Vllm(Section):
    dtype: Dtype = NATIVE_DTYPE
    """Number type of vLLM's weights. The default is bfloat16 where the machine computes it fast, else float32."""
    max_model_len: int = Field(default=512, ge=16)
    """Longest prompt plus response, in tokens."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that are decoded together."""
    block_size: int | None = 32
    """Tokens per block of the KV cache, on CPU only (null: vLLM's choice, 128). Responses to one prompt share whole
    blocks, so a short block lets short prompts be shared."""
    enforce_eager: bool = True
    """False compiles the model and captures CUDA graphs, which is faster after a minute of warm-up. Set it for long
    runs on GPUs."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0, lt=1)
    """Share of GPU memory for weights and KV cache. In PPO the trainer needs the rest."""
    sleep: bool = True
    """On a GPU in PPO, free vLLM's memory while the trainer works. No effect on CPU."""
    cpu_kvcache_gib: int = Field(default=1, ge=1)
    """Size of the KV cache of one engine on CPU, in GiB."""
    overrides: dict[str, Any] = {}
    """Arguments of vLLM's engine, by its names with underscores, laid over those that follow from this configuration,
    for the engines of the stages and for `grm vllm-serve` alike: `{kv_cache_dtype: fp8, max_num_batched_tokens: 4096}`.
    null: vLLM's own default. Those that the stages rely on are refused ([scale.md](scale.md#vllms-own-arguments))."""

    @field_validator("overrides")
    @classmethod
    def _known_arguments(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if overrides and (faults := name_faults(overrides)):
            raise ValueError("; ".join(faults))
        return overrides


class Generation(Section):
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of every stage. The trainer divides its logits by it too, so that KL is measured on the
    distribution that is sampled from."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest response in tokens. Longer ones are cut off and count as not finished."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", json_schema_extra={"decides_result": False}
    )
    """Processes on this machine that divide the shards of preferences, bon and eval, each with a vLLM and scorers of
    its own. auto: one per GPU, and one on CPU. A number: so many, but at most one per GPU, or without GPUs one per core
    that the command may use. The result does not depend on it ([scale.md](scale.md))."""
    vllm: Vllm = Vllm()
    """The engine that samples."""


class Gold(Section):
    kind: Literal["judge", "hub", "checkpoint", "linear"] = "judge"
    """judge: the built-in scorer. checkpoint: a trained reward model in a folder. hub: one from the hub. linear: gold
    with a known dependence on the proxy, which only tests can build."""
    path: str = "models/all-MiniLM-L6-v2"
    """judge: folder of its sentence-embedding model. checkpoint: folder of the reward model. hub: its hub id."""
    batch_tokens: int = Field(default=16384, ge=64)
    """Tokens per forward pass, padding included. Lower it when memory runs out."""

    @property
    def is_local(self) -> bool:
        return self.kind != "hub"


class PreferenceSource(Section):
    """A source is a local file or folder, or a dataset of the hub."""

    path: Path
    """A .jsonl, .json, .csv or .parquet file (text also as .gz, .bz2 or .xz), a folder of such files, a folder of
    `save_to_disk`, or a hub id (owner/name)."""
    layout: Literal[
        "auto", "unified", "arena", "arena_votes", "ppe", "helpsteer", "safe_rlhf", "shp", "webgpt", "summaries",
        "alpaca_farm", "answers", "completions", "ranked", "candidates", "hh", "trl", "outputs", "kto", "ratings",
    ] = "auto"  # fmt: skip
    """How the pairs are written. auto recognises it from the columns. [data.md](data.md) describes the layouts."""
    subset: str | None = None
    """Configuration of a hub dataset or of a local copy of one, or one of its folders (null: its default)."""
    split: str = "train"
    """Only this split is read. In a folder, `datasets` finds its files as on the hub. A single file is train unless its
    name says otherwise. Where a column `split` of the rows names another one, the row is left out, counted."""
    revision: str | None = None
    """Hub revision: a commit, tag or branch (null: the newest). Pin one for a run that other people should repeat."""
    stride: int = Field(default=1, ge=1)
    """Keep the pairs of every k-th row. Rows that cannot be used are counted, ties are not: 20 and 2 give the 40K and
    400K pairs that the GRM authors take of Unified-Feedback. With one rated answer a row, every k-th pair is kept."""
    max_pairs: int | None = Field(default=None, ge=2)
    """Keep at most n pairs, chosen by hash (null: all)."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch repeats each training pair of this source. Below 1 it is the share of pairs that is used."""


class Preferences(Section):
    sources: dict[str, PreferenceSource] = {}
    """Other people's pairs, by a name of your own, in place of sampled ones (empty: pairs are sampled from the policy
    and labelled by gold). Their labels then stand for gold in the held-out accuracy."""
    max_rejected_share: Fraction = 0.01
    """A source with a larger share of malformed rows is an error. All of them are listed in `rejected.jsonl`."""
    decontaminate: tuple[Path, ...] = ()
    """Evaluation sets, in any layout of `grm rm-eval`. Imported pairs with one of their prompts are left out."""
    label_noise: Fraction = Field(default=0.0, le=0.5)
    """Share of all pairs whose label is flipped, for training and validation alike. Flips are recorded, so the held-out
    accuracy is reported against the flipped and against the clean labels."""
    shard_prompts: int = Field(default=256, ge=1)
    """Prompts of a shard, which one process samples between two writes to disk: an interrupted stage loses at most
    these. With several generation.processes, have at least one shard for each."""
    max_train_pairs: int | None = Field(default=None, ge=2)
    """Sample pairs on the first n prompts of rm_train only, or keep the first n imported pairs (null: all)."""
    max_val_pairs: int | None = Field(default=None, ge=2)
    """As max_train_pairs, of rm_val."""
    max_calibration_prompts: int | None = Field(default=None, ge=2)
    """Use only the first n prompts of the split calibration (null: all)."""
