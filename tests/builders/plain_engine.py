"""The part of `core.training.engine.Engine` that an update uses, in plain PyTorch; and a policy that is a table."""

from __future__ import annotations

import torch
from torch import nn


class PlainEngine:
    """One process; losses are divided by the number of accumulated passes, as DeepSpeed does."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int = 1, clip: float = 1e9):
        self.module, self.optimizer, self.accumulation, self.clip = module, optimizer, accumulation, clip
        self.grad_norm, self._passes, self.continues = 0.0, 0, 0

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self._passes += 1
        if self._passes % self.accumulation == 0:
            self.grad_norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def trained_values(self):
        return (p.detach() for p in self.module.parameters() if p.requires_grad)


class TablePolicy(nn.Module):
    """Logits for each (prompt, tokens so far): `states` maps the columns read so far to a row of the table."""

    def __init__(self, states: int, vocabulary: int, state_of):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(states, vocabulary))
        self.state_of = state_of

    def forward(self, input_ids, attention_mask, is_response, *, with_entropy=False, frozen=None):
        logp = self.table[self.state_of(input_ids)[:, :-1]].log_softmax(-1)
        chosen = logp.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        return torch.where(is_response, chosen, 0.0), None


class TableCritic(nn.Module):
    def __init__(self, states: int, state_of):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(states))
        self.state_of = state_of

    def forward(self, input_ids, attention_mask, *, read, frozen=None):
        return self.table[self.state_of(input_ids)].flatten()[read], None, None
