"""What a PPO run logs: metrics.jsonl, samples.jsonl, TensorBoard, other trackers, and warnings on the console."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from core.config import Config
from core.errors import DataError
from ppo.saved import LOGS
from ppo.watch import warnings_of


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
        self._rows = read_rows(out / "metrics.jsonl")
        self._writer = SummaryWriter(out / "tensorboard", purge_step=first_step)
        self._trackers = [_tracker(name, cfg) for name in cfg.ppo.trackers]

    def step(self, step: int, stats: dict[str, float], samples: list[dict]) -> None:
        """Write one step everywhere, and print its headline and the warnings that are new."""
        row = {"step": step, **stats}
        self._rows.append(row)
        with (self._out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        with (self._out / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        for name, value in stats.items():
            self._writer.add_scalar(f"ppo/{name}", value, step)
        self._writer.add_text("samples", _table(samples), step)
        self._writer.flush()
        for tracker in self._trackers:
            tracker.log({f"ppo/{k}": v for k, v in stats.items()}, step=step)
        tqdm.write(
            "ppo {step:>4}: proxy {proxy_mean:+.3f} +- {proxy_se:.3f}  KL {kl_nats_per_response:.2f}  tokens "
            "{response_tokens:.0f}  EOS {eos_rate:.0%}  {seconds_total:.0f} s".format(**row)
        )
        for line in warnings_of(self._rows):
            tqdm.write(f"ppo {step:>4}: warning: {line}")

    def close(self) -> None:
        """Flush and end TensorBoard and the trackers."""
        self._writer.close()
        for tracker in self._trackers:
            tracker.finish()


def read_rows(file: Path) -> list[dict]:
    """The rows of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def keep_until(file: Path, step: int) -> None:
    """Drop the rows of later steps from a JSONL file, and a last line that a kill cut short."""
    kept = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    if file.is_file():
        file.write_text("".join(kept))


def _table(samples: list[dict]) -> str:
    """A Markdown table, which TensorBoard renders."""
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")  # noqa: E731
    rows = [f"| {s['proxy']:+.3f} | {s['tokens']} | {cell(s['response'])} |" for s in samples]
    return "\n".join(["| proxy | tokens | response |", "| --- | --- | --- |", *rows])


def _tracker(name: str, cfg: Config):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(getattr(n, "value", n)) for n in get_available_trackers()]
    if name not in available or name == "tensorboard":
        others = ", ".join(n for n in available if n != "tensorboard") or "none"
        raise DataError(f"ppo.trackers: {name!r} is not installed or not known to accelerate; available: {others}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind("grm-rlhf", str(cfg.run_dir)) if kind.requires_logging_directory else kind("grm-rlhf")
    tracker.start()
    tracker.store_init_configuration(json.loads(cfg.model_dump_json()))
    return tracker
