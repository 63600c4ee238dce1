"""The reward model: a causal LM's trunk, a reward head on the last real token, and the LM head for GRM's regulariser.

The critic of PPO is the same module read at other positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from core.artefacts import ArtefactError, read_json, write_json
from core.batching import Batch, Targets
from core.config import NATIVE_DTYPE, Model
from core.data.chat import ChatTokenizer, Message
from core.models.layers import Lower, hidden_states, load_causal_lm, token_logprobs
from core.training.engine import device
from rm.checkpoints.folder import check_vocabulary
from rm.heads import make_head

HEAD_FILE = "head.safetensors"
ABOUT_FILE = "reward_model.json"
MERGED_FORMAT, ADAPTER_FORMAT = 1, 2
"""Of ABOUT_FILE: beside a whole language model, or beside an adapter (`rm.checkpoints.adapters`)."""


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
        lower: Lower | None = None,
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
        hidden = hidden_states(self.lm, input_ids, attention_mask, positions=positions, lower=lower)
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

    def normalise(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations from the mean of the reference policy's samples."""
        return (rewards - self.mean) / self.std

    def score(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        batch_tokens: int = 8192,
        lower: Callable[[Batch], Lower] | None = None,
        progress: str = "",
    ) -> Tensor:
        """Float32 rewards [n] of conversations, in their order; `lower` as in `rm.score.score_tokens`."""
        from rm.score import score

        where = next(self.parameters()).device
        return score(
            self, self.tokenizer, conversations, batch_tokens=batch_tokens, share=self.shares_prompts, lower=lower,
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
        """A reward model of stage `rm`, whole or an adapter, or of other code (`rm.checkpoints.foreign`): a folder or a hub id.

        `base` is the base of a LoRA checkpoint, in place of the one it names. ArtefactError when anything does not fit.
        """
        from rm.checkpoints import adapters
        from rm.checkpoints import foreign as checkpoints

        folder = checkpoints.locate(path)
        if not (folder / ABOUT_FILE).is_file():
            return checkpoints.read(folder, dtype=dtype, attention=attention, base=base)
        about = read_about(folder)
        tokenizer = read_tokenizer(folder, about)
        if about["format"] == ADAPTER_FORMAT:
            lm = adapters.merged(adapters.Adapter.open(folder, base), dtype=dtype, attention=attention)
        elif base is not None:
            raise ArtefactError(f"{folder} is no LoRA checkpoint, so there is no use for the base {base}")
        else:
            lm = load_causal_lm(Model(path=str(folder), attention=attention), dtype=dtype)
        model = cls(lm, about["head"], tokenizer, mean=about["mean"], std=about["std"])
        read_head(folder, model)
        return model.eval().to(device())


def read_about(folder: Path) -> dict:
    """`reward_model.json`; ArtefactError for a format that is not known."""
    about = read_json(folder / ABOUT_FILE)
    if about["format"] not in (MERGED_FORMAT, ADAPTER_FORMAT):
        raise ArtefactError(f"{folder / ABOUT_FILE}: this version does not know its format {about['format']}")
    return about


def read_tokenizer(folder: Path, about: Mapping) -> ChatTokenizer:
    """The tokenizer in the folder; ArtefactError when it is not the one that its `reward_model.json` tells of, or has
    tokens beyond the model's vocabulary."""
    tokenizer = ChatTokenizer(Model(path=str(folder)))
    if tokenizer.fingerprint != about["tokenizer"]:
        raise ArtefactError(f"{folder}: tokenizer or chat template is not the one the model was trained with")
    check_vocabulary(folder, tokenizer)
    return tokenizer


def read_head(folder: Path, model: RewardModel) -> None:
    """Fill the model's head from the folder; ArtefactError, naming them, for weights that do not fit."""
    from safetensors.torch import load_file

    weights = load_file(folder / HEAD_FILE)
    shapes = ({k: v.shape for k, v in state.items()} for state in (model.head.state_dict(), weights))
    if wrong := sorted({name for name, _ in set.symmetric_difference(*(set(s.items()) for s in shapes))}):
        raise ArtefactError(f"{folder / HEAD_FILE} does not fit a {model.head_kind} head: {', '.join(wrong)}")
    model.head.load_state_dict(weights)


def save_reward_model(
    folder: Path, model: RewardModel, named_weights: Iterable[tuple[str, Tensor]], head: dict, **about
) -> None:
    """Write what `from_pretrained` reads: the LM as Hugging Face saves it, the head, the tokenizer, facts."""
    save_lm(folder, model.lm.config, named_weights, model.tokenizer)
    save_head(folder, model, head, **about)


def save_head(folder: Path, model: RewardModel, head: dict, **about) -> None:
    """What lies beside the LM's weights: the head, and facts."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in head.items()}, folder / HEAD_FILE)
    facts = {"head": model.head_kind, "tokenizer": model.tokenizer.fingerprint, "mean": model.mean, "std": model.std}
    write_json(folder / ABOUT_FILE, {"format": MERGED_FORMAT, **facts, **about})


def save_lm(folder: Path, config, named_weights: Iterable[tuple[str, Tensor]], tokenizer: ChatTokenizer) -> None:
    """A folder that transformers and vLLM load as it is."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tied = config.tie_word_embeddings
    weights = {k: v.contiguous().cpu() for k, v in named_weights if not (tied and k == "lm_head.weight")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)


def last_real_token(attention_mask: Tensor) -> Tensor:
    """Column of the last 1 in each row [B], for left and right padding alike."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * columns).argmax(-1)


def _lm_head(lm: nn.Module) -> nn.Module:
    return lm.get_output_embeddings()
