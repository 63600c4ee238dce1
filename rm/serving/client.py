"""A client of `grm rm-serve`, which scores as a `RewardModel` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from core.data.chat import Message, conversation
from core.data.rows import ResponseRow
from core.errors import ArtefactError, DataError
from core.http import TOKEN_VARIABLE, NoAnswer, ask_patiently, token_of, with_token

CHUNK = 256
"""Conversations of one request; it bounds the time that one request takes."""


class RemoteError(ArtefactError):
    """The server does not answer, or its answer has no rewards."""


class RemoteRewardModel:
    """The reward model or ensemble behind `url` (`http://host:port`), checked once.

    Args:
        timeout: seconds that a request may take.
        retries: further attempts if there is no connection, no answer in time, or a failure of the server (5xx). What
            the server refuses (4xx) is not sent again.
        token: what the server was started with (`--token`); by default that of the environment, `GRM_SERVE_TOKEN`.
        tokenizer: the fingerprint (`ChatTokenizer.fingerprint`) that the served model must have, if any.

    Attributes:
        about: the answer of `/health`.
        fingerprint: of the tokenizer and chat template.
        mean, std: of the rewards on samples of the reference; None for ensembles.

    Raises:
        RemoteError: no such server.
        ArtefactError: the server has a model with another tokenizer.
    """

    def __init__(self, url: str, *, timeout: float = 180.0, retries: int = 3, tokenizer: str | None = None,
                 token: str | None = None):  # fmt: skip
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._headers = with_token(token_of(token))
        self.about = self._ask("/health")
        if self.about.get("status") != "ok" or "tokenizer" not in self.about:
            raise RemoteError(f"{self.url}/health answers without a status and a tokenizer, so it is no `grm rm-serve`")
        self.fingerprint: str = self.about["tokenizer"]
        self.mean, self.std = self.about["mean"], self.about["std"]
        if tokenizer is not None and tokenizer != self.fingerprint:
            raise ArtefactError(
                f"the reward model on {self.url} has another tokenizer or chat template: its fingerprint is "
                f"{self.fingerprint}, not {tokenizer}"
            )

    def score(self, conversations: Sequence[Sequence[Message]], *, progress: str = "") -> Tensor:
        """Float32 rewards [n] of the conversations, in their order.

        Raises:
            DataError: a conversation that the server refuses, where the message names its number; a request that it
                does not read to its end.
            RemoteError: no answer in time, or one that is not a finite reward for each conversation.
        """
        return self._in_parts([list(c) for c in conversations], [], progress)

    def score_rows(self, rows: Sequence[ResponseRow], *, progress: str = "") -> Tensor:
        """As `score`, of sampled responses: by their tokens, where they are of the served model's tokenizer.

        Raises:
            RemoteError: also a server of version 0.1, which reads texts alone.
        """
        if "reads" not in self.about:
            raise RemoteError(f"{self.url} is a server of an older version, which takes no tokens: start it again")
        mine = [row.get("token_ids") if row.get("tokenizer") == self.fingerprint else None for row in rows]
        ids = [list(tokens) if tokens else None for tokens in mine]
        return self._in_parts([conversation(row["prompt"], row["response"]) for row in rows], ids, progress)

    def _in_parts(self, conversations: list[list[Message]], ids: list[list[int] | None], progress: str) -> Tensor:
        parts = [torch.zeros(0)]
        with tqdm(total=len(conversations), desc=progress, disable=not progress, unit="resp") as bar:
            for start in range(0, len(conversations), CHUNK):
                part = slice(start, start + CHUNK)
                body: dict = {"conversations": conversations[part]}
                if ids:
                    body |= {"token_ids": ids[part], "tokenizer": self.fingerprint}
                parts.append(self._rewards(body, start))
                bar.update(len(body["conversations"]))
        return torch.cat(parts)

    def normalise(self, rewards: Tensor) -> Tensor:
        """Rewards in standard deviations from the mean on samples of the reference; DataError for ensembles."""
        if self.mean is None:
            raise DataError(f"the ensemble on {self.url} has no mean and std of its own")
        return (rewards - self.mean) / self.std

    def _rewards(self, body: dict, start: int) -> Tensor:
        chunk = body["conversations"]
        try:
            rewards = self._ask("/score", body).get("rewards")
        except DataError as error:
            raise DataError(f"{error} (of the conversations from number {start})" if start else str(error)) from None
        if not isinstance(rewards, list) or len(rewards) != len(chunk):
            count = len(rewards) if isinstance(rewards, list) else "no"
            raise RemoteError(f"{self.url} gave {count} rewards for {len(chunk)} conversations")
        try:
            tensor = torch.tensor(rewards, dtype=torch.float32)
        except (TypeError, ValueError):
            raise RemoteError(f"{self.url} gave rewards that are not numbers") from None
        if tensor.shape != (len(chunk),) or not tensor.isfinite().all():
            raise RemoteError(f"{self.url} gave rewards that are not one finite number each")
        return tensor

    def _ask(self, path: str, body: dict | None = None) -> dict:
        """The JSON object that the server answers with."""
        try:
            return ask_patiently(self.url + path, body, self.timeout, retries=self.retries, headers=self._headers)
        except NoAnswer as fault:
            if fault.status in (400, 413):
                raise DataError(f"{self.url} refuses {fault.said}") from None
            if fault.cut_off:
                raise DataError(
                    f"{self.url} closed the connection before it had read the request: the body may be above the "
                    "server's limit, so raise its --max-body-mib, or score shorter conversations"
                ) from None
            hint = f" (set {TOKEN_VARIABLE} to what the server was started with)" if fault.status == 401 else ""
            raise RemoteError(f"{self.url}{path}: {fault}{hint} (attempts: {fault.attempts})") from None
