"""The reward model: a causal LM without its LM head, and a reward head that reads the last real token.

GRM's text regulariser reads the LM head too. The critic of PPO is the same module, read at other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from core.batching import Batch, Targets
from core.config import NATIVE_DTYPE, Attention, Model
from core.data.chat import ChatTokenizer, Message
from core.data.rows import ResponseRow
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.agreement import can_share_prompts, skip_padding
from core.models.architecture import hidden_size, max_positions
from core.models.layers import FrozenStates, hidden_states, skips_padding
from core.models.loading import load_causal_lm
from core.models.logits import LmHead, leave_out_lm_head
from core.models.logprobs import token_logprobs
from core.training.distributed import device
from core.training.sharding import Shards
from rm.checkpoints import adapters, foreign
from rm.checkpoints.folder import locate
from rm.checkpoints.layout import ABOUT_FILE, ADAPTER_FORMAT, Parts, kept_kernel, read_about, read_head, read_tokenizer
from rm.heads import Float32Linear, HeadWithTerms, make_head
from rm.reading import Reader, Reads, Tokens
from rm.score import Limits, score_tokens

UNPADDED_ROW = 8192
"""Tokens of a shared row where attention is not computed on the whole row."""


class RewardModel(nn.Module):
    """A causal LM with a reward head. B conversations of L tokens, hidden size H.

    Attributes:
        lm: the causal LM; its LM head is used only where log-probs are requested, and may be left out elsewhere.
        head_kind: as in `rm.heads.make_head`.
        head: maps hidden states [M, H] to rewards [M, 1], in float32.
        tokenizer: of the LM.
        mean, std: of this model's rewards on samples of the reference policy, for `normalise`.
        shares_prompts: whether responses may share a row with their prompt, as in `can_share_prompts`.
        reads: which tokens of a conversation it reads (`rm.reading`).
        head_dropout: share of the head's inputs that is set to 0 in training mode.
    """

    lm: CausalLM
    head_dropout = 0.0

    def __init__(
        self, lm: CausalLM, head_kind: str, tokenizer: ChatTokenizer, *,
        mean: float = 0.0, std: float = 1.0, reads: Reads = "end_of_turn",
    ):  # fmt: skip
        super().__init__()
        self.lm, self.head_kind, self.tokenizer = lm, head_kind, tokenizer
        self.head = make_head(head_kind, hidden_size(lm))
        self.mean, self.std, self.reads = mean, std, reads
        skip_padding(lm)  # here, because an engine may shard the weights later
        self.shares_prompts = can_share_prompts(lm)

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
        """Rewards, and log-probs where requested.

        Args:
            input_ids, attention_mask, positions, frozen: as in `core.models.layers.hidden_states`.
            read: indices [R] into the flattened [B * L], where the head reads; by default the last real token of each
                row.
            targets: tokens whose log-probs are summed per response; only their logits are computed.
            head_terms: run the head's `training_pass`, if it has one.

        Returns:
            Float32 rewards [R] ([B] by default); summed log-probs [R] in nats, or None without `targets`; and the terms
            of the head's own penalty [R, ...], or None.
        """
        hidden = hidden_states(self.lm, input_ids, attention_mask, positions=positions, frozen=frozen)
        if read is None:
            read = torch.arange(len(hidden), device=hidden.device) * hidden.shape[1] + last_real_token(attention_mask)
        flat = hidden.flatten(0, 1)
        states = F.dropout(flat[read], self.head_dropout, self.training) if self.head_dropout else flat[read]
        if head_terms and isinstance(self.head, HeadWithTerms):
            rewards, terms = self.head.training_pass(states)
        else:
            rewards, terms = self.head(states), None
        rewards = rewards.squeeze(-1)
        if targets is None:
            return rewards, None, terms
        logps, _ = token_logprobs(LmHead.of(self.lm), flat[targets.source], targets.token)
        return rewards, logps.new_zeros(len(read)).index_add(0, targets.response, logps), terms

    def zero_head(self) -> None:
        """Make the head give 0 everywhere, keeping the layers before its last one: the start of a critic.

        A head that is not a chain of layers (`inform`, `odin`) becomes a linear one.
        """
        if not isinstance(self.head, nn.Sequential | Float32Linear):
            like = next(self.head.parameters())
            self.head_kind = "linear"
            self.head = make_head("linear", hidden_size(self.lm)).to(dtype=like.dtype, device=like.device)
        last = self.head[-1] if isinstance(self.head, nn.Sequential) else self.head
        for weight in last.parameters():
            nn.init.zeros_(weight)

    def normalise(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations from the mean, both of the reference policy's samples; elementwise."""
        return (rewards - self.mean) / self.std

    def score(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        batch_tokens: int = 8192,
        frozen: Callable[[Batch], FrozenStates] | None = None,
        progress: str | tqdm = "",
    ) -> Tensor:
        """Float32 rewards [n] of conversations, on the CPU and in their order.

        Args:
            conversations: messages each, the assistant's response last.
            batch_tokens: tokens per batch, at most; padding counts where it is computed.
            frozen: gives the frozen states of a batch, as in `rm.score.score_tokens`.
            progress: title of a progress bar, or a bar of the caller's; none by default.

        Raises:
            DataError: a conversation does not end with the assistant or is longer than `positions`; a reward is not
                finite.
        """
        reader = self.reader
        tokens = [reader.conversation(messages) for messages in conversations]
        return self.score_tokens(tokens, batch_tokens=batch_tokens, frozen=frozen, progress=progress)

    def score_rows(
        self,
        rows: Sequence[ResponseRow],
        *,
        batch_tokens: int = 8192,
        frozen: Callable[[Batch], FrozenStates] | None = None,
        progress: str | tqdm = "",
    ) -> Tensor:
        """As `score`, of sampled responses: by the tokens that the policy made, where they are this model's."""
        reader = self.reader
        tokens = [reader.row(row) for row in rows]
        return self.score_tokens(tokens, batch_tokens=batch_tokens, frozen=frozen, progress=progress)

    def score_tokens(
        self,
        tokens: Sequence[Tokens],
        *,
        batch_tokens: int = 8192,
        frozen: Callable[[Batch], FrozenStates] | None = None,
        progress: str | tqdm = "",
    ) -> Tensor:
        """As `score`, of token ids."""
        return score_tokens(
            self, self.tokenizer, tokens, batch_tokens=batch_tokens, limits=self.limits, frozen=frozen,
            device=next(self.parameters()).device, progress=progress,
        )  # fmt: skip

    @property
    def limits(self) -> Limits:
        """How it takes rows of tokens."""
        row_tokens = (UNPADDED_ROW if self.skips_padding else Limits().row_tokens) if self.shares_prompts else 0
        return Limits(self.positions, row_tokens, padded=not self.skips_padding)

    @property
    def skips_padding(self) -> bool:
        """Whether passes leave padding out, as in `core.models.layers.skips_padding`."""
        return skips_padding(self.lm)

    @property
    def reader(self) -> Reader:
        """Makes the tokens that this model reads."""
        return Reader(self.tokenizer, self.reads)

    @property
    def positions(self) -> int:
        """How many tokens a conversation may have."""
        return max_positions(self.lm)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = NATIVE_DTYPE,
        attention: Attention = "auto",
        base: str | Path | None = None,
        reads: Reads | None = None,
        where: str | None = None,
        shards: Shards | None = None,
        lm_head: bool = True,
    ) -> RewardModel:
        """A reward model from a folder or the hub: of stage `rm` (whole or an adapter), or written by other code.

        Args:
            dtype: of the weights.
            attention: kernel, as in `policy.attention`; auto is the one that the model was trained with, where its
                files say so.
            base: base model of a LoRA checkpoint, in place of the one that it names.
            reads: which tokens it reads, in place of what its folder or its layout says (`rm.reading`).
            where: the device; None for this rank's.
            shards: as in `core.models.loading.load_causal_lm`, for models that this project wrote; `where` is not used.
            lm_head: False leaves out an LM head with weights of its own, for a model that only gives rewards.

        Returns:
            The model in eval mode.

        Raises:
            ArtefactError: no reward model there, or something of it does not fit the rest; names the folder.
        """
        folder = locate(path)
        if (folder / ABOUT_FILE).is_file():
            parts = _read_own(folder, dtype=dtype, attention=attention, base=base, shards=shards)
        else:
            parts = foreign.read(folder, dtype=dtype, attention=attention, base=base)
        if not lm_head:
            leave_out_lm_head(parts.lm)
        model = cls(
            parts.lm, parts.head_kind, parts.tokenizer, mean=parts.mean, std=parts.std, reads=reads or parts.reads
        )
        model.head.load_state_dict(dict(parts.head))
        return model.eval().to(device() if shards else where or device())


def _read_own(
    folder: Path, *, dtype: str, attention: Attention, base: str | Path | None, shards: Shards | None
) -> Parts:
    """The parts of a reward model that this project wrote."""
    about = read_about(folder)
    attention = kept_kernel(folder, about) if attention == "auto" else attention
    tokenizer = read_tokenizer(folder, about)
    if about["format"] == ADAPTER_FORMAT:
        lm = adapters.merged(adapters.Adapter.open(folder, base), dtype=dtype, attention=attention, shards=shards)
    elif base is not None:
        raise ArtefactError(f"{folder} is not a LoRA checkpoint, so it cannot be put on the base {base}")
    else:
        lm = load_causal_lm(Model(path=str(folder), attention=attention), dtype=dtype, shards=shards)
    head = read_head(folder, about["head"], hidden_size(lm))
    return Parts(lm, about["head"], head, tokenizer, about["mean"], about["std"], about["reads"])


def last_real_token(attention_mask: Tensor) -> Tensor:
    """Column [B] of the last 1 in each row of [B, L], for left and right padding."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return ((attention_mask > 0) * columns).argmax(-1)
