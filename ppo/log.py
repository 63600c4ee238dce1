"""What a PPO run logs: metrics.jsonl, rollouts, TensorBoard, other trackers, and warnings on the console."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from core.config import Config
from core.files import keep_until
from ppo.measured.held_out import FILE as HELD_OUT
from ppo.measured.held_out import in_words
from ppo.measured.rollouts import RolloutTables
from ppo.measured.trackers import Trackers
from ppo.measured.watch import warnings_of
from ppo.saved import LOGS

METRICS = "metrics.jsonl"
SHOWN = 8
"""Responses of a step that TensorBoard shows."""


class RunLog:
    """Made by the first rank only.

    A resumed run repeats the steps after its last saved state. Their rows are dropped first, so that every step has one
    row.

    Args:
        out: folder of the run.
        first_step: the first step that will be logged.

    Raises:
        DataError: a tracker of `ppo.trackers` is not installed.
    """

    def __init__(self, cfg: Config, out: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._out = out
        for name in LOGS:
            if first_step == 1:
                (out / name).unlink(missing_ok=True)
            keep_until(out / name, first_step - 1)
        self._rows = read_rows(out / METRICS)
        self._rollouts = RolloutTables(out, cfg.ppo.keep_rollouts_mib)
        self._rollouts.forget_after(first_step - 1)
        self._writer = SummaryWriter(out / "tensorboard", purge_step=first_step)
        self._trackers = Trackers(cfg, out)

    def step(self, step: int, stats: dict[str, float], responses: list[dict]) -> None:
        """Write one step everywhere, and print its headline and the warnings that are new.

        Args:
            responses: of all ranks, complete where they are kept (`ppo.measured.rollouts`).
        """
        row = {"step": step, **stats}
        self._rows.append(row)
        with (self._out / METRICS).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._rollouts.are_kept:
            self._rollouts.write(step, responses)
        for name, value in stats.items():
            self._writer.add_scalar(f"ppo/{name}", value, step)
        self._writer.add_text("samples", _table(responses[:SHOWN]), step)
        self._writer.flush()
        self._trackers.log({f"ppo/{k}": v for k, v in stats.items()}, step)
        tqdm.write(
            "ppo {step:>4}: proxy {proxy_mean:+.3f} +- {proxy_se:.3f}  KL {kl_nats_per_response:.2f}  tokens "
            "{response_tokens:.0f}  EOS {eos_rate:.0%}  {seconds_total:.0f} s".format(**row)
        )
        for line in warnings_of(self._rows):
            tqdm.write(f"ppo {step:>4}: warning: {line}")

    def held_out(self, step: int, stats: dict[str, float]) -> None:
        """Write an evaluation on held-out prompts everywhere, and print it."""
        with (self._out / HELD_OUT).open("a") as file:
            file.write(json.dumps({"step": step, **stats}, allow_nan=False) + "\n")
        for name, value in stats.items():
            self._writer.add_scalar(f"held_out/{name}", value, step)
        self._writer.flush()
        self._trackers.log({f"held_out/{k}": v for k, v in stats.items()}, step)
        tqdm.write(in_words(step, stats))

    def close(self) -> None:
        """Flush and end TensorBoard and the trackers."""
        self._writer.close()
        self._trackers.finish()


def summary(metrics: Path) -> dict:
    """The metrics of the stage from metrics.jsonl: a headline, the rows of the first and the last step, and by how many
    standard errors the proxy reward changed between them (None where the standard error is 0)."""
    rows = read_rows(metrics)
    first, last = rows[0], rows[-1]
    change = last["proxy_mean"] - first["proxy_mean"]
    error = (first["proxy_se"] ** 2 + last["proxy_se"] ** 2) ** 0.5
    held_out = read_rows(metrics.with_name(HELD_OUT))
    return {
        "headline": (
            f"proxy {first['proxy_mean']:+.3f} -> {last['proxy_mean']:+.3f} (change {change:+.3f}, SE {error:.3f})"
            f" over {len(rows)} steps at KL {last['kl_nats_per_response']:.2f} nats per response"
        ),
        "first": first,
        "last": last,
        "proxy_change_over_se": change / error if error else None,
        **({"held_out": {"first": held_out[0], "last": held_out[-1]}} if held_out else {}),
    }


def read_rows(file: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _table(samples: list[dict]) -> str:
    """A Markdown table, which TensorBoard renders."""
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    rows = [f"| {s['proxy']:+.3f} | {s['n_tokens']} | {cell(s['response'])} |" for s in samples]
    return "\n".join(["| proxy | tokens | response |", "| --- | --- | --- |", *rows])
