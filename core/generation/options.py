"""Arguments of vLLM's engine: those that follow from the configuration, with the user's own laid over them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from core.config import Lora, Model, Vllm
from core.config.base import merge
from core.config.vllm_arguments import PARALLEL, rank_faults
from core.errors import ConfigError
from core.generation.cpu_kernels import fused_kernels

_log = logging.getLogger(__name__)

FLAGS = ("disable_log_stats", "aggregate_engine_logging", "data_parallel_multi_port_external_lb")
"""Options of vLLM's command line that have no opposite: false is to leave them out."""


def engine_options(model: Model, vllm: Vllm, *, adapter: Lora | None, ranks: int | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine in this process.

    Args:
        adapter: the kind of adapter that it will be given, if any.
        ranks: of the process group that this process is in, if any.

    Raises:
        ConfigError: so many ranks cannot hold engines as `generation.vllm.overrides` say.
    """
    overrides = dict(vllm.overrides)
    if ranks is None:
        for name in [name for name in PARALLEL if overrides.pop(name, None) not in (None, 1)]:
            _log.warning("generation.vllm.overrides.%s is for ppo and servers: this process has a whole engine", name)
    elif faults := rank_faults(overrides, ranks):
        raise ConfigError("; ".join(faults))
    cuda = torch.cuda.is_available()
    options = _of_both(model, vllm) | {
        # Ranks of a torchrun job: vLLM joins the process group that exists instead of starting workers.
        "distributed_executor_backend": "external_launcher" if ranks and ranks > 1 else None,
        "skip_tokenizer_init": True,  # tokens go in, tokens come out
        "disable_log_stats": True,
    }
    if vllm.block_size and not cuda:
        options |= {"block_size": vllm.block_size}
    if adapter:
        # vLLM knows these ranks only; a smaller adapter fits a larger slot.
        slot = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= adapter.rank)
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": slot}
        # Without this vLLM wraps the LM head too, and then cannot give log-probs of prompts.
        options |= {"lora_target_modules": list(adapter.targets)}
    if reads_images(model):  # only text is sampled here, so that the rest of such a model need not be in memory
        options |= {"language_model_only": True}
    if cuda:
        options |= {"gpu_memory_utilization": vllm.gpu_memory_utilization, "enable_sleep_mode": vllm.sleep}
    elif vllm.enforce_eager:
        options |= fused_kernels()
    return laid_over(options, overrides)


def _of_both(model: Model, vllm: Vllm) -> dict[str, Any]:
    """What an engine in the process and a server have in common."""
    return {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": vllm.dtype,
        "max_model_len": vllm.max_model_len,
        "max_num_seqs": vllm.max_num_seqs,
        "enforce_eager": vllm.enforce_eager,
        # Log-probs of the distribution that is sampled from, temperature included.
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
    }


def server_options(model: Model, vllm: Vllm, *, nccl: bool) -> dict[str, Any]:
    """The same for a vLLM server.

    Args:
        nccl: new weights come over NCCL, otherwise from a file.
    """
    options = _of_both(model, vllm) | {
        "worker_extension_cls": "core.generation.worker.WeightReload",
    }
    if nccl:
        options |= {"weight_transfer_config": {"backend": "nccl"}}
    return laid_over(options, vllm.overrides)


def laid_over(options: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with `overrides` laid over them, at every depth; null leaves an argument to vLLM."""
    return {name: value for name, value in merge(options, dict(overrides)).items() if value is not None}


def command_line(options: Mapping[str, Any]) -> list[str]:
    """These arguments as options of vLLM's server."""
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            if value or name not in FLAGS:
                words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            words += [option, *map(_word, value)]
        else:
            words.append(f"{option}={_word(value)}")  # one word, since a value may begin with a dash
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (Mapping, list)) else str(value)


def reads_images(model: Model) -> bool:
    """Whether the language model is a part of a larger one."""
    from transformers import AutoConfig

    from core.models.architecture import text_config

    where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = AutoConfig.from_pretrained(model.path, **where)
    return text_config(config) is not config
