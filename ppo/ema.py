"""A moving average of the trained weights: often a better policy than the last one, at hardly any cost."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from core.errors import ArtefactError
from core.files import file_digest, read_tensors
from core.training import distributed
from core.training.sharding import gathered

FILE = "ema.safetensors"
"""Name of the file that `save` writes."""


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after each step, starting at the initial weights.

    The average is float32 and in host memory of the first rank. The weights themselves may be bfloat16 and sharded, so
    every rank must make one and call its methods. With adapters their factors A and B are averaged.

    Args:
        lm: its parameters with `requires_grad` are averaged.
        decay: per call of `update`, in (0, 1).
    """

    def __init__(self, lm: nn.Module, decay: float):
        self._decay = decay
        self._trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        self.values: dict[nn.Parameter, Tensor] = {}
        """Parameter -> its average: the `values` of `named_weights`. Empty on all ranks but the first."""
        self._blend(0.0)

    def update(self) -> None:
        """Blend in the weights as they are now."""
        self._blend(self._decay)

    def _blend(self, decay: float) -> None:
        for parameter in self._trained.values():
            with gathered([parameter]):
                if distributed.rank() == 0:
                    new = parameter.detach().float().cpu()
                    old = self.values.get(parameter, new)
                    self.values[parameter] = old * decay + new * (1 - decay)

    def save(self, folder: Path) -> None:
        """Write FILE into `folder`, on the first rank."""
        from safetensors.torch import save_file

        if distributed.rank() == 0:
            save_file({name: self.values[p].contiguous() for name, p in self._trained.items()}, folder / FILE)

    def digest(self, folder: Path) -> str:
        """SHA-256 of what `save` wrote into `folder`."""
        return file_digest(folder / FILE)

    def load(self, folder: Path, sha256: str | None) -> None:
        """Continue from what `save` wrote into `folder`.

        Args:
            sha256: of the file; None for one of an earlier version, which recorded none.

        Raises:
            ArtefactError: the file is damaged.
        """
        if distributed.rank() == 0:
            if sha256 is not None and self.digest(folder) != sha256:
                raise ArtefactError(f"{folder / FILE} is damaged: delete {folder.parent} to start the stage again")
            saved = read_tensors(folder / FILE)
            self.values = {p: saved[name] for name, p in self._trained.items()}
