"""The table of stages, and how one is run: check the inputs, decide freshness, run, publish."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from core import starting
from core.artefacts import (
    FINGERPRINT,
    MANIFEST,
    REPLACED,
    RESUME,
    Fingerprint,
    as_json,
    fits_partial,
    has_work,
    keep_partial,
    kept_partial,
    manifest_digest,
    open_partial,
    partial_of,
    publish,
    read_fingerprint,
    read_manifest,
)
from core.config import ENGINE_STAGES, Config, EngineStage
from core.damage import remember_outputs
from core.data.templates import named_template
from core.errors import ArtefactError
from core.files import path_digest, write_json
from core.functions import source_file
from core.parts import drop_damaged
from core.ranks import told_by_first


class Correction(NamedTuple):
    """What earlier versions of a stage got wrong."""

    fault: str
    """The end of "an earlier version ..."."""
    of: str | Callable[[Config], bool] = ""
    """Config field (dotted): only results with this option set were wrong. Or a function that tells by the
    configuration. Empty: all results."""


@dataclass(frozen=True)
class Stage:
    name: str
    module: str
    """Its `run(cfg, inputs, out) -> metrics` is the stage; imported only when it runs. `tidy(cfg, folder)`, if it has
    that, deletes what was needed until the result was published."""
    inputs: tuple[str, ...]
    """Stages whose folders it reads."""
    reads: tuple[str, ...]
    """Config sections or fields (dotted) that decide its result."""
    files: tuple[str, ...] = ()
    """Config fields that hold paths of external files, checked by content."""
    functions: tuple[str, ...] = ()
    """Config fields that name a Python function of the user's own, whose source is checked by content."""
    with_gold: str = ""
    """Config field with which it reads gold too, which it does not read otherwise."""
    distributed: bool = False
    """Run on every rank of `engine.processes`, which train together."""
    divided: bool = False
    """Run on `generation.processes` processes, which divide its shards (`core.shares`)."""
    engine: EngineStage = "ppo"
    """Whose `engine` it reads: `rm.engine` or `ppo.engine` over the common one."""
    makes: str = ""
    """What it leaves, for `grm status`."""
    grows: tuple[str, str] | None = None
    """(field, module): a finished or stopped run is continued when only this number is raised, unless the module's
    `why_not(section, folder, old)` names a reason against it."""
    follows_sft: bool = False
    """Its policy is that of stage `sft`, where the configuration has that stage, which is then one of its inputs."""
    opens_weights: bool = True
    """Whether it opens the weights in the folders that it reads. Where it does not, they may have been deleted."""
    corrections: tuple[Correction, ...] = ()
    """What earlier versions got wrong in its result, oldest first. Only ever append to it: the finished results that
    were wrong are out of date from then on."""

    def inputs_in(self, cfg: Config) -> tuple[str, ...]:
        """Stages whose folders it reads with this configuration."""
        return (*self.inputs, SFT) if self.follows_sft and cfg.sft else self.inputs


SFT = "sft"
"""The one stage that a configuration may be without."""
PUBLISHED_ONLY = ("policy", "policy-ema")
"""Folders that a stage writes at its end only: not copied where it is continued."""
_POLICY_FILES = ("policy.path", "policy.chat_template")
_SAMPLING = ("policy", "generation", "run.seed")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("prompts", "pipelines.prompts", (), ("data", "policy", "run.seed"),
              ("data.prompts", "data.eval_prompts", *_POLICY_FILES), makes="prompts, split by hash"),
        Stage(SFT, "sft.train", ("prompts",), ("sft", "policy", "data.system", "engine", "run.seed"),
              ("sft.data", *_POLICY_FILES), distributed=True, engine="sft",
              makes="the policy fine-tuned on demonstrations (only with a section `sft`)"),
        Stage("preferences", "pipelines.preferences", ("prompts",), (*_SAMPLING, "gold", "preferences"),
              (*_POLICY_FILES, "gold.path", "preferences.sources", "preferences.decontaminate"),
              divided=True, follows_sft=True,
              corrections=(Correction("read imported pairs without their system turns and histories",
                                      of="preferences.sources"),
                           Correction("kept the texts of samples, not the tokens that reward models are trained on")),
              makes="labelled pairs of samples, or imported pairs"),
        Stage("rm", "rm.train", ("preferences",), ("rm", "engine", "run.seed"),
              ("rm.base.path", "rm.base.chat_template"), distributed=True, engine="rm", makes="reward models",
              corrections=(
                  Correction("summed InfoRM's KL over its dimensions, which made it 128 times too large",
                             of=lambda cfg: any(v.head == "inform" for v in cfg.rm.variants.values())),
                  Correction("took ODIN's correlations with length within micro-batches that were sorted by length",
                             of=lambda cfg: any(v.head == "odin" for v in cfg.rm.variants.values())))),
        Stage("bon", "bon.run", ("prompts", "rm"), (*_SAMPLING, "gold", "bon"),
              (*_POLICY_FILES, "gold.path"), divided=True, follows_sft=True,
              makes="pools of samples, scored by gold and by every proxy",
              corrections=(Correction("scored the texts of responses, and not the tokens that were sampled"),)),
        Stage("ppo", "ppo.train", ("prompts", "rm"), (*_SAMPLING, "ppo", "engine"), _POLICY_FILES, distributed=True,
              follows_sft=True, functions=("ppo.reward.function",), with_gold="ppo.watch_gold",
              makes="policies, metrics.jsonl, rollouts, TensorBoard", grows=("ppo.steps", "ppo.extend"),
              corrections=(Correction("sorted PPO's minibatches by length"),
                           Correction("scored the texts of responses, and not the tokens that were sampled"))),
        Stage("eval", "pipelines.evaluate", ("prompts", "rm", "bon", "ppo"),
              (*_SAMPLING, "gold", "eval", "ppo.proxy", "ppo.ensemble", "engine.float32_head"),
              (*_POLICY_FILES, "gold.path"), divided=True, follows_sft=True,
              makes="proxy, gold and KL of every checkpoint",
              corrections=(Correction("scored the texts of responses, and not the tokens that were sampled"),)),
        Stage("report", "study.report.of_run", ("prompts", "preferences", "rm", "bon", "ppo", "eval"),
              ("run", "eval.bootstrap"), opens_weights=False,
              makes="report.html: the over-optimisation study of this run; its tables"),
    )
}  # fmt: skip


ALWAYS = {name: stage for name, stage in STAGES.items() if name != SFT}
"""The stages that every configuration has."""


def in_use(cfg: Config) -> list[str]:
    """The stages of this configuration, in their order."""
    return [name for name in STAGES if name != SFT or cfg.sft]


def fingerprint(stage: Stage, cfg: Config, elsewhere: Mapping[str, Path] | None = None) -> Fingerprint:
    """What the stage would run on now.

    Args:
        elsewhere: folders of input stages that are to be taken from other places than the run's folder.

    Raises:
        ArtefactError: an input that is missing or out of date; names the stage to run.
    """
    inputs, elsewhere = {}, elsewhere or {}
    for name in stage.inputs_in(cfg):
        manifest = read_manifest(elsewhere.get(name, cfg.run_dir / name))
        if manifest is None:
            raise ArtefactError(
                f"stage {stage.name!r} needs {name!r}, which has not run: run `grm {name}` first, or take it from "
                "another run with --from"
            )
        changed = fingerprint(STAGES[name], cfg, elsewhere).differences(manifest)
        if changed:
            raise ArtefactError(
                f"stage {stage.name!r} needs {name!r}, which is out of date ({changed[0]}): run `grm {name}` first"
            )
        inputs[name] = manifest_digest(manifest)
    plain = plain_values(stage, cfg)
    gold = ("gold",) if stage.with_gold and _get(plain, stage.with_gold) else ()
    sections = {field: _get(plain, field) for field in (*stage.reads, *gold)}
    for field in (*stage.files, *(f"{section}.path" for section in gold)):
        if field == "gold.path" and not cfg.gold.is_local:
            continue
        for path in _paths(_get(plain, field)):
            if path.exists():
                inputs[f"{field}={path}"] = _cached_digest(path)
            elif field.endswith("chat_template"):
                named_template(str(path))  # one of TRL's
            elif field in ("data.prompts", "data.eval_prompts", "preferences.decontaminate") or _looks_local(path):
                raise ArtefactError(f"{field}: no file or folder {path}" + _hint(field, cfg))
    for field in stage.functions:
        if name := _get(plain, field):
            inputs[f"{field}={name}"] = _cached_digest(source_file(field, name))
    corrections = tuple(c.fault if _concerns(c, cfg, plain) else "" for c in stage.corrections)
    return Fingerprint(sections, inputs, corrections)


def plain_values(stage: Stage, cfg: Config) -> dict[str, Any]:
    """The configuration as a stage reads it, in plain values: `engine` is the stage's own, and stands nowhere else.

    So a change of `ppo.engine` leaves reward models up to date, and where a value comes from does not matter.
    """
    plain = json.loads(cfg.model_dump_json())
    plain["engine"] = cfg.engine_of(stage.engine).model_dump(mode="json")
    for name in ENGINE_STAGES:
        if plain[name]:
            del plain[name]["engine"]
    return plain


def _concerns(correction: Correction, cfg: Config, plain: dict[str, Any]) -> bool:
    """Whether results of this configuration had the fault; `plain` is `cfg` as plain values."""
    if callable(correction.of):
        return correction.of(cfg)
    return not correction.of or bool(_get(plain, correction.of))


def run(name: str, cfg: Config, *, force: bool = False) -> str:
    """Run one stage in this process; the line to print at its end (rank 0)."""
    stage, folder = STAGES[name], cfg.run_dir / name
    wanted = fingerprint(stage, cfg)
    module = importlib.import_module(stage.module)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        prepare(name, cfg, wanted, force=force)
        open_partial(folder, wanted)
    told_by_first(f"{name}: its folder is prepared")
    if not partial_of(folder).is_dir():
        raise ArtefactError(f"{partial_of(folder)} was made by the first rank and is not there: run.dir must be shared")
    called = time.monotonic()
    seen = cfg.after_sft() if stage.follows_sft else cfg
    metrics = module.run(seen, {i: cfg.run_dir / i for i in stage.inputs_in(cfg)}, partial_of(folder))
    if rank != 0:
        return ""
    if fingerprint(stage, cfg).inputs != wanted.inputs:
        raise ArtefactError(
            f"stage {name!r} read inputs that were replaced while it ran, so its result is none of theirs: run it again"
        )
    seconds, parts = starting.finished(called)
    resumable = RESUME if stage.grows else None
    publish(
        partial_of(folder), folder, name, wanted, seed=cfg.run.seed, seconds=seconds, parts=parts, metrics=metrics,
        resumable=resumable,
    )  # fmt: skip
    remember_outputs(folder)
    if tidy := getattr(module, "tidy", None):
        tidy(cfg, folder)
    headline = metrics.get("headline", "done")
    return f"{name}: {headline} ({seconds:.0f} s, {parts['start']:.0f} of them to start) -> {folder}"


def prepare(name: str, cfg: Config, wanted: Fingerprint, *, force: bool = False) -> None:
    """Settle what becomes of earlier work of this stage, and say it before the work begins."""
    folder, stage = cfg.run_dir / name, STAGES[name]
    partial = partial_of(folder)
    if force and partial.is_dir() and (kept := keep_partial(folder)):
        say(f"{name}: --force starts again; the unfinished work is kept in {kept}")
    if partial.is_dir() and not fits_partial(folder, wanted):
        mark = read_fingerprint(partial) or {}
        changed = wanted.differences(mark) if mark else ["its fingerprint is missing"]
        if not extend(stage, cfg, wanted, partial, mark) and (kept := keep_partial(folder)):
            say(f"{name}: unfinished work of another configuration ({changed[0]}) is kept in {kept}")
    elif has_work(partial):
        say(f"{name}: resumes the unfinished work in {partial}")
    if not force and not partial.is_dir() and (kept := kept_partial(folder, wanted)):
        drop_damaged(kept)
        kept.rename(partial)
        say(f"{name}: resumes the unfinished work that was kept in {kept}")
    if not folder.exists():
        return
    if not force and not partial.is_dir() and (manifest := read_manifest(folder)):
        extend(stage, cfg, wanted, folder, manifest)
    if folder.is_symlink():
        say(f"{name}: the result in {folder.resolve()} stays as it is; this run gets one of its own")
    else:
        say(f"{name}: the finished result will be kept in {folder.parent / REPLACED}")


def extend(stage: Stage, cfg: Config, wanted: Fingerprint, folder: Path, old: Mapping[str, Any]) -> bool:
    """Make a finished or stopped run of fewer steps the beginning of this one, if that is all that differs."""
    if stage.grows is None or not old:
        return False
    key, module = stage.grows
    section, _, leaf = key.rpartition(".")
    before, now = _get(old["config"], key), _get(wanted.sections, key)
    same = {**old, "config": {**old["config"], section: {**_get(old["config"], section), leaf: now}}}
    if before >= now or wanted.differences(same):
        return False
    if reason := importlib.import_module(module).why_not(getattr(cfg, section), folder, before):
        say(f"{stage.name}: {key} {before} -> {now} starts again instead of continuing, because {reason}")
        return False
    partial = partial_of(cfg.run_dir / stage.name)
    if folder != partial:
        # Renamed when it is whole: a copy that a kill cut short must not be taken for unfinished work.
        copy = partial.with_name(partial.name + ".copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(MANIFEST, *PUBLISHED_ONLY))
        write_json(copy / FINGERPRINT, as_json(wanted))
        copy.rename(partial)
    else:
        write_json(partial / FINGERPRINT, as_json(wanted))
    say(f"{stage.name}: {key} {before} -> {now} continues from the last state in {folder}")
    return True


def staleness(name: str, cfg: Config) -> list[str] | None:
    """None: never ran. Empty: up to date. Else what changed since, one line each."""
    manifest = read_manifest(cfg.run_dir / name)
    return None if manifest is None else fingerprint(STAGES[name], cfg).differences(manifest)


def say(*words: object) -> None:
    """One line to the user, from the first rank only, never mixed into a progress bar's line."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*words, file=sys.stderr, flush=True)


_digests: dict[Path, str] = {}


def _cached_digest(path: Path) -> str:
    if path not in _digests:
        _digests[path] = path_digest(path)
    return _digests[path]


def _get(tree: Any, field: str) -> Any:
    """The value of a field; None below a section that is not there."""
    for key in field.split("."):
        tree = None if tree is None else tree[key]
    return tree


def _paths(value: str | list | dict | None) -> list[Path]:
    """The paths of a field: one or none, a list, or one a source."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [Path(source["path"]) for source in value.values()]
    return [Path(path) for path in (value if isinstance(value, list) else [value])]


def _looks_local(path: Path) -> bool:
    """A hub id has one slash and no such folder here; anything else can only be a path."""
    return path.is_absolute() or len(path.parts) != 2 or path.parts[0] in ("models", "runs", ".", "..")


def _hint(field: str, cfg: Config) -> str:
    if field == "gold.path" and cfg.gold.kind == "checkpoint":
        return "; it is a reward model of a run of its own: `make rm CONFIG=...` with that run's configuration"
    return (
        "; `grm models` makes the offline models, and so does `make setup`"
        if field.endswith(("policy.path", "base.path", "gold.path"))
        else ""
    )
