"""Scores and series of other tools that are odd or damaged: refused by name."""

import pytest

from core.errors import ArtefactError
from study.other_tools import read_scores, read_series
from tests.builders.inputs.fuzz import cases, damaged, lines, mutated, value, written

TABLE = [
    {"prompt_id": f"p{p}", "sample_id": k, "gold": float(p - k), "proxy": float(k), "prompt": f"q{p}", "response": "a",
     "n_tokens": 3 + k, "logp": -1.0}
    for p in range(3) for k in range(2)
]  # fmt: skip
GENS = [
    {"instruction": f"q{p}", "input": "", "answers": ["a", "b"], "gold_scores": [1.0, 2.0], "proxy_scores": [0.5, 0.7]}
    for p in range(3)
]
REWARDBENCH = [
    {"id": k, "subset": "alpacaeval-easy", "results": 1, "scores_chosen": 1.0, "scores_rejected": 0.5,
     "text_chosen": "a", "text_rejected": "b"} for k in range(3)
]  # fmt: skip
GRM = [{"id": p, "response": f"{p} {k}", "reward": float(k)} for p in range(3) for k in range(2)]
SERIES = [
    {"run": "r", "step": s, "prompt_id": f"p{p}", "proxy": 1.0 * s, "gold": 0.5, "kl": 0.1 * s}
    for s in range(2) for p in range(3)
]  # fmt: skip


def outcome(read, path) -> str:
    try:
        read(path)
    except ArtefactError as error:
        assert path.name in str(error)
        return "refused"
    return "read"


@pytest.mark.parametrize(
    ("rows", "read"),
    [(TABLE, read_scores), (GENS, read_scores), (REWARDBENCH, read_scores), (SERIES, read_series)],
    ids=["table", "gold_labelled_gens", "rewardbench", "series"],
)
def test_odd_rows_are_refused_by_name(tmp_path, rows, read):
    file, outcomes = tmp_path / "scores.jsonl", set()
    for rng in cases(f"{rows[0]}", 120):
        changed = rows
        for _ in range(rng.randrange(1, 3)):
            changed = mutated(rng, changed)
        file.write_bytes(lines(changed))
        outcomes.add(outcome(read, file))
    assert "refused" in outcomes


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_damaged_files_of_every_format(tmp_path, suffix):
    whole = written(tmp_path / f"whole{suffix}", TABLE)
    series = written(tmp_path / f"whole2{suffix}", SERIES)
    for rng in cases(suffix, 30):
        (tmp_path / f"scores{suffix}").write_bytes(damaged(rng, whole))
        outcome(read_scores, tmp_path / f"scores{suffix}")
        (tmp_path / f"series{suffix}").write_bytes(damaged(rng, series))
        outcome(read_series, tmp_path / f"series{suffix}")


def test_damaged_folders_of_the_grm_repository(tmp_path):
    whole = written(tmp_path / "whole.csv", GRM)
    for rng in cases("grm", 60):
        for name in ("gold", "proxy"):
            (tmp_path / f"{name}_score.csv").write_bytes(damaged(rng, whole) if rng.randrange(2) else whole)
        outcome(read_scores, tmp_path)


def test_rows_of_any_kind(tmp_path):
    for rng in cases("scores", 60):
        (tmp_path / "scores.jsonl").write_bytes(lines([value(rng) for _ in range(3)]))
        for read in (read_scores, read_series):
            outcome(read, tmp_path / "scores.jsonl")


def test_folders_with_odd_tables(tmp_path):
    ids = [{"prompt_id": row["prompt_id"], "sample_id": row["sample_id"]} for row in TABLE]
    outcomes = set()
    for rng in cases("folder", 40):
        tables = {
            "samples": [{**i, "response": "a", "prompt": [{"role": "user", "content": "q"}]} for i in ids],
            "scores/gold": [{**i, "score": float(k)} for k, i in enumerate(ids)],
            "scores/proxy": [{**i, "score": float(-k)} for k, i in enumerate(ids)],
        }
        name, column = (
            rng.choice(list(tables)),
            rng.choice(("prompt_id", "sample_id", "score", "response", "prompt", "x")),
        )
        odd = rng.choice((None, 1, "a", [1], [], {"a": 1}, float("nan")))
        tables[name] = [{**row, column: odd} for row in tables[name]]
        for table, rows in tables.items():
            (tmp_path / table).parent.mkdir(exist_ok=True)
            written(tmp_path / f"{table}.parquet", rows)
        outcomes.add(outcome(read_scores, tmp_path))
    assert outcomes == {"read", "refused"}
