"""`make soak`: writes docs/soak.md, its figure, and experiments/soak/results.json.

python -m experiments.soak [ppo] [serve] [--steps 200] [--requests 100000] [--connections 32]
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from core.errors import DataError
from core.http import ask_json
from core.machine import describe
from core.ranks import free_port
from experiments.drill.bench import Bench
from experiments.drill.models import PROXY
from experiments.drill.processes import Command
from experiments.soak import page
from experiments.soak.serving import BAD_ONE_IN, Clients, answered, questions
from experiments.soak.watch import Held, Watch, faults

MOST_MEMORY = 0.05
"""Share by which memory may be larger in the last quarter than in the second."""
RESULTS = Path(__file__).with_name("results.json")
WORK = Path("runs", "soak")
START_SECONDS = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="experiments.soak", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="ppo, serve; by default both")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    if unknown := set(options.parts) - {"ppo", "serve"}:
        parser.error(f"unknown part {min(unknown)!r}; there are ppo and serve")
    bench = Bench(WORK, ("prompts", "preferences", "rm"))
    bench.make()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for part in options.parts or ("ppo", "serve"):
        began = time.monotonic()
        what, rows, wrong = (
            soak_ppo(bench, options.steps)
            if part == "ppo"
            else soak_server(bench, options.requests, options.connections)
        )
        wrong += faults(rows, MOST_MEMORY)
        found[part] = {
            "what": what, "seconds": round(time.monotonic() - began), "machine": _machine(), "faults": wrong,
            "rows": [_rounded(row) for row in rows],
        }  # fmt: skip
        RESULTS.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace("},{", "},\n{") + "\n")
        page.write(found)
        print(f"{what}: {'; '.join(wrong) or 'nothing grows'}")
    return int(any(part["faults"] for part in found.values()))


def soak_ppo(bench: Bench, steps: int) -> tuple[str, list, list[str]]:
    """PPO with vLLM on two ranks, for so many steps."""
    runs = _empty(bench.work / "ppo")
    run = bench.copy(runs, ("prompts", "preferences", "rm"))
    words = [
        *bench.words("ppo", runs), "ppo.engine.processes=2", f"ppo.steps={steps}", "ppo.save_every=20",
        f"ppo.checkpoint_every={steps // 4}",
    ]  # fmt: skip
    log = run / "ppo.partial" / "metrics.jsonl"
    lines = lambda: log.read_bytes().count(b"\n") if log.is_file() else 0  # noqa: E731
    with _command(words, bench.work / "ppo.log") as (command, temporary):
        watch = Watch(command.pids, lines, temporary)
        with tqdm(total=steps, desc="soak: ppo", unit="step") as bar:
            while command.running():
                watch.look()
                bar.update(lines() - bar.n if log.is_file() else 0)
                time.sleep(0.1)
        status = command.process.wait()
    if status:
        raise DataError(f"grm {' '.join(words)} ended with status {status}: see {bench.work / 'ppo.log'}")
    return f"PPO, {steps} steps with vLLM on two ranks", watch.rows, []


def soak_server(bench: Bench, requests: int, connections: int) -> tuple[str, list, list[str]]:
    """So many requests to a reward server, and whether the answers were right."""
    port = free_port()
    words = ["rm-serve", bench.run / "rm" / PROXY, "--port", port, "--dtype", "float32"]
    prompts = [json.loads(line) for line in (bench.work / "prompts.jsonl").read_text().splitlines()]
    texts = [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] for row in prompts]
    with _command(words, bench.work / "serve.log") as (command, temporary):
        _wait_for(port, command)
        asked = answered(port, questions(texts, seed=0))
        refused = sum(not question.rewards for question in asked)
        if refused != len(asked) // BAD_ONE_IN:
            raise DataError(f"the server refused {refused} of {len(asked)} requests, not one in {BAD_ONE_IN}")
        clients = Clients(port, asked, connections, requests)
        watch = Watch(command.pids, lambda: clients.done, temporary)
        with tqdm(total=requests, desc="soak: rm-serve", unit="request") as bar:
            while clients.running():
                watch.look()
                bar.update(clients.done - bar.n)
                time.sleep(0.1)
    wrong = [f"{len(clients.faults)} wrong answers, such as: {clients.faults[0]}"] if clients.faults else []
    return f"grm rm-serve, {requests:,} requests from {connections} connections", watch.rows, wrong


@contextmanager
def _command(words: list, log: Path) -> Iterator[tuple[Command, Path]]:
    """A running command, and the folder of its temporary files, in which it is alone."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        command = Command(words, log, env={"TMPDIR": folder})
        try:
            yield command, Path(folder)
        finally:
            command.kill_all()


def _wait_for(port: int, command: Command) -> None:
    deadline = time.monotonic() + START_SECONDS
    while command.running() and time.monotonic() < deadline:
        try:
            ask_json(f"http://127.0.0.1:{port}/health", None, 5)
        except (OSError, http.client.HTTPException):
            time.sleep(0.2)
        else:
            return
    raise DataError(f"the server does not answer: see {command.log}")


def _rounded(row: Held) -> dict[str, float | None]:
    return {key: round(value, 1) if isinstance(value, float) else value for key, value in row._asdict().items()}


def _machine() -> str:
    """Commit, processor and libraries, without what is of this machine alone."""
    lines = [" ".join(line.split()) for line in describe(device=False)]
    kept = ("code ", "cpu ", "memory ", "package torch", "package vllm", "package deepspeed", "package transformers")
    return "; ".join(line.removeprefix("package ") for line in lines if line.startswith(kept))


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
