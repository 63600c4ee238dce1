"""Reading a causal LM tensor by tensor from its safetensors files into ZeRO-3's shards.

transformers loads it, so that names, conversions and what is missing or too much are what they are without shards. But
it reads a tensor when it is that tensor's turn, and a rank keeps only its share of it. (transformers' own way for
ZeRO-3, `HfDeepSpeedConfig`, reads the whole checkpoint on each rank first, and reports no unexpected tensors.)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from core.config import Model
from core.models import CausalLM
from core.training.sharding import Shards

IN_ORDER = "HF_DEACTIVATE_ASYNC_LOAD"
"""Variable by which transformers reads a tensor when it needs it. Else threads read ahead, up to the whole model."""


def read_in_shards(shards: Shards, model: Model, config: Any, **options: Any) -> tuple[CausalLM, dict[str, Any]]:
    """What `AutoModelForCausalLM.from_pretrained` with `output_loading_info` gives, its parameters divided.

    Checkpoints in other files than safetensors, quantised ones, and models with code of their own are read whole first.

    Args:
        config: of the model, in transformers' form.
        options: of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    files = _files(model)
    has_own_code = model.trust_remote_code and hasattr(config, "auto_map")
    if not files or has_own_code or getattr(config, "quantization_config", None) is not None:
        where = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        return AutoModelForCausalLM.from_pretrained(model.path, config=config, **options, **where)
    with torch.random.fork_rng(devices=()), torch.device("meta"):  # an adapter is drawn later, with the same numbers
        empty: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    # Weights that are tied but stand in the files twice are compared by the loader, which needs them whole.
    tied = getattr(empty, "all_tied_weights_keys", {})
    whole = {tuple(empty.get_parameter(name).shape) for pair in tied.items() for name in pair}
    bias = getattr(empty.get_output_embeddings(), "bias", None)
    whole |= {tuple(bias.shape)} if bias is not None else set()  # the loader pads it to the length of the embeddings
    if type(empty.config) is not type(config):  # of a model that reads images too, the part that reads text
        config = config.get_text_config()
    with _slices(files) as slices, _in_order(), shards.reading(whole):
        lm, info = type(empty).from_pretrained(None, config=config, state_dict=slices, **options)
    lm.name_or_path = lm.config.name_or_path = model.path
    return lm, info


def _files(model: Model) -> Sequence[str]:
    """The safetensors files of a checkpoint, in the order in which transformers looks for them; empty for none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    def found(name: str) -> str | None:
        missing_is_none = {"_raise_exceptions_for_missing_entries": False}
        return cached_file(model.path, name, revision=model.revision, **missing_is_none)

    if file := found(SAFE_WEIGHTS_NAME):
        return [file]
    if index := found(SAFE_WEIGHTS_INDEX_NAME):
        return get_checkpoint_shard_files(model.path, index, revision=model.revision)[0]
    return []


@contextmanager
def _slices(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Name -> what reads the tensor when it is indexed with `...`, inside the block.

    The files are not mapped into memory: what was read of a mapped file stays in the process's memory.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in files]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


@contextmanager
def _in_order() -> Iterator[None]:
    before = os.environ.get(IN_ORDER)
    os.environ[IN_ORDER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[IN_ORDER]
        else:
            os.environ[IN_ORDER] = before
