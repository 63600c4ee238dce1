"""Sampling with vLLM in this process.

vLLM runs in the process of the stage (one vLLM per rank), on CPU and GPU alike, so new weights are handed over as
tensors. A run is reproducible because torch's global generator, from which vLLM samples, is seeded before each call:
seeds in `SamplingParams` crash vLLM on CPU. The prefix cache is dropped before each call too, since keys and values
that an earlier call has computed in another batch may be rounded otherwise.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core.config import Generation, Lora, Model
from core.data.chat import ChatTokenizer
from core.errors import ConfigError, DataError
from core.generation.options import engine_options
from core.generation.tensor_parallel import EngineGroup, use_gloo_on_cpu
from core.starting import collect


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response."""

    token_ids: list[int]
    """Response tokens, the end of turn included when it was sampled."""
    logprobs: list[float]
    """Of each token, in nats, at the sampling temperature, as vLLM computed them."""
    text: str
    """Decoded without special tokens."""
    finished: bool
    """False when cut off by max_new_tokens."""


class Generator:
    """vLLM in this process, behind `generate`, `sync`, `sleep` and `wake`.

    In a torch.distributed program every rank makes one, and each samples its own prompts. Where several ranks hold one
    engine together (`tensor_parallel_size`), all of them must make the same calls.

    Args:
        adapter: the kind of adapter that `load_adapter` will be given; None if it will not be called.

    Attributes:
        seconds: wall-clock seconds spent in `generate` and in `sync` so far.
    """

    def __init__(self, model: Model, cfg: Generation, tokenizer: ChatTokenizer, *, adapter: Lora | None = None):
        # vLLM warns of what a CPU lacks before it has read its own level.
        logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
        self._adapter, self._loaded = None, 0
        self.cfg, self.tokenizer = cfg, tokenizer
        self.seconds = {"generate": 0.0, "sync": 0.0}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cfg.vllm.cpu_kvcache_gib))
        self._sleeps = torch.cuda.is_available() and cfg.vllm.sleep
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else None
        options = engine_options(model, cfg.vllm, adapter=adapter, ranks=ranks)
        size = options.get("tensor_parallel_size", 1)
        if size > 1:
            use_gloo_on_cpu()
        self._llm = _engine(options, cfg.vllm.overrides)
        self._group = EngineGroup(size)
        self._llm.apply_model(separate_classes)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        seed: int,
        temperature: float | None = None,
        top_p: float = 1.0,
    ) -> list[list[Completion]]:
        """`n` responses to each prompt of token ids, in the order of the prompts.

        Args:
            temperature: in place of the configured one, for samples that nothing is trained on.
            top_p: below 1 for such samples only: from a part of the vocabulary, log-probs are not the policy's.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            n=n,
            temperature=temperature or self.cfg.temperature,
            top_p=top_p,
            max_tokens=self.cfg.max_new_tokens,
            stop_token_ids=self.tokenizer.stop_ids,
            logprobs=0,
            detokenize=False,
        )
        self._drop_prefixes()
        torch.manual_seed(self._group.first(seed))
        return self._run(prompts, sampling)

    def greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Completion]:
        """The most probable next tokens, `max_tokens` of them, and their log-probs at temperature 1.

        Made for comparisons with another implementation.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0, ignore_eos=True, detokenize=False)
        return [group[0] for group in self._run(prompts, sampling)]

    def logprobs_of(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs, in nats at temperature 1, of every token but the first of each sequence, given those before it."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._group.together(sequences, lambda everyones: self._outputs(everyones, sampling))
        return [
            [at[token].logprob for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def close(self) -> None:
        """Free the memory of vLLM, for the models that come after it. Nothing is sampled afterwards."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace vLLM's weights.

        A tied LM head is skipped by name. On CPU vLLM keeps a packed copy of it, which is packed again here, since
        vLLM's own reload does not do so. The prefix cache is dropped, since it holds keys and values of the old
        weights. That vLLM computes with the new weights is proved elsewhere, by log-probs (`ppo.probe`).

        Args:
            named_tensors: (name, tensor) as in the Hugging Face model.

        Raises:
            DataError: vLLM did not drop its prefix cache.
        """
        started = time.perf_counter()
        tied = self._llm.llm_engine.model_config.hf_config.tie_word_embeddings
        weights = ((name, t) for name, t in named_tensors if not (tied and name == "lm_head.weight"))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.apply_model(repack_tied_lm_head)
        self._drop_prefixes()
        self.seconds["sync"] += time.perf_counter() - started

    def load_adapter(self, folder: Path) -> None:
        """Sample with this LoRA adapter (PEFT's files) on vLLM's weights from now on, in place of the last adapter.

        Nothing is merged, so nothing is rounded away. No cached prefix is wrong either, since each adapter has a number
        of its own, which is part of a prefix's key.
        """
        from vllm.lora.request import LoRARequest

        started = time.perf_counter()
        old, self._loaded = self._adapter, self._loaded + 1
        self._adapter = LoRARequest(f"step-{self._loaded}", self._loaded, str(folder))
        if old:
            self._llm.llm_engine.remove_lora(old.lora_int_id)
        self._llm.llm_engine.add_lora(self._adapter)
        self.seconds["sync"] += time.perf_counter() - started

    def sleep(self) -> None:
        """Give the GPU memory of weights and KV cache to the models that train; does nothing on CPU."""
        if self._sleeps:
            self._llm.sleep(level=1)

    def wake(self, *parts: Literal["weights", "kv_cache"]) -> None:
        """Take the memory that `sleep` gave back.

        Args:
            parts: only these, where a sync needs the weights before sampling needs the cache; by default both. Both
                must be awake before vLLM is used or put to sleep.
        """
        if self._sleeps:
            torch.cuda.empty_cache()  # what torch keeps for itself of the trainer's memory, vLLM cannot have
            self._llm.wake_up(list(parts) or None)

    def _drop_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise DataError("vLLM did not drop its prefix cache: it would use keys of other weights or another batch")

    def _run(self, prompts, sampling) -> list[list[Completion]]:
        started = time.perf_counter()
        outputs = self._group.together(prompts, lambda everyones: self._outputs(everyones, sampling))
        self.seconds["generate"] += time.perf_counter() - started
        return [[self._completion(sample) for sample in output.outputs] for output in outputs]

    def _outputs(self, rows: Sequence[Sequence[int]], sampling) -> list:
        inputs = [{"prompt_token_ids": list(ids)} for ids in rows]
        return self._llm.generate(inputs, sampling, use_tqdm=False, lora_request=self._adapter)

    def _completion(self, sample) -> Completion:
        ids = list(sample.token_ids)
        logprobs = [step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)]
        return Completion(ids, logprobs, self.tokenizer.decode(ids), sample.finish_reason == "stop")


def _engine(options: dict[str, Any], overrides: dict[str, Any]):
    """vLLM with these arguments; ConfigError where it refuses them and the user has set some."""
    from vllm import LLM

    _leave_out_token_ranks()
    gc.freeze()  # vLLM collects garbage five times as it starts, among millions of objects that stay
    preloaded = os.environ.get("LD_PRELOAD")
    try:
        return LLM(**options)
    except (TypeError, ValueError) as error:
        if not overrides:
            raise
        raise ConfigError(f"vLLM refuses generation.vllm.overrides {overrides}: {error}") from error
    finally:
        # vLLM names libraries for workers, of which there are none here. Other programs that this process starts would
        # load them too, or complain on stderr where the path of one has a space.
        if preloaded is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preloaded


def _leave_out_token_ranks() -> None:
    """Keep vLLM from counting the tokens that are more probable than each sampled one, which nothing here reads.

    The count is compiled where vLLM runs first: some 20 seconds of the first start on a machine, two of every other.
    """
    from vllm.v1.sample import sampler

    sampler.batched_count_greater_than = lambda logprobs, of_token: torch.ones_like(of_token[:, 0], dtype=torch.int64)


def separate_classes(model) -> None:
    """Give modules of vLLM's model classes of their own where it has changed those of transformers.

    For families without an implementation in vLLM (Pythia, OLMo-2, SmolLM3) it adds compilation to transformers' own
    class of the decoder. No model of that class could then be loaded beside vLLM.
    """
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper as Compiled

    for module in model.modules():
        kind = type(module)
        if not kind.__module__.startswith("transformers.") or Compiled not in kind.__bases__:
            continue
        added = {name: vars(kind)[name] for name in ("__init__", "__call__") if name in vars(kind)}
        kind.__init__ = inspect.getclosurevars(kind.__init__).nonlocals["old_init"]
        if "__call__" in added:
            del kind.__call__
        kind.__bases__ = tuple(base for base in kind.__bases__ if base is not Compiled)
        module.__class__ = type(kind.__name__, (kind, Compiled), added)


def repack_tied_lm_head(model) -> None:
    """Pack the tied LM head of vLLM's model again: on CPU vLLM keeps a packed copy that its reload leaves as it was."""
    from vllm.platforms import current_platform

    head = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "cpu_linear") and model.config.tie_word_embeddings:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
