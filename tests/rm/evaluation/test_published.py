"""Published models beside their published scores: a right score passes, a wrong one is named, the hub is too."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from core.errors import ArtefactError, DataError
from rm.evaluation import command
from rm.evaluation.benchmark_scores import REWARDBENCH_SECTIONS
from rm.evaluation.published import compare, read_published
from tests.builders.processes import ROOT
from tests.builders.shipped.families import classifier_rewards, grm_rewards, tiny_classifier, tiny_grm

FAMILIES = ("gemma", "gemma2", "llama3", "llama3.2")
WORDS = ("yes", "no", "pear", "car", "tree", "cloud", "seven", "often", "never", "slowly", "north", "round")


def rows() -> list[dict]:
    """Three rows of each subset of RewardBench, no two alike."""
    subsets = [subset for section in REWARDBENCH_SECTIONS.values() for subset in section]
    word = lambda k: WORDS[k % len(WORDS)]  # noqa: E731
    return [
        {"id": 3 * i + j, "subset": subset, "prompt": f"Say {word(i + j)} {i}.",
         "chosen": f"{word(5 * i + j)} {word(j)}", "rejected": f"{word(7 * i + 3 * j + 1)}, {word(i)} {j}"}
        for i, subset in enumerate(subsets) for j in range(3)
    ]  # fmt: skip


def chat(row: dict, side: str) -> list[dict]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]


def expected(reward) -> dict[str, float]:
    """The scores in percent, with one decimal, of a function from conversations to rewards."""
    hits = defaultdict(list)
    for row in rows():
        hits[row["subset"]].append(reward(chat(row, "chosen")) > reward(chat(row, "rejected")))
    sections = {
        name: sum(w * sum(hits[s]) / 3 for s, w in weights.items()) / sum(weights.values())
        for name, weights in REWARDBENCH_SECTIONS.items()
    }
    return {k: round(100 * v, 1) for k, v in {"score": sum(sections.values()) / 4, **sections}.items()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sets") / "rewardbench.jsonl"
    file.write_text("\n".join(map(json.dumps, rows())))
    return file


def write(file: Path, models: dict, **tolerance: float) -> Path:
    file.write_text(
        yaml.safe_dump({"tolerance": tolerance or {"score": 0.06, "parts": 0.06}, "models": models}, sort_keys=False)
    )
    return file


def evaluate(file: Path, bench: Path, *words: str) -> int:
    return command.main([*words, "--published", str(file), "--set", f"rewardbench={bench}", "--bootstrap", "100"])


@pytest.mark.slow
def test_right_scores_fit_and_a_wrong_one_is_named(bench, tokenizer_path, tmp_path, capsys):
    """Both layouts of all four families; the expected scores are computed by their makers' formulas, one by one."""
    models = {}
    for family in FAMILIES:
        classifier = tiny_classifier(family, tokenizer_path, tmp_path / f"{family}-ft")
        grm = tiny_grm(family, tokenizer_path, tmp_path / f"{family}-sftreg")
        models[str(classifier)] = expected(classifier_rewards(classifier))
        models[str(grm)] = expected(grm_rewards(grm))
    assert len({tuple(scores.values()) for scores in models.values()}) == len(models)
    assert evaluate(write(tmp_path / "a.yaml", models), bench) == 0
    assert "all 8 models have their published scores" in capsys.readouterr().out

    name = str(tmp_path / "llama3-sftreg")
    wrong = models | {name: models[name] | {"Chat Hard": models[name]["Chat Hard"] + 0.1}}
    assert evaluate(write(tmp_path / "b.yaml", wrong), bench) == 1
    said = capsys.readouterr().out
    assert f"1 of 8 models do not have their published scores: {name} (Chat Hard)" in said
    assert evaluate(tmp_path / "b.yaml", bench, str(tmp_path / "gemma-ft"), "--out", str(tmp_path / "out")) == 0
    lines = json.loads((tmp_path / "out" / "metrics.json").read_text())["published"]
    assert [line["part"] for line in lines] == ["score", *REWARDBENCH_SECTIONS] and all(line["fits"] for line in lines)


def test_the_shipped_file_has_the_nine_models():
    published = read_published(ROOT / "configs" / "published.yaml")
    scores = [given["score"] for given in published.scores.values()]
    assert len(scores) == 9 and (max(scores), min(scores)) == (91.5, 73.7) and scores == sorted(scores, reverse=True)
    for model, given in published.scores.items():
        sections = [given[name] for name in REWARDBENCH_SECTIONS]
        assert sum(sections) / 4 == pytest.approx(given["score"], abs=0.1), model
    assert (published.tolerance, published.parts_tolerance) == (1.0, 2.0)


def test_a_number_fits_up_to_the_tolerance_and_a_set_must_be_whole(tmp_path):
    published = read_published(write(tmp_path / "p.yaml", {"m": {"score": 90.0, "Chat": 80.0}}, score=1.0, parts=2.0))
    fits = lambda score, **own: [  # noqa: E731
        line.fits for line in compare(published, "m", {"score": score, "parts": {"Chat": 0.78}, "missing": []} | own)
    ]
    assert fits(0.91) == [True, True] and fits(0.911) == [False, True] and fits(0.889) == [False, True]
    assert fits(0.90, missing=["math-prm"]) == [False, False]
    assert [line.fits for line in compare(published, "m", None)] == [False, False]


@pytest.mark.parametrize(
    "text, said",
    [
        ("models: {m: {score: 90}}", "tolerance must be a mapping"),
        ("tolerance: {score: 1}\nmodels: {m: {score: 90}}", "tolerance must be {score: POINTS, parts: POINTS}"),
        ("tolerance: {score: 1, parts: 1}\nmodels: {m: {Chat: 90}}", "models.m has no `score`"),
        ("tolerance: {score: 1, parts: 1}\nmodels: {m: {score: 900}}", "models.m.score is 900, not a percentage"),
        ("tolerance: {score: 1, parts: 1}\nmodels: {}", "models must be a mapping"),
        ("rm: {}", "rm: no such section"),
    ],
)
def test_a_file_that_says_too_little_is_refused(tmp_path, text, said):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        read_published(tmp_path / "p.yaml")


def test_every_model_that_the_hub_does_not_give_is_named_before_any_is_scored(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file = ROOT / "configs" / "published.yaml"
    with pytest.raises(ArtefactError, match="9 of 9 models are not to be had") as error:
        evaluate(file, bench)
    for model in read_published(file).scores:
        assert f"{model} is no folder here, and the hub cannot be reached" in str(error.value)


def test_what_does_not_go_together_is_said(bench, tmp_path):
    file = write(tmp_path / "p.yaml", {"m": {"score": 90.0}})
    with pytest.raises(DataError, match="x is none of the models of .*p.yaml: m"):
        evaluate(file, bench, "x")
    with pytest.raises(DataError, match="give --set once"):
        evaluate(file, bench, "--set", f"other={bench}")
    with pytest.raises(DataError, match="no model: give its folder or hub id, or --published"):
        command.main(["--set", f"rewardbench={bench}"])
