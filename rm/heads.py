"""Reward heads: hidden states [M, H] -> rewards [M, 1], in float32.

Calling a head is deterministic, in training and at inference. A head with a penalty of its own has `training_pass`,
which returns the rewards that the loss compares and the terms that the penalty is computed from.
"""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MLP_WIDTH = 1024
LATENT = 128
"""Dimensions of InfoRM's bottleneck."""


class Float32Linear(nn.Linear):
    """Computes in float32, whatever the type of its weights: many rewards would be equal in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


@runtime_checkable
class HeadWithTerms(Protocol):
    """A head whose loss reads more than the reward."""

    def training_pass(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The rewards that the loss compares [M, 1], and the terms of the head's penalty [M, ...].

        Whatever the penalty needs of the weights belongs to the terms: ZeRO-3 has whole weights only while the layer
        that holds them is called.
        """


class InformHead(nn.Module):
    """Variational bottleneck of InfoRM (2402.09345): z ~ N(mu(h), sigma(h)^2), reward = w z.

    At inference z is its mean, mu(h).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.encoder = Float32Linear(hidden_size, 2 * LATENT)
        self.decoder = Float32Linear(LATENT, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rewards: Tensor = self.decoder(self.encoder(hidden)[:, :LATENT])
        return rewards

    def training_pass(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [M, 1] of a z sampled with torch's global generator, and the KL of q(z|h) from N(0, I) [M, 1].

        The KL is in nats per latent dimension, as in the authors' code, so that its weight does not depend on how many
        dimensions there are. (They average means and variances over the dimensions first, which gives a lower bound of
        this mean.)
        """
        mean, log_std = self.encoder(hidden).chunk(2, dim=-1)
        log_std = log_std.clamp(-10.0, 4.0)  # neither exp(-10) nor exp(4) overflows
        sampled = mean + log_std.exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return self.decoder(sampled), kl.mean(-1, keepdim=True)


class DirectedLinear(Float32Linear):
    """A linear map that can also return the direction of its weight."""

    def forward(self, x: Tensor, *, direction: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """The output [..., 1]; with `direction` also the weight divided by its length [1, H]."""
        output = super().forward(x)
        return (output, F.normalize(self.weight.float(), dim=-1)) if direction else output


class OdinHead(nn.Module):
    """ODIN (2402.07319): quality + length is trained as the reward, and quality alone is used."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.quality = DirectedLinear(hidden_size, 1, bias=False)
        self.length = DirectedLinear(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        rewards: Tensor = self.quality(hidden)
        return rewards

    def training_pass(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """quality + length [M, 1]; and quality, length and the overlap of the two heads [M, 3].

        The overlap is |cos| of the angle between the two weights, 0 when they are orthogonal: the paper's L^O, for
        weights normalised to length one.
        """
        quality, of_quality = self.quality(hidden, direction=True)
        length, of_length = self.length(hidden, direction=True)
        overlap = (of_quality * of_length).sum().abs().expand_as(quality)
        return quality + length, torch.cat([quality, length, overlap], dim=-1)


def make_head(kind: str, hidden_size: int) -> nn.Module:
    """A new reward head on hidden states of size H.

    - `linear`: Linear(H, 1) without bias, its weights drawn from N(0, 1 / (H + 1)).
    - `mlp`: Linear(H, 1024), ReLU, Linear(1024, 1), as in GRM (2406.10216).
    - `inform`: `InformHead`. `odin`: `OdinHead`.
    - In checkpoints by other code: `linear_bias`, Linear(H, 1); `mlp:512x2`, twice [Linear(., 512), ReLU], then
      Linear(512, 1).

    Raises:
        ValueError: another kind.
    """
    if kind == "linear_bias":
        return Float32Linear(hidden_size, 1)
    if sizes_of_layers := re.fullmatch(r"mlp:(\d{1,6})x(\d{1,3})", kind):
        width, depth = map(int, sizes_of_layers.groups())
        sizes = [hidden_size, *[width] * depth]
        hidden = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (Float32Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, Float32Linear(width, 1))
    if kind == "linear":
        head = Float32Linear(hidden_size, 1, bias=False)
        nn.init.normal_(head.weight, std=1 / (hidden_size + 1) ** 0.5)
        return head
    if kind == "mlp":
        return nn.Sequential(Float32Linear(hidden_size, MLP_WIDTH), nn.ReLU(), Float32Linear(MLP_WIDTH, 1))
    if kind in ("inform", "odin"):
        return {"inform": InformHead, "odin": OdinHead}[kind](hidden_size)
    raise ValueError(f"head {kind!r}: known are linear, mlp, inform, odin")
