"""How many prompts, pairs and tokens a run has, as far as that is known before it runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from core.config import Config, Data, Splits
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError, DataError
from core.files import count_rows
from core.row_files import numbered_rows
from pipelines.prompts import in_order, read_prompts

SHARE = 0.8
"""Assumed mean length of responses, as a share of generation.max_new_tokens."""
PROMPT_SHARE = 0.5
"""Assumed mean length of prompts that cannot be tokenised here, as a share of data.max_prompt_tokens."""
MOST_ROWS = 5000
"""Prompts that are tokenised to plan, at most."""
ASSUMED_PAIRS = 40_000
"""Of a preference source whose rows cannot be counted here."""
PUBLISHED_PAIRS = {
    "llm-blender/Unified-Feedback": 849_000,
    "hendrydong/preference_700K": 700_000,
    "Skywork/Skywork-Reward-Preference-80K-v0.2": 77_000,
}
"""Pairs of published sources, ties not counted, about; of Unified-Feedback as the GRM authors' step counts tell it."""


@dataclass(frozen=True, slots=True)
class Lengths:
    prompts: Mapping[str, int]
    """Of each split."""
    prompt_tokens: float
    """Mean."""
    response_tokens: float
    """Mean, at most `generation.max_new_tokens`."""
    pair_tokens: tuple[float, float]
    """Mean of prompt and response in the pairs that reward models are trained on."""
    pairs: Mapping[str, int]
    """Of rm_train and rm_val."""
    prompt_draws: Sequence[int]
    """Lengths of prompts, to see how rows are padded."""
    response_draws: Sequence[int]
    calibration: int
    """Prompts of the split calibration."""
    seconds: float
    """That it took to read and tokenise the prompts."""
    notes: tuple[str, ...] = field(default=())
    """What is assumed, one line each."""


def lengths_of(cfg: Config, share: float | None, known: Sequence[int] | None) -> Lengths:
    """What is known of the sizes of a run.

    Args:
        share: mean length of responses as a share of `generation.max_new_tokens`; None: what `known` says, else SHARE.
        known: lengths of responses that were sampled from this policy, cut off at no less than max_new_tokens.
    """
    notes: list[str] = []
    draws: list[int] = []
    splits, prompts, seconds = _prompts(cfg, notes)
    prompt_tokens = sum(prompts) / len(prompts)
    most = cfg.generation.max_new_tokens
    if share is not None:
        response, why = share * most, f"as asked: {share:g} of generation.max_new_tokens"
    elif known:
        draws = [min(n, most) for n in known]
        response = sum(draws) / len(draws)
        why = f"{len(known)} responses of this policy that were sampled before"
        why = "mean of this run's own samples" if len(known) == 1 else f"mean of {why}"
    else:
        response, why = SHARE * most, f"assumed: {SHARE:g} of generation.max_new_tokens; --share sets it"
    draws = draws or [round(response)]
    notes.append(f"{response:.1f} tokens a response ({why})")
    limit = lambda split, most: min(splits.get(split, 0), most or splits.get(split, 0))  # noqa: E731
    preferences = cfg.preferences
    if preferences.sources:
        pairs = _imported(cfg, notes)
        longest = cfg.rm.max_tokens
        pair_tokens = (PROMPT_SHARE * longest / 2, PROMPT_SHARE * longest / 2)
        notes.append(
            f"imported pairs: prompts and responses of {pair_tokens[0]:.0f} tokens (assumed: rm.max_tokens / 4)"
        )
    else:
        pairs = {
            "rm_train": limit("rm_train", preferences.max_train_pairs),
            "rm_val": limit("rm_val", preferences.max_val_pairs),
        }
        pair_tokens = (prompt_tokens, response)
    calibration = limit("calibration", preferences.max_calibration_prompts)
    return Lengths(
        splits, prompt_tokens, response, pair_tokens, pairs, prompts, draws, calibration, seconds, tuple(notes)
    )  # fmt: skip


def _prompts(cfg: Config, notes: list[str]) -> tuple[dict[str, int], list[int], float]:
    """Prompts of each split, lengths of prompts in tokens, and the seconds that reading them took."""
    why = "the tokenizer or the file cannot be read here"
    try:
        if not _is_here(cfg.policy.path):
            raise ArtefactError("the tokenizer would have to be fetched")
        tokenizer = ChatTokenizer(cfg.policy)
        files = [numbered_rows(file, lambda *_: None) for file in prompt_files(cfg.data)]
        rows = sum(1 for _ in islice(chain(*files), MOST_ROWS + 1))
        started = time.perf_counter()
        if rows <= MOST_ROWS and (usable := in_order(*read_prompts(cfg.data, tokenizer, seed=cfg.run.seed))):
            tokens = [row["num_tokens"] for row in usable]
            mean = sum(tokens) / len(tokens)
            notes.append(f"{len(tokens)} prompts of {mean:.1f} tokens on average (read and tokenised)")
            return dict(Counter(row["split"] for row in usable)), tokens, time.perf_counter() - started
        why = f"a plan does not tokenise more than {MOST_ROWS} rows" if rows else "the file has no rows"
    except (OSError, ValueError, ArtefactError, DataError):
        pass
    counts = [(count_rows(file) or 0) if file.is_file() else 0 for file in prompt_files(cfg.data)]
    splits = {name: round(counts[0] * getattr(cfg.data.splits, name)) for name in Splits.model_fields}
    splits |= {"eval": counts[1]} if cfg.data.eval_prompts else {}
    mean = PROMPT_SHARE * cfg.data.max_prompt_tokens
    notes.append(
        f"{sum(counts)} prompts, all taken as usable, of {mean:.0f} tokens (assumed: {PROMPT_SHARE:g} of "
        f"data.max_prompt_tokens, since {why})"
    )
    return splits, [round(mean)], 0.0


def prompt_files(data: Data) -> list[Path]:
    """`data.prompts`, and `data.eval_prompts` where it is set."""
    return [data.prompts, *([data.eval_prompts] if data.eval_prompts else [])]


def _is_here(path: str) -> bool:
    """Whether a tokenizer is in a folder, or in the cache of the hub: a plan downloads nothing large."""
    from huggingface_hub import try_to_load_from_cache

    return Path(path).is_dir() or isinstance(try_to_load_from_cache(path, "tokenizer_config.json"), str)


def _imported(cfg: Config, notes: list[str]) -> dict[str, int]:
    """Pairs of rm_train and rm_val of imported sources."""
    preferences, total = cfg.preferences, 0.0
    for name, source in preferences.sources.items():
        count = count_rows(source.path) if source.path.is_file() else PUBLISHED_PAIRS.get(str(source.path))
        if count is None and source.max_pairs is None:
            notes.append(f"preferences.sources.{name}: {ASSUMED_PAIRS} pairs (assumed: its rows are not counted here)")
        pairs = (ASSUMED_PAIRS if count is None else count) / source.stride
        total += min(pairs, source.max_pairs or pairs) * source.weight
    splits = cfg.data.splits
    share = splits.rm_train / (splits.rm_train + splits.rm_val)
    train, val = round(total * share), round(total * (1 - share))
    return {
        "rm_train": min(train, preferences.max_train_pairs or train),
        "rm_val": min(val, preferences.max_val_pairs or val),
    }
