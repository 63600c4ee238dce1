"""Rewards of the user's own: a Python function, or a server of OpenRLHF's shape.

Both give each response of a rank a number in units of their own. `ppo.reward.mixed` weighs these against the reward
models'. Neither gets gold, which stays out of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from core.config import Reward
from core.data.chat import ChatTokenizer
from core.data.rows import ResponseRow
from core.errors import ArtefactError, DataError
from core.functions import load_function
from core.http import NoAnswer, ask_patiently

OPTION = "ppo.reward.function"
CHUNK = 256
"""Responses of one request; it bounds the time that one request takes."""
RETRIES = 3


class OwnReward(Protocol):
    def score(self, rows: Sequence[ResponseRow]) -> Tensor:
        """Float32 rewards [n] of responses, which have their `prompt_id`, and `metadata` where there is any."""
        ...


def own_rewards(cfg: Reward, tokenizer: ChatTokenizer) -> dict[str, OwnReward]:
    """The own rewards of a configuration by their name, `function` or `url`.

    Args:
        tokenizer: the policy's.

    Raises:
        ConfigError: a function that cannot be found.
    """
    own: dict[str, OwnReward] = {}
    if cfg.function:
        own["function"] = FunctionReward(cfg.function)
    if cfg.url:
        own["url"] = UrlReward(cfg.url, tokenizer, label=cfg.url_label, timeout=cfg.url_timeout)
    return own


class FunctionReward:
    """A function of prompts (lists of messages), responses (texts) and metadata (dictionaries), lists of equal length,
    that returns as many numbers.

    Args:
        name: `module:function`.

    Raises:
        ConfigError: there is no such function.
    """

    def __init__(self, name: str):
        self._name = name
        self._function: Callable[..., Any] = load_function(OPTION, name)

    def score(self, rows: Sequence[ResponseRow]) -> Tensor:
        """See `OwnReward.score`.

        Raises:
            DataError: the function fails, or does not return one finite number for each response. The message names
                the prompt.
        """
        try:
            found = self._call(rows)
        except Exception as error:
            raise DataError(f"{OPTION} {self._name} failed {self._where(rows, error)}") from error
        return checked(f"{OPTION} {self._name}", found, rows)

    def _call(self, rows: Sequence[ResponseRow]) -> Any:
        prompts, responses = [list(row["prompt"]) for row in rows], [row["response"] for row in rows]
        return self._function(prompts, responses, [metadata_of(row) for row in rows])

    def _where(self, rows: Sequence[ResponseRow], error: Exception) -> str:
        """On which response, found by giving it one at a time, and how."""
        for number, row in enumerate(rows):
            try:
                self._call([row])
            except Exception as alone:
                return f"on {_named(row, number)}: {type(alone).__name__}: {alone}"
        return f"on {len(rows)} responses together, and on none alone: {type(error).__name__}: {error}"


class UrlReward:
    """A server that takes POST {"query": [...], "prompts": [...], "labels": [...]} and answers {"rewards": [...]}.

    The shape is that of OpenRLHF 0.11.0, `SingleTurnAgentExecutor._fetch_rewards_via_http` in openrlhf/utils/agent.py
    (github.com/OpenRLHF/OpenRLHF at 3c3be62): a query is prompt and response as the model read them, control tokens
    included, prompts are the same without the response, and labels a column of the data. `scores` and `extra_logs`,
    which it takes besides rewards, are not used here.

    Args:
        url: the whole address.
        tokenizer: the policy's, of which the rows' tokens are.
        label: the column of the metadata that is sent as labels; None for nulls.
        timeout: seconds of one request.
    """

    def __init__(self, url: str, tokenizer: ChatTokenizer, *, label: str | None, timeout: float):
        self._url, self._tokenizer, self._label, self._timeout = url, tokenizer, label, timeout

    def score(self, rows: Sequence[ResponseRow]) -> Tensor:
        """See `OwnReward.score`.

        Raises:
            ArtefactError: no answer of the server.
            DataError: an answer that is not one finite number for each response. The message names the prompt.
        """
        parts = [torch.zeros(0)]
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            try:
                answer = ask_patiently(self._url, self._body(part), self._timeout, retries=RETRIES)
            except NoAnswer as fault:
                raise ArtefactError(f"ppo.reward.url {self._url}: {fault} (attempts: {fault.attempts})") from None
            if "rewards" not in answer:
                raise DataError(f"ppo.reward.url {self._url} answers without rewards: it has {', '.join(answer)}")
            parts.append(checked(f"ppo.reward.url {self._url}", answer["rewards"], part))
        return torch.cat(parts)

    def _body(self, rows: Sequence[ResponseRow]) -> dict[str, list]:
        prompts = [self._tokenizer.prompt_ids(row["prompt"]) for row in rows]
        responses = [row.get("token_ids") or self._tokenizer.response_ids(row["response"]) for row in rows]
        whole = [prompt + list(response) for prompt, response in zip(prompts, responses, strict=True)]
        labels = [metadata_of(row)[self._label] if self._label else None for row in rows]
        return {"query": self._as_read(whole), "prompts": self._as_read(prompts), "labels": labels}

    def _as_read(self, ids: list[list[int]]) -> list[str]:
        return [
            self._tokenizer.hf.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in ids
        ]


def metadata_of(row: ResponseRow) -> dict[str, Any]:
    """The columns of `data.metadata` that came with the prompt."""
    return json.loads(row["metadata"]) if row.get("metadata") else {}


def checked(source: str, found: Any, rows: Sequence[ResponseRow]) -> Tensor:
    """The numbers [n] that somebody's code gave for n responses, in float32.

    Args:
        source: who gave them, for messages.

    Raises:
        DataError: another number of rewards, or one that is no number, NaN or infinite; names the prompt.
    """
    if hasattr(found, "tolist"):
        found = found.tolist()  # of NumPy or torch
    if not isinstance(found, list | tuple):
        raise DataError(f"{source} gave {type(found).__name__}, and not a list of rewards")
    if len(found) != len(rows):
        raise DataError(f"{source} gave {len(found)} rewards for {len(rows)} responses")
    for number, (reward, row) in enumerate(zip(found, rows, strict=True)):
        if isinstance(reward, bool) or not isinstance(reward, Real):
            raise DataError(f"{source} gave {reward!r} for {_named(row, number)}: return a float")
    rewards = torch.tensor([float(reward) for reward in found], dtype=torch.float32)
    if bad := (~rewards.isfinite()).nonzero().flatten().tolist():
        raise DataError(f"{source} gave {found[bad[0]]} for {_named(rows[bad[0]], bad[0])}: rewards must be finite")
    return rewards


def _named(row: ResponseRow, number: int) -> str:
    return f"prompt {row.get('prompt_id', '?')} (response {number} of this rank): {row['response'][:60]!r}"
