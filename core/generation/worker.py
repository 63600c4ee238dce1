"""What `grm vllm-serve` adds to vLLM's worker so that it can read new weights from a file. Runs in vLLM's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.generation.local import repack_tied_lm_head


class WeightReload:
    """Given to vLLM as `--worker-extension-cls`; its methods are called over /collective_rpc."""

    # What the worker has that vLLM mixes this class into.
    reload_weights: Callable[..., None]
    model_runner: Any

    def reload_from(self, path: str) -> None:
        """Replace the weights by those of a safetensors file."""
        from safetensors.torch import load_file

        self.reload_weights(weights_iterator=iter(load_file(path).items()))
        repack_tied_lm_head(self.model_runner.get_model())
