"""Twins of the shipped configurations: the configuration as it is, but for paths and sizes, on tiny models of the same
architecture, tokenizer and chat template and on rows of the same layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from core.config import Config
from core.config.load import load
from tests.builders.processes import ROOT
from tests.builders.shipped import twin_rows as rows

MAIN = ("prompts", "preferences", "rm", "bon", "ppo", "eval", "report")
IMPORTED = ("prompts", "preferences", "rm")
EVALUATED = (*IMPORTED, "rm-eval")
STUDY = ("study",)
UNIFIED, OVER = "unified.yaml", "paper/over-optimisation.yaml"


@dataclass(frozen=True, slots=True)
class Twin:
    files: tuple[str, ...]
    """Below configs/, laid over each other."""
    commands: tuple[str, ...]
    """Of `grm`, in this order: all that the configuration is for."""
    policy: str = "smollm"
    """A name of `families.TOKENIZERS`."""
    base: str = ""
    """The same of rm.base, where that is another model."""
    gold: tuple[str, str] | None = None
    """`classifier` or `grm`, and a name as above, where gold comes from the hub."""
    prompts: Callable[[Path], Path] | None = None
    """Writes the file of `data.prompts`, where it is not in the repository."""
    sources: Callable[[Path], Path] | None = None
    """Writes the file of the one source of pairs."""
    fast: bool = False
    """Run by `make test` too."""

    @property
    def name(self) -> str:
        return " + ".join(file.removesuffix(".yaml") for file in self.files)

    @property
    def paths(self) -> list[Path]:
        return [ROOT / "configs" / file for file in self.files]


MISTRAL_GOLD, LLAMA_GOLD = ("classifier", "mistral"), ("grm", "llama3")
TWINS = (
    Twin(("offline.yaml",), MAIN),
    Twin(("exact-answer.yaml",), MAIN),
    Twin(("sft.yaml",), ("prompts", "sft", *MAIN[1:])),
    Twin(("gemma-2b.yaml",), MAIN, policy="gemma", gold=MISTRAL_GOLD),
    Twin(("gold.yaml",), ("gold",), sources=rows.hh),
    Twin(("human.yaml",), IMPORTED, sources=rows.hh),
    Twin(("study.yaml",), STUDY),
    Twin(("study.yaml", "study-quick.yaml"), STUDY),
    Twin((UNIFIED,), EVALUATED, policy="gemma", sources=rows.unified_feedback),
    Twin((UNIFIED, "paper/400k.yaml", "paper/noise-25.yaml"), EVALUATED, policy="gemma", sources=rows.unified_feedback),
    Twin((UNIFIED, "paper/mistral-7b.yaml"), EVALUATED, policy="mistral", sources=rows.unified_feedback),
    Twin((OVER,), STUDY, policy="gemma", gold=MISTRAL_GOLD, prompts=rows.prompts),
    Twin((OVER, "paper/mistral-proxies.yaml"), STUDY, policy="gemma", base="mistral", gold=MISTRAL_GOLD,
         prompts=rows.prompts),
    Twin(("paper/llama-3-8b.yaml",), EVALUATED, policy="llama3", sources=rows.preference_700k),
    Twin(("paper/llama-3-8b.yaml", "paper/skywork-80k.yaml"), EVALUATED, policy="llama3", sources=rows.skywork,
         fast=True),
    Twin(("paper/coste-pythia.yaml",), STUDY, policy="pythia", base="pythia", gold=MISTRAL_GOLD, prompts=rows.alpaca),
    Twin(("paper/llama-3.2-3b.yaml",), MAIN, policy="llama3.2", gold=LLAMA_GOLD),
    Twin(("paper/llama-3.2-3b.yaml", "paper/qwen3-4b.yaml"), MAIN, policy="qwen3", gold=LLAMA_GOLD),
)  # fmt: skip
RUN_AS_THEY_ARE = {"smoke.yaml": "tests/pipelines/test_main_job.py"}
"""Configurations that a test runs without any change."""
NOT_A_RUN = ("published.yaml",)

PATHS = ("run.dir", "policy.path", "rm.base.path", "gold.path", "data.prompts", "preferences.sources.*.path",
         "preferences.sources.*.subset")  # fmt: skip
SIZES: dict[str, int] = {
    "data.max_prompt_tokens": 160, "generation.max_new_tokens": 8,
    "generation.vllm.max_model_len": 192, "generation.vllm.max_num_seqs": 16,
    "sft.epochs": 1,
    "preferences.max_train_pairs": 24, "preferences.max_val_pairs": 8, "preferences.max_calibration_prompts": 4,
    "rm.epochs": 2, "rm.global_batch": 8, "rm.micro_batch": 4, "rm.max_tokens": 192,
    "bon.samples": 4, "bon.n_max": 4, "bon.prompts": 8,
    "ppo.steps": 2, "ppo.rollouts": 8, "ppo.micro_batch": 2, "ppo.minibatches": 2,
    "ppo.checkpoint_every": 1, "ppo.save_every": 1,
    "eval.prompts": 8, "eval.bootstrap": 100,
    "study.seeds": 2, "study.ppo_seeds": 1,
    "engine.processes": 1, "generation.processes": 1,
}  # fmt: skip
"""Key -> the most that a twin has of it. Where a configuration has less, that stays."""
AXES = ("study.pairs", "study.label_noise", "study.ppo_label_noise", "study.ppo_variants", "study.ppo_ensembles",
        "study.kl_coefs", "study.kl_sweep")  # fmt: skip
"""Lists of a study of which a twin has one entry; study.pairs has another number."""
CPU = {"generation.vllm.enforce_eager": True}
"""On a CPU, compiling a model takes minutes."""


def allowed(key: str) -> bool:
    """Whether a twin may override this key."""
    return key in SIZES or key in AXES or key in CPU or any(fnmatch(key, pattern) for pattern in PATHS)


def get(cfg: Config, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        if value is None:
            return None
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return value


def overrides(twin: Twin, paths: Mapping[str, str | None]) -> dict[str, Any]:
    """Key -> value of everything in which the twin differs from its configuration.

    Args:
        paths: those of `paths_of`.
    """
    cfg, found = load(twin.paths), dict(paths)
    for key, most in SIZES.items():
        value = get(cfg, key)
        if value is None and key.startswith("sft."):  # a configuration without that stage
            continue
        if value in (None, "auto") or value > most:
            found[key] = most
    for key in AXES if twin.commands == STUDY else ():
        if get(cfg, key):
            found[key] = [12] if key == "study.pairs" else [_kept(cfg, key)]
    return found | {key: value for key, value in CPU.items() if get(cfg, key) != value}


def _kept(cfg: Config, key: str) -> Any:
    """The entry of an axis that the twin keeps: the last noise, which is none for clean labels, else the first."""
    study = cfg.study
    return (study.ppo_label_noise or study.label_noise)[-1] if key.endswith("label_noise") else get(cfg, key)[0]


def layers_of(cfg: Config) -> int:
    """Layers of a tiny model: more than the configuration keeps, trains or adapts, so that some are left."""
    adapted = [lora.top_layers for lora in (cfg.rm.lora, cfg.ppo.lora) if lora]
    named = [cfg.rm.num_layers, cfg.rm.trainable_layers, cfg.ppo.critic_trainable_layers, *adapted]
    return max([2, *(n + 1 for n in named if n)])


def paths_of(twin: Twin, tokenizer: Path, folder: Path) -> dict[str, str | None]:
    """The twin's models and files, which are written, and where it runs.

    Args:
        tokenizer: folder of SmolLM's tokenizer.
    """
    from tests.builders.shipped import families  # which imports transformers

    cfg = load(twin.paths)
    depth = layers_of(cfg)
    policy = base = families.tiny_model(twin.policy, tokenizer, folder / "policy", layers=depth)
    if twin.base:
        base = families.tiny_model(twin.base, tokenizer, folder / "base", layers=depth)
    found: dict[str, str | None] = {
        "run.dir": str(folder / "runs"), "policy.path": str(policy), "rm.base.path": str(base),
    }  # fmt: skip
    if twin.gold:
        layout, name = twin.gold
        make = families.tiny_classifier if layout == "classifier" else families.tiny_grm
        found["gold.path"] = str(make(name, tokenizer, folder / "gold"))
    if twin.prompts:
        found["data.prompts"] = str(twin.prompts(folder))
    if twin.sources:
        # configs/human.yaml names its sources on the command line
        for name in cfg.preferences.sources or ("human",):
            found[f"preferences.sources.{name}.path"] = str(twin.sources(folder))
            if cfg.preferences.sources and cfg.preferences.sources[name].subset:
                found[f"preferences.sources.{name}.subset"] = None
    return found


def words(found: Mapping[str, Any]) -> list[str]:
    """Overrides as the command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def shipped() -> Iterator[str]:
    """The files below configs/ that configure runs."""
    folder = ROOT / "configs"
    for file in sorted(folder.rglob("*.yaml")):
        if (name := str(file.relative_to(folder))) not in NOT_A_RUN:
            yield name
