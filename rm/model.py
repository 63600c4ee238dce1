"""The reward model: a causal LM's trunk, a reward head on the last real token, and the LM head for GRM's regulariser.

The critic of PPO is the same module read at other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from core.batching import Batch, Targets
from core.config import NATIVE_DTYPE, Model
from core.data.chat import ChatTokenizer, Message
from core.errors import ArtefactError
from core.models.layers import FrozenStates, hidden_states
from core.models.loading import load_causal_lm
from core.models.logprobs import token_logprobs
from core.training.distributed import device
from rm.checkpoints import adapters, foreign
from rm.checkpoints.folder import locate
from rm.checkpoints.layout import ABOUT_FILE, ADAPTER_FORMAT, Parts, read_about, read_head, read_tokenizer
from rm.heads import Float32Linear, make_head
from rm.score import score


class RewardModel(nn.Module):
    """B conversations, L tokens, H hidden size.

    Attributes:
        lm: the causal LM (its LM head is used only for log-probs that are asked for).
        head: maps hidden states to rewards, in float32.
        mean, std: of this model's rewards on samples of the reference policy; `normalise` uses them.
    """

    def __init__(self, lm: nn.Module, head_kind: str, tokenizer: ChatTokenizer, *, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.lm, self.head_kind, self.tokenizer = lm, head_kind, tokenizer
        self.head = make_head(head_kind, lm.config.hidden_size)
        self.mean, self.std = mean, std

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        positions: Tensor | None = None,
        read: Tensor | None = None,
        targets: Targets | None = None,
        frozen: FrozenStates | None = None,
        head_terms: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rewards, and log-probs where asked; inputs as in `core.models.layers.hidden_states`.

        Args:
            input_ids: [B, L].
            read: [R] into the flattened [B * L], where the head is read; default the last real token of each row.
            targets: tokens whose log-probs are summed by response; only their logits are computed.
            head_terms: run the head's `training_pass`, where it has one.

        Returns:
            float32 rewards [R] ([B] by default), summed log-probs [R] or None, the head's terms [R, .] or None.
        """
        hidden = hidden_states(self.lm, input_ids, attention_mask, positions=positions, frozen=frozen)
        if read is None:
            read = torch.arange(len(hidden), device=hidden.device) * hidden.shape[1] + last_real_token(attention_mask)
        flat = hidden.flatten(0, 1)
        if head_terms and hasattr(self.head, "training_pass"):
            rewards, terms = self.head.training_pass(flat[read])
        else:
            rewards, terms = self.head(flat[read]), None
        rewards = rewards.squeeze(-1)
        if targets is None:
            return rewards, None, terms
        logps, _ = token_logprobs(_lm_head(self.lm), flat[targets.source], targets.token)
        return rewards, logps.new_zeros(len(read)).index_add(0, targets.response, logps), terms

    def zero_head(self) -> None:
        """Make the head give 0 everywhere, keeping the layers before its last one: the start of a critic.

        A head that is not a chain of layers (`inform`, `odin`) becomes a linear one.
        """
        if not isinstance(self.head, nn.Sequential | Float32Linear):
            like = next(self.head.parameters())
            self.head_kind = "linear"
            self.head = make_head("linear", self.lm.config.hidden_size).to(dtype=like.dtype, device=like.device)
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        for weight in last.parameters():
            nn.init.zeros_(weight)

    def normalise(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations from the mean of the reference policy's samples."""
        return (rewards - self.mean) / self.std

    def score(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        batch_tokens: int = 8192,
        frozen: Callable[[Batch], FrozenStates] | None = None,
        progress: str = "",
    ) -> Tensor:
        """Float32 rewards [n] of conversations, in their order; `frozen` as in `rm.score.score_tokens`."""
        where = next(self.parameters()).device
        return score(
            self, self.tokenizer, conversations, batch_tokens=batch_tokens, share=self.shares_prompts, frozen=frozen,
            device=where, progress=progress,
        )  # fmt: skip

    @property
    def shares_prompts(self) -> bool:
        """Whether responses may share a row with their prompt: not where a kernel or layer has a mask of its own."""
        config = self.lm.config
        return not config._attn_implementation.startswith("flash") and not getattr(config, "sliding_window", None)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str = NATIVE_DTYPE, attention: str = "sdpa", base: str | Path | None = None
    ) -> RewardModel:
        """A reward model in a folder or on the hub: of stage `rm`, whole or an adapter, or one that other code wrote.

        Args:
            base: of a LoRA checkpoint, in place of the base that it names.

        Raises:
            ArtefactError: anything that does not fit.
        """
        folder = locate(path)
        if (folder / ABOUT_FILE).is_file():
            parts = _read_own(folder, dtype=dtype, attention=attention, base=base)
        else:
            parts = foreign.read(folder, dtype=dtype, attention=attention, base=base)
        model = cls(parts.lm, parts.head_kind, parts.tokenizer, mean=parts.mean, std=parts.std)
        model.head.load_state_dict(dict(parts.head))
        return model.eval().to(device())


def _read_own(folder: Path, *, dtype: str, attention: str, base: str | Path | None) -> Parts:
    """A folder of this project."""
    about = read_about(folder)
    tokenizer = read_tokenizer(folder, about)
    if about["format"] == ADAPTER_FORMAT:
        lm = adapters.merged(adapters.Adapter.open(folder, base), dtype=dtype, attention=attention)
    elif base is not None:
        raise ArtefactError(f"{folder} is not a LoRA checkpoint, so it cannot be put on the base {base}")
    else:
        lm = load_causal_lm(Model(path=str(folder), attention=attention), dtype=dtype)
    head = read_head(folder, about["head"], lm.config.hidden_size)
    return Parts(lm, about["head"], head, tokenizer, about["mean"], about["std"])


def last_real_token(attention_mask: Tensor) -> Tensor:
    """Column of the last 1 in each row [B], for left and right padding alike."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * columns).argmax(-1)


def _lm_head(lm: nn.Module) -> nn.Module:
    return lm.get_output_embeddings()
