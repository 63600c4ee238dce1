"""Which arguments of vLLM's engine `generation.vllm.overrides` may hold."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.config.spelling import nearest_name

OWN_KEYS = {
    "model": "policy.path", "tokenizer": "policy.path", "hf_config_path": "policy.path", "revision": "policy.revision",
    "tokenizer_revision": "policy.revision", "code_revision": "policy.revision",
    "trust_remote_code": "policy.trust_remote_code", "dtype": "generation.vllm.dtype",
    "max_model_len": "generation.vllm.max_model_len", "max_num_seqs": "generation.vllm.max_num_seqs",
    "enforce_eager": "generation.vllm.enforce_eager", "enable_sleep_mode": "generation.vllm.sleep",
    "gpu_memory_utilization": "generation.vllm.gpu_memory_utilization", "seed": "run.seed",
    "enable_lora": "ppo.sync", "max_loras": "ppo.sync", "max_lora_rank": "ppo.lora.rank",
    "lora_target_modules": "ppo.lora.targets", "weight_transfer_config": "ppo.weight_transfer",
}  # fmt: skip
"""Argument -> the key of this configuration that it follows from. `grm plan` and the rules of the configuration read
that key, so that a second place for the same setting would make them wrong."""
_SAMPLED = "log-probs must be those of the distribution that is sampled from, and the trainer computes it from the "
RELIED_ON = {
    "logprobs_mode": f"{_SAMPLED}logits and generation.temperature alone",
    "generation_config": f"{_SAMPLED}logits and generation.temperature alone, not from a file of the model",
    "override_generation_config": f"{_SAMPLED}logits and generation.temperature alone: set those",
    "logits_processors": f"{_SAMPLED}logits as they are",
    "watermark_config": f"{_SAMPLED}logits as they are",
    "diffusion_config": "responses are sampled token by token, each with its log-prob",
    "runner": "the engine must generate text",
    "convert": "the engine must generate text",
    "skip_tokenizer_init": "tokens go into the engine and come out of it, and the stages have the tokenizer",
    "distributed_executor_backend": "the ranks of a stage are the workers of its engines",
    "worker_extension_cls": "servers read new weights by an extension of this project",
    "hf_token": "a configuration is written into manifests and reports: set HF_TOKEN in the environment",
}
"""Argument -> why another value would break what the stages rely on."""
PARALLEL = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size",
    "decode_context_parallel_size",
)  # fmt: skip
"""Arguments that divide an engine, or its requests, among several workers."""


@cache
def engine_arguments() -> frozenset[str]:
    """The names of the arguments of vLLM's engine; empty where vLLM is not installed.

    They are read from vLLM's source, since its import takes seconds.
    """
    spec = find_spec("vllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    sources = [file for folder in folders if (file := Path(folder, "engine", "arg_utils.py")).is_file()]
    return frozenset().union(*(_fields(file.read_text(encoding="utf-8"), "EngineArgs") for file in sources))


def _fields(source: str, name: str) -> set[str]:
    """The fields of a dataclass, without those that begin with an underscore."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    annotated = [node.target for found in classes for node in found.body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in annotated if isinstance(target, ast.Name) and not target.id.startswith("_")}


def name_faults(overrides: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names of these overrides, one line each; empty when all is well."""
    known, found = engine_arguments(), []
    for name in overrides:
        if name in OWN_KEYS:
            found.append(f"{name} follows from {OWN_KEYS[name]}: set that")
        elif name in RELIED_ON:
            found.append(f"{name} cannot be changed: {RELIED_ON[name]}")
        elif known and name not in known:
            near = nearest_name(name.replace("-", "_"), sorted(known))
            hint = f": the nearest is {near}" if near else ""
            found.append(f"{name} is no argument of vLLM's engine{hint}")
    return found


def rank_faults(overrides: Mapping[str, Any], ranks: int) -> list[str]:
    """Why so many ranks cannot hold engines as these overrides say, one line each; empty when they can."""
    found = []
    for name in PARALLEL[1:]:
        if (overrides.get(name) or 1) != 1:
            found.append(f"generation.vllm.overrides.{name} is for ppo.vllm_servers, not for engines of ranks")
    size = overrides.get("tensor_parallel_size") or 1
    if not isinstance(size, int) or ranks % size:
        found.append(
            f"generation.vllm.overrides.tensor_parallel_size {size} does not divide {ranks} ranks, which would hold "
            "their engines in groups of that size: change it, or sample with ppo.vllm_servers"
        )
    return found
