"""The unbroken run of a drill, copies of it to break, and commands on them."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from core.artefacts import FINGERPRINT, MANIFEST, as_json
from core.config.load import load
from core.damage import OWN
from core.files import path_digest
from experiments.drill.models import NAME, prepare
from experiments.drill.processes import Command, Ended
from pipelines.stages import ALWAYS as STAGES
from pipelines.stages import fingerprint

STUDY = "study"
ALL = (*STAGES, STUDY)
POLICIES = ("ppo", "eval")
"""Stages that each policy of a study has of its own."""
LIMIT = 600.0
"""Seconds for one command; those of a drill take 1 to 30 on an idle core."""
MILESTONES = {
    "preferences": "samples/shard-0001.parquet", "rm": "bt/train.jsonl", "bon": "scores/bt/shard-0001.parquet",
    "ppo": "checkpoints/step-0003", "eval": "steps/0001.parquet",
}  # fmt: skip
"""A file of each long stage that is there when the stage is half done. What it has written by then is kept."""
LOOSE = ("tensorboard", OWN, FINGERPRINT, "last.json")
"""Names of files and folders that are no result: the last one has digests of logs in which times stand."""


class Bench:
    """A folder with the model, the configuration, the unbroken run and half-done stages; made once.

    Args:
        work: the folder; kept from an earlier drill as it is.
        stages: what is run.
    """

    def __init__(self, work: Path, stages: Sequence[str] = ALL, say: Callable[[str], None] = print):
        self.work, self.stages, self.say = work.resolve(), stages, say
        self.runs, self.half = self.work / "unbroken", self.work / "half"
        self.run, self.study = self.runs / NAME, self.runs / STUDY
        self.config = prepare(self.work)
        self._file = self.work / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        """Of processors, for each stage of the unbroken run, and for the study."""

    def make(self) -> None:
        """The unbroken run and the unbroken study, as far as they are not there."""
        for stage in STAGES:
            if stage in self.stages and stage not in self.seconds:
                self._unbroken(stage, self.words(stage, self.runs))
        if STUDY in self.stages and STUDY not in self.seconds:
            for stage in ("prompts", "preferences"):
                shutil.copytree(self.run / stage, self.study / stage, dirs_exist_ok=True)
            self._unbroken(STUDY, self.study_words(self.runs))

    def _unbroken(self, stage: str, words: list[str]) -> None:
        partial, kept = self.run / f"{stage}.partial", self.half / stage
        for begun in (partial, kept):  # by a drill that was stopped
            shutil.rmtree(begun, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = Command(words, self.work / f"{stage}.log")
        try:
            while command.running():
                time.sleep(0.01)
                if stage in MILESTONES and not kept.is_dir() and (partial / MILESTONES[stage]).exists():
                    command.signal(signal.SIGSTOP, command.pids())
                    shutil.copytree(partial, kept)
                    command.signal(signal.SIGCONT, command.pids())
            ended = command.end(LIMIT)
        finally:
            command.kill_all()
        if ended.status:
            raise RuntimeError(f"{ended.words} ended with status {ended.status}:\n{ended.said[-3000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds[stage] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self._file.write_text(json.dumps(self.seconds))
        self.say(f"unbroken {stage}: {self.seconds[stage]:.0f} s of a processor")

    def options(self, runs: Path) -> list[str]:
        """The configuration of a run in the folder `runs`."""
        return ["--config", str(self.config), f"run.dir={runs}"]

    def study_words(self, runs: Path) -> list[str]:
        return ["study", *self.options(runs), f"run.name={STUDY}"]

    def words(self, stage: str, runs: Path) -> list[str]:
        """The command of a stage, or of the study, in the folder `runs`."""
        return self.study_words(runs) if stage == STUDY else [stage, *self.options(runs)]

    def copy(self, runs: Path, stages: Iterable[str] = tuple(STAGES)) -> Path:
        """A copy of the unbroken run with these finished stages; the folder of the run."""
        run = runs / NAME
        for stage in stages:
            if stage in self.stages:
                shutil.copytree(self.run / stage, run / stage)
        run.mkdir(parents=True, exist_ok=True)
        return run

    def copy_study(self, runs: Path, without: Iterable[str]) -> Path:
        """A copy of the unbroken study without these stages; of `ppo` and `eval`, in all of its policies."""
        run = runs / STUDY
        shutil.copytree(self.study, run, symlinks=True, ignore=shutil.ignore_patterns(OWN, *without))
        return run

    def copy_half(self, stage: str, runs: Path) -> Path:
        """A copy of the unbroken run's stages before `stage`, and what that stage had written when it was half done."""
        run = self.copy(runs, before(stage))
        partial = run / f"{stage}.partial"
        shutil.copytree(self.half / stage, partial)
        cfg = load([self.config], [f"run.dir={runs}"])
        (partial / FINGERPRINT).write_text(json.dumps(as_json(fingerprint(STAGES[stage], cfg))))
        return run

    def digests(self) -> dict[str, str]:
        """Of the unbroken run and study, by stage: they must be the same when a drill ends."""
        return {s: path_digest(self.study if s == STUDY else self.run / s) for s in self.stages}


def before(stage: str) -> list[str]:
    """The stages that a stage needs, directly or through others."""
    wanted = set(STAGES[stage].inputs)
    for other in reversed(STAGES.values()):
        if other.name in wanted:
            wanted |= set(other.inputs)
    return [s for s in STAGES if s in wanted]


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between a stage's folder, or a study's, of the unbroken run and of another one, a line each.

    Compared are the names of all files and their bytes, and in JSON, JSONL and CSV everything that is not a time. Pages
    and model cards tell times in their texts, and so are compared by name only, as TensorBoard's files are not at all.
    """
    left, right = ({str(p.relative_to(root)): p for p in files(root)} for root in (expected, found))
    lines = [f"{name} is missing" for name in sorted(left.keys() - right.keys())]
    lines += [f"{name} is extra" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        if left[name].read_bytes() != right[name].read_bytes() and content(left[name]) != content(right[name]):
            lines.append(f"{name} differs")
    return lines


def files(root: Path) -> list[Path]:
    """Of a stage's folder or a study's, without those that may differ between two equal runs."""
    shared = {root / s for s in ("prompts", "preferences", "rm", "bon")} if root.name == STUDY else set()
    return [
        p for p in sorted(root.rglob("*"))
        if p.is_file() and not set(p.relative_to(root).parts) & {*LOOSE, "matrix.yaml", "study.yaml", ".replaced"}
        and not any(parent.is_symlink() for parent in p.parents if parent.is_relative_to(root))
        and (not shared & set(p.parents) or p.suffix in (".parquet", ".safetensors"))
    ]  # fmt: skip


def content(file: Path) -> object:
    """What a file says, times left out; the bytes of a file of another kind."""
    if file.suffix in (".html", ".md"):
        return None
    if file.name == MANIFEST:
        manifest = json.loads(file.read_text().replace(str(file.parents[1]), "RUN"))  # the report's names its page
        return _timeless([manifest[key] for key in ("stage", "metrics")])
    if file.suffix == ".json":
        return _timeless(json.loads(file.read_text()))
    if file.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
    if file.suffix == ".csv":
        lines = [line.split(",") for line in file.read_text().splitlines()]
        timed = [i for i, name in enumerate(lines[0]) if _is_time(name)] if lines else []
        return [[x for i, x in enumerate(line) if i not in timed] for line in lines]
    return file.read_bytes()


def _is_time(key: str) -> bool:
    return "seconds" in key or "per_second" in key


def _timeless(value: object) -> object:
    if isinstance(value, Mapping):
        return {k: _timeless(v) for k, v in value.items() if not _is_time(str(k))}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def run_to_end(words: list[str], log: Path, limit: float = LIMIT, **options) -> Ended:
    """Run a command to its end; what it left running is killed."""
    command = Command(words, log, **options)
    ended = command.end(limit)
    command.kill_all()
    return ended
