"""What an audit keeps on disk: its pool of samples, and a table of scores for each reward model and each gold.

FOLDER/pool.json           what the samples were drawn from
FOLDER/samples.parquet     the samples; FOLDER/samples/ while they are drawn
FOLDER/scores/KEY.parquet  scores by a reward model or gold; KEY is the digest of its files and of how they are used
FOLDER/models.json         key -> name, path and kind, in the order of the page
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from bon.scores import IDS, put_together, score_models, write_scores
from core.artefacts import manifest_digest, read_manifest
from core.column_files import Kind, first_row, read_columns
from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.rows import PromptRow, ResponseRow, SampleRow
from core.errors import ArtefactError, ConfigError
from core.files import digest, file_digest, path_digest, read_json, read_table, write_json, write_table
from core.generation.pool import SampledPool, sample_pool
from core.parts import drop_damaged
from core.shares import remove_shards
from pipelines.prompts import in_order, read_prompts
from rm.checkpoints.folder import files as weights
from rm.checkpoints.folder import locate
from rm.evaluation.command import model_names
from rm.gold import load_gold, score_samples
from rm.model import RewardModel
from study.layouts.tables import proxy_columns


def audit_prompts(cfg: Config, given: Path | None) -> list[PromptRow]:
    """All prompts of a file of one's own, or the split eval of `data.prompts`, on which nothing of a run is trained; in
    hash order, the first `bon.prompts` of them."""
    tokenizer = ChatTokenizer(cfg.policy)
    data = cfg.data if given is None else cfg.data.model_copy(update={"prompts": given, "eval_prompts": None})
    own, other = read_prompts(data, tokenizer, seed=cfg.run.seed)
    found, file = (own, data.prompts) if other is None else (other, data.eval_prompts)
    rows = [row for row in in_order(own, other) if given is not None or row["split"] == "eval"]
    if found.malformed > data.max_rejected_share * (len(found.usable) + len(found.rejected)) or len(rows) < 2:
        first = found.rejected[0] if found.rejected else "none"
        raise ArtefactError(
            f"{file}: {len(rows)} usable prompts, {found.malformed} malformed rows; first fault: {first}"
        )
    return rows[: cfg.bon.prompts]


def sampled(cfg: Config, prompts: Sequence[PromptRow], out: Path) -> list[SampleRow]:
    """The pool of the policy; a killed command draws what is missing."""
    policy = Path(cfg.policy.path)
    settle(out, {
        "policy": path_digest(policy) if policy.is_dir() else cfg.policy.path, "revision": cfg.policy.revision,
        "generation": cfg.generation.model_dump(mode="json", exclude={"processes"}),
        "temperature": cfg.bon.temperature, "top_p": cfg.bon.top_p, "samples": cfg.bon.samples,
        "shard_prompts": cfg.bon.shard_prompts, "seed": cfg.run.seed,
        "prompts": digest([row["prompt_id"] for row in prompts]),
    })  # fmt: skip
    drop_damaged(out)
    tokenizer = ChatTokenizer(cfg.policy)
    pool = sample_pool(
        lambda: _generator(cfg, tokenizer), tokenizer, prompts, cfg.bon.samples,
        out=out, shard_prompts=cfg.bon.shard_prompts, seed=cfg.run.seed, name="audit",
        temperature=cfg.bon.temperature, top_p=cfg.bon.top_p,
    )  # fmt: skip
    remove_shards([pool.table])
    return pool.mine


def _generator(cfg: Config, tokenizer: ChatTokenizer):
    from core.generation.local import Generator  # here, since scoring alone needs no vLLM

    return Generator(cfg.policy, cfg.generation, tokenizer)


def taken(pools: Path, out: Path) -> list[SampleRow]:
    """The pool of a finished stage `bon`."""
    file = pools / "samples.parquet"
    if not file.is_file():
        raise ConfigError(
            f"--pools {pools}: no samples.parquet; give the folder of stage bon, such as runs/offline/bon"
        )
    settle(out, {"pools": file_digest(file)[:16]})
    if not (out / "samples.parquet").exists():
        write_table(out / "samples.parquet", read_table(file, SampleRow), SampleRow)
    return read_table(out / "samples.parquet", SampleRow)


def settle(out: Path, source: Mapping[str, Any]) -> None:
    """Note where the samples come from; ConfigError where the folder has those of another source."""
    mark = out / "pool.json"
    if not mark.is_file():
        write_json(mark, dict(source))
        return
    old = read_json(mark)
    if changed := sorted(key for key in {**old, **source} if old.get(key) != source.get(key)):
        raise ConfigError(
            f"{out} holds the samples of another audit ({', '.join(changed)} differ): give another --out, or the "
            "options that it was made with"
        )


def model_key(path: str, dtype: str, reads: str | None) -> str:
    """Digest of a reward model: its files, and how they are used; ArtefactError where there are no weights."""
    folder = locate(path)
    weights(folder)
    return digest([path_digest(folder), dtype, reads])


def listed(out: Path) -> dict[str, dict[str, Any]]:
    """Key -> name, path and kind of what was scored before."""
    file = out / "models.json"
    return read_json(file) if file.is_file() else {}


def register(out: Path, models: Mapping[str, str], columns: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The list with these reward models (key -> path) and columns of scores (key -> name) added to it.

    A path whose files have changed since takes the place that it had. Names are the ends of paths, long enough to tell
    them apart.
    """
    entries = listed(out)
    for key, path in models.items():
        if key not in entries and (old := next((k for k, e in entries.items() if e["path"] == path), None)):
            entries = {key if k == old else k: e for k, e in entries.items()}
        entries.setdefault(key, {"path": path, "kind": "model"})
    for key, name in columns.items():
        if key not in entries and (old := next((k for k, e in entries.items() if e.get("column") == name), None)):
            entries = {key if k == old else k: e for k, e in entries.items()}
        entries[key] = {"path": name, "kind": "scores", "column": name}
    own = {key: entry for key, entry in entries.items() if entry["kind"] == "model"}
    for key, name in zip(own, model_names([entry["path"] for entry in own.values()]) if own else [], strict=True):
        entries[key]["name"] = name
    for entry in entries.values():
        entry.setdefault("name", entry["path"])
    names = [entry["name"] for entry in entries.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two reward models are named {twice[0]}: rename the column of --scores")
    write_json(out / "models.json", entries)
    return entries


def score(
    out: Path, entries: Mapping[str, Mapping[str, Any]], samples: list[SampleRow], dtype: str, reads: str | None
) -> None:
    """Score the pool by the reward models that have not scored it yet."""
    models = {
        entry["name"]: (cast(str, entry["path"]), score_file(out, key))
        for key, entry in entries.items() if entry["kind"] == "model"
    }  # fmt: skip
    load = lambda path: RewardModel.from_pretrained(path, dtype=dtype, reads=reads, lm_head=False)  # type: ignore[arg-type]  # noqa: E731
    pool = SampledPool(out / "samples.parquet", 1, {0: samples})
    score_models(models, pool, title="audit", load=load)
    put_together([file for _, file in models.values()], pool, title="audit")


def gold_scores(cfg: Config, samples: list[SampleRow], out: Path) -> Path:
    """The table of gold, which is made where there is none."""
    where = Path(cfg.gold.path)
    weights = path_digest(where) if where.is_dir() else cfg.gold.path
    file = score_file(out, "gold-" + digest([cfg.gold.kind, weights]))
    if not file.exists():
        write_scores(file, samples, score_samples(load_gold(cfg.gold), cast(list[ResponseRow], samples)).tolist())
    return file


def score_file(out: Path, key: str) -> Path:
    return out / "scores" / f"{key}.parquet"


def reuse(pools: Path, out: Path, cfg: Config, entries: Mapping[str, Mapping[str, Any]], *, plain: bool) -> None:
    """Take the scores that stage `bon` has of the same pool: gold of the same settings, and the reward models of its
    run.

    Args:
        plain: whether models are read as stage `bon` reads them.
    """
    manifest = read_manifest(pools)
    if manifest is None:
        return
    where = Path(cfg.gold.path)
    if manifest["config"].get("gold") == cfg.gold.model_dump(mode="json") and where.is_dir():
        _copy(pools / "scores" / "gold.parquet", score_file(out, "gold-" + digest([cfg.gold.kind, path_digest(where)])))
    trained = pools.resolve().parent / "rm"
    stage = read_manifest(trained)
    if not plain or stage is None or manifest["inputs"].get("rm") != manifest_digest(stage):
        return
    for key, entry in entries.items():
        if entry["kind"] == "model" and Path(entry["path"]).resolve().parent == trained.resolve():
            _copy(pools / "scores" / f"{Path(entry['path']).name}.parquet", score_file(out, key))


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def given_scores(file: Path, samples: Sequence[SampleRow], out: Path) -> dict[str, str]:
    """Columns of scores of the pool's samples, as tables of the audit: key -> name.

    Raises:
        ArtefactError: no column of numbers, or rows that are not those of the samples.
    """
    first = first_row(file)
    names = proxy_columns(first)
    if not names:
        raise ArtefactError(
            f"{file}: no scores; every column of numbers beside prompt_id and sample_id is a reward model"
        )
    wanted: dict[str, tuple[str, Kind]] = {**IDS, **{f"score {name}": (name, "number") for name in names}}
    if "response" in first:
        wanted["text"] = ("response", "digest")
    found = read_columns(file, wanted)
    ids = [found["prompt_id"].distinct[code] for code in found["prompt_id"].codes.tolist()]
    place = {key: row for row, key in enumerate(zip(ids, found["sample_id"].tolist(), strict=True))}
    keys = [(s["prompt_id"], s["sample_id"]) for s in samples]
    if missing := [key for key in keys if key not in place]:
        raise ArtefactError(
            f"{file}: no row for {len(missing)} of {len(keys)} samples, the first is {missing[0]}: score "
            f"{out / 'samples.parquet'} and keep its prompt_id and sample_id"
        )
    rows = np.array([place[key] for key in keys])
    if "text" in found:
        texts = np.array([int(digest(s["response"]), 16) for s in samples], dtype=np.uint64)
        if differ := int((found["text"][rows] != texts).sum()):
            raise ArtefactError(f"{file}: {differ} rows have other responses than the samples of the same ids")
    columns = {}
    for name in names:
        scores = found[f"score {name}"][rows].tolist()
        key = digest([name, scores])
        if not score_file(out, key).exists():
            write_scores(score_file(out, key), list(samples), scores)
        columns[key] = name
    return columns
