"""Reward heads: hidden states [M, H] -> rewards [M, 1], in float32.

Calling a head is deterministic, in training as at inference. Heads whose loss reads more than the reward have
`training_pass`, which returns what the reward loss compares and what the head's own penalty is made of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MLP_WIDTH = 1024
LATENT = 128
"""Dimensions of InfoRM's bottleneck."""


class Float32Linear(nn.Linear):
    """Computes in float32 whatever the type its weights are kept in: bf16 rewards tie in masses."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class InformHead(nn.Module):
    """Variational bottleneck of InfoRM (2402.09345): z ~ N(mu(h), sigma(h)^2), reward = w z; the mean at inference."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.encoder = Float32Linear(hidden_size, 2 * LATENT)
        self.decoder = Float32Linear(LATENT, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.encoder(hidden)[:, :LATENT])

    def training_pass(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards of a sampled z [M, 1], and KL(q(z|h) || N(0, I)) in nats [M, 1]."""
        mean, log_std = self.encoder(hidden).chunk(2, dim=-1)
        log_std = log_std.clamp(-10.0, 4.0)  # exp of neither end overflows
        sampled = mean + log_std.exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return self.decoder(sampled), kl.sum(-1, keepdim=True)


class OdinHead(nn.Module):
    """ODIN (2402.07319): the trained reward is quality + length, the reward that is used is quality alone."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.quality = Float32Linear(hidden_size, 1, bias=False)
        self.length = Float32Linear(hidden_size, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.quality(hidden)

    def training_pass(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """quality + length [M, 1], and both apart [M, 2]."""
        parts = torch.cat([self.quality(hidden), self.length(hidden)], dim=-1)
        return parts.sum(-1, keepdim=True), parts

    def overlap(self) -> Tensor:
        """|cos| of the two directions: 0 when they are orthogonal (the paper's L^O, of weights of length one)."""
        return F.cosine_similarity(self.quality.weight.float(), self.length.weight.float()).abs().squeeze()


def make_head(kind: str, hidden_size: int) -> nn.Module:
    """`linear`: Linear(H, 1) without bias. `mlp`: Linear(H, 1024), ReLU, Linear(1024, 1) as in GRM (2406.10216).

    `inform`, `odin`: above. Forms that only checkpoints have: `linear_bias`; `mlp:512x2`, two times [Linear(., 512),
    ReLU], then Linear(512, 1).
    """
    if kind == "linear_bias":
        return Float32Linear(hidden_size, 1)
    if kind.startswith("mlp:"):
        width, depth = map(int, kind.removeprefix("mlp:").split("x"))
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


def zero_output(model: nn.Module) -> None:
    """Make `model.head` give 0 everywhere, keeping the layers below its last one: the start of a critic.

    A head that is not a plain chain of layers becomes a linear one.
    """
    if isinstance(model.head, nn.Sequential):
        last = model.head[-1]
    elif isinstance(model.head, Float32Linear):
        last = model.head
    else:
        like = next(model.head.parameters())
        model.head_kind = "linear"
        model.head = make_head("linear", model.lm.config.hidden_size).to(dtype=like.dtype, device=like.device)
        last = model.head
    for weight in last.parameters():
        nn.init.zeros_(weight)
