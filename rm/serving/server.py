"""`grm rm-serve MODEL [MODEL...]`: rewards of one reward model or of an ensemble over HTTP.

    POST /score       {"conversations": [[{"role": ..., "content": ...}, ...], ...]} -> {"rewards": [...]}; an ensemble
                      adds "members": [[...], ...], the standardised rewards that were combined. Responses are read as
                      they were sampled with "token_ids": [[...], ...] and "tokenizer": the fingerprint of /health
    POST /get_reward  for OpenRLHF (`--remote_rm_url http://HOST:PORT/get_reward`):
                      {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards", "scores", "extra_logs"}
    GET /health       models, tokenizer fingerprint, mean, std

A body that cannot be scored is answered with 400 and {"error": ...}, which names the row; one above the limit with 413;
a failure of the server with 500. With a token (`--token`, or the variable GRM_SERVE_TOKEN) a request without it is
answered with 401: the header is `Authorization: Bearer TOKEN`, and for clients that send no headers `?token=TOKEN` at
the end of the address. The connection is not encrypted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from torch import Tensor

from core.config import NATIVE_DTYPE, Dtype
from core.errors import ArtefactError
from core.http import TOKEN_VARIABLE, TokenRequired, check_host, token_of
from core.models.state_cache import FrozenStateCache
from rm.calibration import calibrate, read_calibration
from rm.combine import KNOWN, combiner, standardise
from rm.ensemble import AdapterEnsemble, one_base
from rm.model import RewardModel
from rm.reading import Reads, Tokens
from rm.serving.rows import BadRequest, RowReader
from rm.serving.scoring_queue import ScoringQueue

MAX_BODY = 64 << 20
"""Bytes. 256 conversations of 32,000 tokens are some 32 MiB."""
READ_AT_MOST = 4
"""Times the limit that a body may have to be read to its end before it is refused."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    combiner(options.combine)  # so that an unknown name is reported before anything is loaded
    token = token_of(options.token)
    check_host(options.host, token)
    rows = read_calibration(options.calibrate) if options.calibrate else []
    models, frozen = load(options.models, dtype=options.dtype, base=options.base, reads=options.reads)
    for model in models if rows else ():
        model.mean, model.std = calibrate(model, rows, batch_tokens=options.batch_tokens)
    ensemble = Ensemble(
        options.models, models, combine=options.combine, normalise=options.normalise, frozen=frozen,
        batch_tokens=options.batch_tokens,
    )  # fmt: skip
    app = make_app(ensemble, max_tokens=options.max_tokens, max_body=options.max_body_mib << 20, token=token)
    address = f"http://{options.host}:{options.port}"
    print(f"serving {', '.join(options.models)} on {address}/score and {address}/get_reward", file=sys.stderr)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0


def load(
    paths: Sequence[str], *, dtype: str, base: str | None = None, reads: Reads | None = None
) -> tuple[Sequence[RewardModel], Callable[[Sequence[Tokens]], FrozenStateCache | None] | None]:
    """The models, and `frozen` of `Ensemble`: adapters of one base share it in memory, and its frozen layers."""
    if not one_base(paths):
        options: Any = {"dtype": dtype, "base": base, "reads": reads, "lm_head": False}
        return [RewardModel.from_pretrained(path, **options) for path in paths], None
    shared = AdapterEnsemble.from_pretrained(paths, dtype=dtype, base=base)
    for member in shared.members:
        member.reads = reads or member.reads
    return shared.members, shared.frozen_state_cache


class Ensemble:
    """k reward models of one tokenizer as one; a single model gives its own rewards.

    The members of an ensemble are always standardised by their mean and std, a single model only with `normalise`.

    Args:
        frozen: makes the frozen-state cache of given rows, for members that have frozen layers in common.

    Raises:
        ArtefactError: members with different tokenizers, or whose mean and std were never measured.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[RewardModel],
        *,
        combine: str = "mean",
        normalise: bool = False,
        frozen: Callable[[Sequence[Tokens]], FrozenStateCache | None] | None = None,
        batch_tokens: int = 8192,
    ):
        self.names, self.models, self.rule, self.batch_tokens = list(names), list(models), combine, batch_tokens
        self.tokenizer, self._frozen = models[0].tokenizer, frozen
        self.standardised = normalise or len(models) > 1
        self._combine = combiner(combine)
        for name, model in zip(names, models, strict=True):
            if model.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise ArtefactError(f"{name} has another tokenizer or chat template than {names[0]}")
            if model.reads != models[0].reads:
                raise ArtefactError(
                    f"{name} reads {model.reads}, but {names[0]} {models[0].reads}: serve them apart, or set --reads"
                )
            if self.standardised and (model.mean, model.std) == (0.0, 1.0):
                raise ArtefactError(
                    f"{name} has no measured mean and std, so its rewards have no scale: give --calibrate FILE.parquet"
                )

    @property
    def max_tokens(self) -> int:
        """Number of positions that all members have."""
        return min(model.positions for model in self.models)

    def members(self, rows: Sequence[Tokens]) -> Tensor:
        """Float32 rewards [k, n], standardised if `self.standardised`."""
        frozen = self._frozen(rows) if self._frozen else None
        rewards = [model.score_tokens(rows, batch_tokens=self.batch_tokens, frozen=frozen) for model in self.models]
        if not self.standardised:
            return torch.stack(rewards)
        return standardise(torch.stack(rewards), [m.mean for m in self.models], [m.std for m in self.models])

    def combine(self, members: Tensor) -> Tensor:
        """Rewards [k, n] of `members` -> rewards [n]."""
        return self._combine(members)

    def about(self) -> dict:
        """What clients check. Mean and std are those of the rewards under the reference, null for ensembles."""
        single = self.models[0] if len(self.models) == 1 else None
        mean, std = (0.0, 1.0) if self.standardised else (self.models[0].mean, self.models[0].std)
        return {
            "status": "ok",
            "models": [
                {"model": name, "head": m.head_kind, "mean": m.mean, "std": m.std}
                for name, m in zip(self.names, self.models, strict=True)
            ],
            "combine": None if single else self.rule,
            "standardised": self.standardised,
            "tokenizer": self.tokenizer.fingerprint,
            "reads": self.models[0].reads,
            "mean": mean if single else None,
            "std": std if single else None,
        }


def make_app(
    ensemble: Ensemble, *, max_tokens: int | None = None, max_body: int = MAX_BODY, token: str | None = None
) -> FastAPI:
    """The web application; the scoring thread ends with it.

    Args:
        max_tokens: of the longest row that is accepted; never more than the positions of the models.
        max_body: bytes of the largest body that is read.
        token: what clients must send; None for no authentication.
    """
    limit = min(max_tokens or sys.maxsize, ensemble.max_tokens)
    reader = RowReader(ensemble.models[0].reader, limit)
    queue = ScoringQueue(ensemble.members, batch_tokens=ensemble.batch_tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title="Reward model", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if token:
        app.add_middleware(TokenRequired, token=token)

    async def members_of(request: Request, read: Callable[[object], list[Tokens]]) -> Tensor:
        rows = await run_in_threadpool(read, _parse(await _body(request, max_body)))
        return await asyncio.wrap_future(queue.submit(rows))

    @app.post("/score")
    async def score(request: Request) -> dict:
        members = await members_of(request, reader.conversations)
        own = {"members": members.tolist()} if len(members) > 1 else {}
        return {"rewards": ensemble.combine(members).tolist()} | own

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict:
        rewards = ensemble.combine(await members_of(request, reader.queries)).tolist()
        # OpenRLHF expects tensors in extra_logs, which JSON cannot hold.
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    @app.get("/health")
    async def health() -> dict:
        return ensemble.about() | {"max_tokens": limit}

    @app.exception_handler(BadRequest)
    async def refuse(_: Request, error: BadRequest) -> JSONResponse:
        return _error(str(error), 413 if isinstance(error, TooLarge) else 400)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> JSONResponse:
        return _error(f"{type(error).__name__}: {error}", 500)

    return app


class TooLarge(BadRequest):
    """A body above the limit: HTTP 413."""


def _error(text: str, status: int) -> JSONResponse:
    # A message may quote what the client sent, and not every text of JSON is one of UTF-8.
    return JSONResponse({"error": text.encode(errors="backslashreplace").decode()}, status_code=status)


async def _body(request: Request, limit: int) -> bytes:
    """The body, of which no more than `limit` bytes are kept.

    A client that is still sending sees no answer but a closed connection, so the rest of a larger body is read too, and
    thrown away; of one above `READ_AT_MOST` times the limit no more.
    """
    told = request.headers.get("content-length", "0")
    body, size = bytearray(), int(told) if told.isdigit() else 0
    if size <= READ_AT_MOST * limit:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                body += chunk
            elif size > READ_AT_MOST * limit:
                break
    if size > limit:
        raise TooLarge(f"a body of more than {limit} bytes: send fewer rows at once, or raise --max-body-mib")
    return bytes(body)


def _parse(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grm rm-serve",
        description="Serve rewards over HTTP: POST /score, POST /get_reward (for OpenRLHF), GET /health. There is "
        "no authentication without a token.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="folders or hub ids; several are an ensemble")
    parser.add_argument("--combine", default="mean", metavar="RULE", help=f"of an ensemble: {KNOWN} (%(default)s)")
    parser.add_argument(
        "--normalise", action="store_true", help="standardise the rewards of a single model too, by its mean and std"
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE",
        help="calibration.parquet of a run (prompt, response): measure each model's mean and std on it",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s); another one needs a token"
    )
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="padded tokens of a forward pass (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="refuse longer rows (default: the positions of the model)")
    parser.add_argument("--dtype", choices=get_args(Dtype), default=NATIVE_DTYPE, help="of the weights (%(default)s)")
    parser.add_argument("--base", help="base of adapters, instead of the one that they name")
    parser.add_argument("--reads", choices=get_args(Reads), help="tokens that the models read (default: what each "
                        "records, or what the makers of its layout do; docs/reward-models.md)")  # fmt: skip
    parser.add_argument("--token", help=f"what clients must send; better set {TOKEN_VARIABLE}, since other users of "
                        "the machine see the arguments of a program (default: no authentication)")  # fmt: skip
    parser.add_argument("--max-body-mib", type=int, default=MAX_BODY >> 20,
                        help="MiB of the largest request that is read (%(default)s)")  # fmt: skip
    return parser
