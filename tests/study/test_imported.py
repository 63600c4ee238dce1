"""The report of scores and series of other tools: seeds together, methods against their baseline, series alone."""

import json

import numpy as np
import pytest

from core.errors import ConfigError
from core.files import write_jsonl
from pipelines import __main__ as command_line
from study.design import Condition
from study.imported import EVERY_N, baseline_of, grid, series_of
from tests.builders.scores.other_tools import GOLD, PROXY, N, repository, series_rows, table

QUICK = "eval.bootstrap=100"


def study(*words):
    return command_line.main(["study", *map(str, words), "--config", "configs/study.yaml", QUICK])


def row(run, **more):
    return {"run": run, "step": 0, "prompt_id": "p", "proxy": 0.0, "gold": 0.0, "kl": 0.0, **more}


def test_runs_whose_names_differ_in_a_seed_are_seeds_of_one_condition():
    names = ["bt-seed0", "bt-seed1-kl0.1", "bt-seed2_kl0.1", "grm.s3", "other"]
    found = series_of([row(name) for name in names], [Condition("bt"), Condition("grm")])
    assert {name: (one.condition.name, one.seed, one.kl_coef) for name, one in found.items()} == {
        "bt-seed0": ("bt", 0, None), "bt-seed1-kl0.1": ("bt", 1, 0.1), "bt-seed2_kl0.1": ("bt", 2, 0.1),
        "grm.s3": ("grm", 3, None), "other": ("other", None, None),
    }  # fmt: skip


def test_a_column_of_seeds_tells_runs_apart():
    rows = [row("bt", seed=s, kl_coef="0.05") for s in (1, 2)] + [row("bt", seed=1, kl_coef="0.05", step=1)]
    found = series_of(rows, [])
    assert list(found) == ["bt-seed1", "bt-seed2"] and len(found["bt-seed1"].rows) == 2
    assert {(one.condition, one.kl_coef) for one in found.values()} == {(Condition("bt"), 0.05)}


def test_another_training_of_a_method_is_a_condition_of_its_own():
    """`bt-lr3` begins like `bt`, but its seeds are not seeds of `bt`."""
    found = series_of([row("bt-lr3-seed1"), row("bt-seed1")], [Condition("bt")])
    assert found["bt-lr3-seed1"].condition == Condition("bt-lr3")
    assert found["bt-seed1"].condition == Condition("bt")


def test_the_baseline_is_asked_for_or_the_first_variant_or_the_first_column():
    bt, grm = Condition("bt"), Condition("grm")
    assert baseline_of([grm, bt], None, ("other", "bt", "grm")) == bt
    assert baseline_of([grm, bt], None, ()) == grm and baseline_of([], None, ()) is None
    assert baseline_of([grm, bt], "bt", ("grm",)) == bt
    with pytest.raises(ConfigError, match="--baseline dpo: no such condition; there are grm, bt"):
        baseline_of([grm, bt], "dpo", ())


def test_large_pools_have_a_grid_of_n():
    assert grid(16).tolist() == list(range(1, 17))
    large = grid(12500)
    assert len(large) < EVERY_N + 15 and {1, 2, 4, 4096, 8192, 12500} <= set(large.tolist())
    assert (np.diff(large) > 0).all()


def test_options_without_anything_to_read_are_refused(tmp_path, capsys):
    """They were ignored, and a study of hours was planned."""
    assert study("--out", tmp_path) == 2
    assert "--out is for scores of other tools: give --scores or --series" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_of_imported_scores(tmp_path, capsys):
    rows = table()
    for r in rows:
        p, k = int(r["prompt_id"][1:]), r["sample_id"]
        r |= {"grm-seed0": GOLD[p, k] + 0.1 * PROXY["bt-seed0"][p, k], "grm-seed1": PROXY["bt-seed1"][p, k]}
    write_jsonl(tmp_path / "mine.jsonl", rows)
    write_jsonl(tmp_path / "rl.jsonl", series_rows())
    out = tmp_path / "out"
    status = study("--scores", tmp_path / "mine.jsonl", "--series", tmp_path / "rl.jsonl", "--out", out)
    assert status == 0 and "study.html" in capsys.readouterr().out
    facts = json.loads((out / "conditions.json").read_text())
    assert facts["bt"]["seeds"] == 2 and "bt x 2, min" in facts
    assert facts["bt"]["difference"] is None and facts["grm"]["difference"]["lo"] < facts["grm"]["difference"]["hi"]
    page = (out / "study.html").read_text()
    assert "12 prompts, pools of 16" in page and 'id="samples"' in page and "oracle" in page
    assert study("--scores", tmp_path / "mine.jsonl", "--out", out, "--baseline", "grm") == 0
    other = json.loads((out / "conditions.json").read_text())
    assert other["grm"]["difference"] is None
    assert other["bt"]["difference"]["mean"] == pytest.approx(-facts["grm"]["difference"]["mean"])


def turning(seeds=(0, 1, 2), prompts=40):
    """Runs of two methods, each with seeds: gold of one turns at a KL of 4 nats, that of the other rises."""
    rows = []
    for method, bend in (("bt", 0.25), ("grm", 0.05)):
        for seed in seeds:
            rng = np.random.default_rng(seed)
            base = rng.normal(size=prompts)
            for step in range(0, 50, 5):
                d = (0.4 * step) ** 0.5
                rows += [
                    {"run": f"{method}-seed{seed}", "step": step, "prompt_id": f"p{p:02d}", "kl": 0.4 * step,
                     "proxy": base[p] + d + 0.1 * rng.normal(),
                     "gold": base[p] + d * (1 - bend * d) + 0.2 * rng.normal()}
                    for p in range(prompts)
                ]  # fmt: skip
    return rows


@pytest.mark.slow
def test_series_alone_are_analysed(tmp_path, capsys):
    write_jsonl(tmp_path / "rl.jsonl", turning())
    out = tmp_path / "out"
    assert study("--series", tmp_path / "rl.jsonl", "--out", out) == 0
    assert "PPO against bt (3 seeds): gold peaked" in capsys.readouterr().out
    found = json.loads((out / "policies.json").read_text())
    kinds = {name: facts["verdict"]["kind"] for name, facts in found.items()}
    assert all((kind == "over-optimised") == name.startswith("bt") for name, kind in kinds.items()), kinds
    page = (out / "study.html").read_text()
    assert "RL series of" in page and "over the first step" in page and (out / "curves.csv").is_file()


@pytest.mark.slow
def test_gold_of_chosen_answers_has_a_page(tmp_path):
    repository(tmp_path / "bon", {"grm": PROXY["bt-seed0"].copy(), "bt": PROXY["bt-seed1"].copy()})
    assert study("--scores", tmp_path / "bon", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "policies.json").read_text())
    assert set(found) == {"grm", "bt"} and found["bt"]["step"] == N
    assert found["bt"]["kl"] == pytest.approx(np.log(N) - (N - 1) / N)
    page = (tmp_path / "out" / "study.html").read_text()
    assert "gold covers only what a proxy chose" in page
    assert "Best of the first n" in page and "12 prompts" in found["bt"]["verdict"]["why"]
