"""Sampling by vLLM servers on other GPUs or nodes, started with `grm vllm-serve`, with the interface of `Generator`.

New weights go over NCCL between GPUs, or through a file that the servers read. The run directory must then be on a file
system that they share. A server that other machines reach asks for a token, which is in the environment (`core.http`).
"""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from core.config import Generation, Model
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.generation.local import Completion
from core.generation.weight_transfer import NcclTransfer
from core.http import TOKEN_VARIABLE, ask_json, token_of, was_dropped, with_token
from core.training import distributed
from core.training.weights import NamedWeights

_log = logging.getLogger(__name__)


ONCE = frozenset({"/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"})
"""Requests that must not be repeated. They are steps of a transfer over NCCL, in which all sides take part once: a
server that had the request already would take the second one for the next step, or wait for a broadcast that is over.

Every other one may be. Samples are drawn anew, the file has the same weights, and an empty cache is emptied again."""


class NoAnswer(DataError):
    """A server that is not there, does not answer in time, or fails."""


class Dropped(NoAnswer):
    """A server that closed the connection. It may have had the request."""


class ServerGenerator:
    """Several vLLM servers as one generator: each rank samples from one of them, the first rank syncs all of them.

    Args:
        urls: http://host:port of each server.
        folder: where new weights are written for the servers to read; None sends them over NCCL.
        timeout: seconds within which a server must answer.
        retries: how often a request that a server did not answer is sent to another one, which has the same weights.
            With any, a server that does not answer is left out from then on; it may have missed a sync.
        carry: whether responses that are being sampled go on under new weights. Otherwise there must be none.

    Attributes:
        lost: the servers that are left out, and why.

    Raises:
        DataError: no server answers (in time), or one has a shorter context. Names the server. All methods raise it.
    """

    def __init__(
        self, urls: Sequence[str], model: Model, cfg: Generation, tokenizer: ChatTokenizer, *,
        folder: Path | None, timeout: float, retries: int = 0, carry: bool = False,
    ):  # fmt: skip
        from transformers import AutoConfig

        self.urls, self.cfg, self.tokenizer = [u.rstrip("/") for u in urls], cfg, tokenizer
        self._folder, self._timeout = folder and folder.absolute(), timeout
        self._nccl: NcclTransfer | None = None
        self._retries, self._carry, self._headers = retries, carry, with_token(token_of(None))
        self.lost: dict[str, str] = {}
        about = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        self._tied = about.tie_word_embeddings
        served = self._of_mine(lambda url: self._ask(url, "/v1/models"))["data"][0]
        self._name = served["id"]
        if served["max_model_len"] < cfg.vllm.max_model_len:
            raise DataError(
                f"vLLM server {self._mine} has max_model_len {served['max_model_len']} and the configuration "
                f"{cfg.vllm.max_model_len}: start it with `grm vllm-serve` and the same configuration"
            )

    def generate(self, prompts: Sequence[Sequence[int]], *, n: int = 1, seed: int) -> list[list[Completion]]:
        """As `Generator.generate`, but `seed` has no effect: the server has a random generator of its own."""
        body = {
            "prompt": [list(ids) for ids in prompts], "n": n, "temperature": self.cfg.temperature, "top_p": 1.0,
            "top_k": 0, "max_tokens": self.cfg.max_new_tokens, "stop_token_ids": self.tokenizer.stop_ids,
            "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        choices = self._complete(body, len(prompts) * n)
        done = [
            Completion(
                c["token_ids"], c["logprobs"]["token_logprobs"], self.tokenizer.decode(c["token_ids"]),
                c["finish_reason"] == "stop",
            )
            for c in choices
        ]  # fmt: skip
        return [done[i : i + n] for i in range(0, len(done), n)]

    def logprobs_of(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `Generator.logprobs_of`."""
        body = {
            "prompt": [list(ids) for ids in sequences], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0,
        }  # fmt: skip
        return [
            [at[str(token)]["logprob"] for token, at in zip(ids[1:], c["prompt_logprobs"][1:], strict=True)]
            for ids, c in zip(sequences, self._complete(body, len(sequences)), strict=True)
        ]

    def sync(self, named_tensors: NamedWeights) -> None:
        """As `Generator.sync`, for all servers. Every rank must call it, since weights are gathered from all ranks."""
        self._agree()
        file = self._written(self._folder, named_tensors) if self._folder else None
        with self._paused():
            if file:
                self._each(lambda url: self._ask(url, "/collective_rpc", {"method": "reload_from", "args": [file]}))
            else:
                skipped = ["lm_head.weight"] if self._tied else []
                self._nccl = self._nccl or NcclTransfer(self.urls, self._ask, skipped=skipped, timeout=self._timeout)
                self._nccl.send(named_tensors)
            self._each(self._drop_prefixes)
        self._agree()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """With `carry`, let the servers sample nothing meanwhile: responses keep the tokens that they have."""
        if not self._carry:
            yield
            return
        self._each(lambda url: self._ask(url, "/pause?mode=keep&clear_cache=false", {}))
        try:
            yield
        finally:
            self._each(lambda url: self._ask(url, "/resume", {}))

    def _drop_prefixes(self, url: str) -> None:
        """Drop what the server has cached by the old weights, with `carry` that of unfinished responses too.

        Otherwise vLLM refuses while it answers a request, which may be another program's.
        """
        deadline = time.monotonic() + self._timeout
        while not self._ask(url, f"/reset_prefix_cache?reset_running_requests={self._carry}", {})["success"]:
            if time.monotonic() > deadline:
                raise DataError(
                    f"vLLM server {url} did not drop its prefix cache within {self._timeout:g} s (ppo.server_timeout): "
                    "is another program using it?"
                )
            time.sleep(0.2)

    def _written(self, folder: Path, named_tensors: Iterable[tuple[str, Tensor]]) -> str:
        """The file with these weights, which the first rank writes."""
        from safetensors.torch import save_file

        file, weights = folder / "model.safetensors", {}
        for name, tensor in named_tensors:
            if distributed.rank() == 0 and not (self._tied and name == "lm_head.weight"):
                weights[name] = tensor.contiguous().cpu()
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, file)
        return str(file)

    def sleep(self) -> None:
        """Does nothing: the server has its memory to itself."""

    def wake(self, *parts: str) -> None:
        """Does nothing."""

    @property
    def left(self) -> list[str]:
        """The servers that are in use."""
        return [url for url in self.urls if url not in self.lost]

    @property
    def _mine(self) -> str:
        """The server that this rank samples from."""
        return self.left[distributed.rank() % len(self.left)]

    def _complete(self, body: dict, expected: int) -> list[dict]:
        return self._of_mine(lambda url: self._completed(url, body, expected))

    def _completed(self, url: str, body: dict, expected: int) -> list[dict]:
        choices = self._ask(url, "/v1/completions", {"model": self._name, **body})["choices"]
        choices.sort(key=lambda c: c["index"])
        if [c["index"] for c in choices] != list(range(expected)):
            raise DataError(f"vLLM server {url} gave {len(choices)} completions for {expected}")
        return choices

    def _of_mine(self, request: Callable[[str], Any]):
        """What this rank's server answers, or another one where it does not."""
        for attempt in range(self._retries + 1):
            url = self._mine
            try:
                return request(url)
            except NoAnswer as error:
                if attempt == self._retries:
                    raise
                self._leave_out(url, error)
                _log.warning("%s; the requests of this rank go to %s (ppo.server_retries)", error, self._mine)
        raise AssertionError("the last attempt returns or raises")

    def _each(self, request: Callable[[str], Any]) -> None:
        """Let the first rank ask every server that is in use, all at once; with retries, leave those out that do not
        answer."""
        urls, silent = self.left if distributed.rank() == 0 else [], dict[str, NoAnswer]()
        with ThreadPoolExecutor(max(1, len(urls))) as pool:
            asked = {url: pool.submit(request, url) for url in urls}
        for url, answer in asked.items():  # all have answered or failed, so that no server is left behind at work
            try:
                answer.result()
            except NoAnswer as error:
                if not self._retries:
                    raise
                silent[url] = error
        for url, fault in silent.items():
            self._leave_out(url, fault)
            _log.warning("%s; goes on with %s (ppo.server_retries)", fault, ", ".join(self.left))

    def _leave_out(self, url: str, error: NoAnswer) -> None:
        self.lost[url] = str(error)
        if not self.left:
            raise DataError(f"no vLLM server is left: {'; '.join(self.lost.values())}") from None

    def _agree(self) -> None:
        """Leave out on all ranks what is lost on any; every rank must call it."""
        self.lost |= dict(distributed.gather_rows(list(self.lost.items())))
        if not self.left:
            raise DataError(f"no vLLM server is left: {'; '.join(self.lost.values())}")

    def _ask(self, url: str, path: str, body: dict | None = None):
        """What the server answers. Asked once more where it closed the connection, if the request can be repeated."""
        try:
            return self._asked(url, path, body)
        except Dropped as error:
            if path in ONCE:
                raise
            _log.warning("%s; asked once more", error)
            return self._asked(url, path, body)

    def _asked(self, url: str, path: str, body: dict | None):
        kind: type[NoAnswer] = NoAnswer
        try:
            return ask_json(url + path, body, self._timeout, self._headers)
        except urllib.error.HTTPError as error:
            fault = f"HTTP {error.code}: {_text(error)}"
            if error.code == 404:
                fault += " (start it with `grm vllm-serve`, which opens the endpoints that a sync needs)"
            if error.code == 401:
                fault += f" (set {TOKEN_VARIABLE} to what the server was started with)"
            if error.code < 500:
                raise DataError(f"vLLM server {url}{path}: {fault}") from None
        except TimeoutError:
            fault = f"no answer within {self._timeout:g} s (ppo.server_timeout)"
        except (OSError, ValueError, http.client.HTTPException) as error:
            fault = str(getattr(error, "reason", error))
            kind = Dropped if was_dropped(error) else NoAnswer
        raise kind(f"vLLM server {url}{path}: {fault}")


def _text(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")[:300]
    except (OSError, http.client.HTTPException):  # it has closed the connection
        return error.reason
