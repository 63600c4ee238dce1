"""A moving average of the trained weights: often a better policy than the last one, at no cost in training."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from core.training import distributed
from core.training.weights import gathered

FILE = "ema.safetensors"


class WeightAverage:
    """theta_avg <- decay * theta_avg + (1 - decay) * theta after each step, from the initial weights on.

    Float32, in the first rank's host memory. The weights themselves may be bfloat16 and sharded: every rank calls
    `update`. With adapters it is their factors that are averaged.
    """

    def __init__(self, lm: nn.Module, decay: float):
        self._decay = decay
        self._trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        self.values: dict[nn.Parameter, Tensor] = {}
        """What `named_weights` takes in place of the weights; empty on every rank but the first."""
        self._blend(0.0)

    def update(self) -> None:
        self._blend(self._decay)

    def _blend(self, decay: float) -> None:
        for parameter in self._trained.values():
            with gathered([parameter]):
                if distributed.rank() == 0:
                    new = parameter.detach().float().cpu()
                    old = self.values.get(parameter, new)
                    self.values[parameter] = old * decay + new * (1 - decay)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        if distributed.rank() == 0:
            save_file({name: self.values[p].contiguous() for name, p in self._trained.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        if distributed.rank() == 0:
            saved = load_file(folder / FILE)
            self.values = {p: saved[name] for name, p in self._trained.items()}
