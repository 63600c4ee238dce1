"""Other people's trackers, through accelerate: the run's name, and the same run of the tracker after a resume."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.artefacts import RESUME
from core.config import Config
from core.errors import DataError
from core.files import read_json, write_json

PROJECT = "grm-rlhf"
FILE = "trackers.json"
"""In the folder of resumable states, which is no output: `id`, made once, and what trackers call their runs."""

# The options of each tracker that name a run and continue it, from (name, id, what was saved of it). They go to
# wandb.init (id, resume: docs.wandb.ai/guides/runs/resuming), trackio.init, which knows runs by name alone,
# swanlab.init (docs.swanlab.cn/en/guide_cloud/experiment_track/resume-experiment) and mlflow.start_run.
OPTIONS: dict[str, Callable[[str, str, str | None], dict[str, Any]]] = {
    "wandb": lambda name, id_, _: {"name": name, "id": id_, "resume": "allow"},
    "trackio": lambda name, id_, _: {"name": f"{name}-{id_[:6]}", "resume": "allow"},
    "swanlab": lambda name, id_, _: {"experiment_name": name, "id": id_, "resume": "allow"},
    "mlflow": lambda name, _, saved: {"run_name": name, "run_id": saved},
}
CALLED: dict[str, Callable[[Any], str]] = {"mlflow": lambda tracker: tracker.tracker.info.run_id}
"""Of trackers that choose the id themselves: how it is read, so that the next start can give it."""


class Trackers:
    """Those of `ppo.trackers`. The first rank makes it.

    Args:
        out: folder of the run.

    Raises:
        DataError: a tracker that is not installed, or not known to accelerate.
    """

    def __init__(self, cfg: Config, out: Path):
        self._trackers: list[Any] = []
        if not cfg.ppo.trackers:
            return
        file = out / RESUME / FILE
        known = (
            read_json(file) if file.is_file() else {"id": secrets.token_hex(10) + "0"}
        )  # SwanLab wants 21 characters
        for name in cfg.ppo.trackers:
            tracker = _started(name, cfg, known)
            if name in CALLED:
                known[name] = CALLED[name](tracker)
            self._trackers.append(tracker)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _started(name: str, cfg: Config, known: Mapping[str, str]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState()  # trackers log through accelerate, which refuses to where it does not know the ranks
    available = [str(getattr(n, "value", n)) for n in get_available_trackers()]
    if name not in available or name == "tensorboard":
        others = ", ".join(n for n in available if n != "tensorboard") or "none"
        raise DataError(f"ppo.trackers: {name!r} is not installed or not known to accelerate; available: {others}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    options = OPTIONS[name](cfg.run.name, known["id"], known.get(name)) if name in OPTIONS else {}
    folder = (str(cfg.run_dir),) if kind.requires_logging_directory else ()
    tracker = kind(PROJECT, *folder, **options)
    tracker.start()
    if known.get(name) is None:  # MLflow refuses other values for a run that has some
        tracker.store_init_configuration(json.loads(cfg.model_dump_json()))
    return tracker
