"""Whether our passes through a model compute what the model's own forward pass computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.batching import Batch, pack
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import text_config, trunk_of
from core.models.layers import SKIPS_PADDING, hidden_states
from core.models.logits import LmHead
from core.training.sharding import whole_shape

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference relative to the largest number. What is forgotten after a head differs by a tenth or more."""
SPREAD = 10.0
"""Standard deviation that the check gives to logits: caps and scales show where logits are large."""
WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_window_size", "attention_chunk_size")
"""Settings by which layers see a few hundred or thousand tokens only, by a mask of their own."""


@torch.no_grad()
def check_agreement(lm: CausalLM) -> None:
    """Compare our hidden states and logits of one short row, padded or not, with those of `lm`'s own forward pass.

    Raises:
        ArtefactError: they differ, so that log-probs of this architecture would be wrong; names it.
    """
    what = f"{lm.config.name_or_path or 'the model'} ({type(lm).__name__})"
    try:
        theirs, ours = _both(lm)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:  # of the model's own code
        raise ArtefactError(
            f"{what}: this architecture is not supported, since its layers cannot be run apart from its head "
            f"({type(error).__name__}: {error})"
        ) from None
    for name, own, mine in zip(("hidden states", "logits", "states of padded rows"), theirs, ours, strict=True):
        if own.shape != mine.shape or not _close(mine, own):
            raise ArtefactError(
                f"{what}: this architecture is not supported, since its {name} are not what is computed here: "
                "log-probs of it would be wrong"
            )


def _close(mine: Tensor, own: Tensor) -> bool:
    limit = TOLERANCE[own.dtype] * float(own.float().abs().max())
    return bool((mine.float() - own.float()).abs().max() <= limit)  # False where a number is NaN


def _both(lm: CausalLM) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(hidden states, logits, hidden states) by the model's own forward pass, and by ours; the last in padded rows.

    The logits are of hidden states that are multiplied until the LM head's output has the spread SPREAD.
    """
    head, trunk, dtype = LmHead.of(lm), trunk_of(lm), next(lm.parameters()).dtype
    size = whole_shape(lm.get_input_embeddings().weight)[0]
    ids = (torch.arange(1, 9, device=lm.device) * 7919 % size)[None]
    mask, kept = torch.ones_like(ids), {}

    def multiply(_: object, __: object, output: Any) -> Any:
        hidden = output[0]
        factor = SPREAD / float(head.linear(hidden).float().std())
        kept["hidden"], kept["multiplied"] = hidden, hidden * factor
        if isinstance(output, tuple):
            return (kept["multiplied"], *output[1:])
        output.last_hidden_state = kept["multiplied"]
        return output

    hook = trunk.register_forward_hook(multiply)
    try:
        own = lm(input_ids=ids, attention_mask=mask).logits
    finally:
        hook.remove()
    hidden = hidden_states(lm, ids, mask)
    padded = hidden_states(lm, F.pad(ids, (0, 3)), F.pad(mask, (0, 3)))[:, : ids.shape[1]]
    ours = (hidden, head.logits(kept["multiplied"]).to(dtype), padded)
    return (kept["hidden"], own.to(dtype), kept["hidden"]), ours


@torch.no_grad()
def skip_padding(lm: CausalLM) -> None:
    """Let passes on CPU leave padding out where that computes the same (`core.models.unpadded`).

    That is seen by comparing rows of several lengths, one of them shared. Not where layers have a mask of their own,
    which short rows do not show. To be called before an engine shards the weights.
    """
    trunk = trunk_of(lm)
    if not _attends_all(lm) or lm.device.type != "cpu":
        return
    groups = [(range(3, 7), [range(8, 10), range(20, 25)]), (range(1, 3), [range(30, 37)])]
    size = lm.get_input_embeddings().num_embeddings
    batch = pack([([i % size for i in p], [[i % size for i in r] for r in rs]) for p, rs in groups], 0)
    real, found = batch.attention_mask > 0, []
    try:
        with _same_mode(lm):
            for skips in (False, True):
                setattr(trunk, SKIPS_PADDING, skips)
                states = hidden_states(lm, batch.input_ids, batch.attention_mask, positions=batch.positions)
                found.append(states[real])
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):  # another kind of attention
        found = []
    setattr(trunk, SKIPS_PADDING, bool(found) and _close(found[1], found[0]))


def _attends_all(lm: CausalLM) -> bool:
    """False where layers see a part of the tokens before them only, or go over them one after the other."""
    config = text_config(lm.config)
    windows = [getattr(config, name, None) for name in WINDOWS]
    kinds = set(getattr(config, "layer_types", None) or ())
    return not any(windows) and not kinds - {"full_attention"}


@torch.no_grad()
def can_share_prompts(lm: CausalLM) -> bool:
    """Whether several responses may share a row with their prompt (`core.batching.pack`).

    Not with flash attention, nor where layers have a mask or a state of their own (sliding windows, ALiBi, recurrent
    layers). The first two are told by the settings, since short rows do not show them, the rest by comparing a short
    shared row with the same responses in rows of their own.
    """
    if (text_config(lm.config)._attn_implementation or "").startswith("flash") or not _attends_all(lm):
        return False
    size = lm.get_input_embeddings().num_embeddings
    prompt, *responses = ([(7 * i + 3) % size for i in part] for part in (range(4), range(4, 7), range(8, 12)))
    shared, alone = pack([(prompt, responses)], 0, lm.device), pack([(prompt, [r]) for r in responses], 0, lm.device)
    try:
        with _same_mode(lm):
            found, wanted = (_ends(lm, batch) for batch in (shared, alone))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):  # it takes no such mask
        return False
    return _close(found, wanted)


def _ends(lm: CausalLM, batch: Batch) -> Tensor:
    """Hidden states [R, H] at the last token of each response."""
    states = hidden_states(lm, batch.input_ids, batch.attention_mask, positions=batch.positions)
    return states.flatten(0, 1)[batch.ends.to(states.device)]


@contextmanager
def _same_mode(lm: CausalLM) -> Iterator[None]:
    """`lm` in eval mode inside the block, so that dropout of adapters plays no part."""
    modes = {module: module.training for module in lm.modules()}
    lm.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
