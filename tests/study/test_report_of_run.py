"""The report of a run is a study of that run: the same numbers, one page, everything escaped."""

import json
import re

import numpy as np
import pytest

from bon.gains import scale
from bon.pools import Pools
from core.config.load import load
from study import checks as check
from study import files
from study.design import Condition
from study.records import Series
from study.report import page, training
from study.report.of_run import analyse, before_and_after, checkpoint_table, description, reward_table
from study.report.words import as_shown
from study.results import plan_of, results

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script>"
P, N = 24, 16
CFG = load([], ["eval.bootstrap=200", f"bon.samples={N}", "ppo.proxy=grm"])


def planted() -> Pools:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(P, N))
    proxies = {name: gold + size * rng.normal(size=(P, N)) for name, size in (("grm", 0.8), ("bt", 1.2))}
    return Pools(
        tuple(f"p{i:02d}" for i in range(P)), gold, proxies, length=rng.integers(5, 50, size=(P, N)).astype(float),
        logp=-rng.uniform(5, 40, size=(P, N)), prompts=tuple(f"question {i}" for i in range(P)),
        responses=tuple(tuple(f"answer {i} {k}" for k in range(N)) for i in range(P)),
    )  # fmt: skip


def trained(prompts: str = "p") -> list[dict]:
    """Rows of `rl_eval.parquet`: the proxy rises by 2 and gold by 1 over 8 steps."""
    rng = np.random.default_rng(1)
    return [
        {"step": step, "prompt_id": f"{prompts}{i:02d}", "sample_id": 0, "proxy": float(step / 4 + noise[0]),
         "gold": float(step / 8 + noise[1]), "kl_rb": step / 2, "kl_k1": step / 2, "n_tokens": 20, "finished": True,
         "prompt": [{"role": "user", "content": EVIL}], "response": EVIL, "logp": -20.0, "logp_sampler": -20.1}
        for step in (0, 4, 8) for i in range(P) if (noise := 0.3 * rng.normal(size=2)) is not None
    ]  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return analyse(CFG, planted(), {"policy": Series(trained(), "grm", Condition("grm"), 0.05)})


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    files.write(out, found)
    interval = {"mean": 0.71, "lo": 0.62, "hi": 0.79, "n": 180}
    models = {"grm": {"accuracy_gold": interval, "accuracy_label": interval, "length_correlation": 0.2, "seconds": 61}}
    steps = [{"step": s, "proxy_mean": 0.1, "proxy_se": 0.1, "kl_nats_per_response": 0.5 * s} for s in (1, 2)]
    series = Series(trained(), "grm")
    extras = page.RunExtras(
        checkpoints=checkpoint_table(found, series), reward_models=reward_table(models, "gold"),
        stages=[["stage", "seconds", "made"], ["rm", "9", EVIL]],
        samples=before_and_after(series, planted(), "grm", seed=0), packages="torch: 2",
        figures={
            "accuracy": training.accuracy(models, "gold", 0.55),
            "reward_training": training.reward_training({"grm": [{"step": 1, "reward_loss": 0.7, "accuracy": 0.5}]}),
            "ppo_training": training.ppo_training(steps),
        },
    )  # fmt: skip
    checks = [check.aligned(found), *check.enough(found, {"policy": series}, 1)]
    page.write(out, "unit", "A policy.", found, checks, file="report", run=extras, config="a: 1")
    return out


def test_a_run_and_a_study_of_it_say_the_same(found, tmp_path):
    """`grm study` of the same pools and series, with its own conditions, gives the tables of the report."""
    conditions = {Condition("bt"): ["bt"], Condition("grm"): ["grm"]}
    series = {"policy": Series(trained(), "grm", Condition("grm"), 0.05)}
    study = results(planted(), conditions, series, plan_of(CFG, N), {c: Condition("bt") for c in conditions})
    for name, one in (("run", found), ("study", study)):
        files.write(tmp_path / name, one)
    for file in ("conditions.json", "policies.json", "curves.csv", "kl.csv"):
        assert (tmp_path / "run" / file).read_text() == (tmp_path / "study" / file).read_text(), file


def test_reward_models_are_compared_with_bradley_terry(found):
    assert found.findings["grm"]["difference"] is not None and found.findings["bt"]["difference"] is None


def test_policies_have_the_unit_of_best_of_n_and_an_origin_on_their_own_prompts(found):
    gold = next(c for c in found.curves if c.method == "ppo" and c.metric == "gold")
    assert gold.mean[2] - gold.mean[0] == pytest.approx(1 / scale(planted().gold), abs=0.2)
    other = analyse(CFG, planted(), {"policy": Series(trained("other"), "grm", Condition("grm"), 0.05)})
    curve = next(c for c in other.curves if c.method == "ppo" and c.metric == "gold")
    assert curve.mean[0] == 0 and curve.mean[2] == pytest.approx(gold.mean[2] - gold.mean[0])


@pytest.mark.parametrize(
    ("all_pairs", "of_a_variant", "share"), [(0.0, 0.25, "25%"), (0.1, 0.0, "10%"), (0.1, 0.25, "30%")]
)
def test_the_share_of_wrong_labels_counts_those_of_the_variants(all_pairs, of_a_variant, share):
    variant = {"label_noise": of_a_variant}
    cfg = load(
        [], [f"preferences.label_noise={all_pairs}", f"rm.variants={json.dumps({'grm': variant, 'bt': variant})}"]
    )
    text = description(cfg, {"preferences": {"pairs": {"rm_train": 100}}})
    assert f"trained on 100 pairs with {share} of the labels wrong." in text


def test_text_that_would_cover_the_page_is_cut():
    """100 KB of combining characters, and a response without an end; other people's letters stay as they are."""
    covered = as_shown("a" + "\u0301" * 50_000 + "b")
    assert len(covered) < 100 and covered.endswith("[49,997 characters are not shown]")
    assert as_shown("x" * 5000) == "x" * 4000 + " [1,000 characters are not shown]"
    for text in ("", "a\u0323\u0302", "ไม่มี", "नमस्ते", EVIL):
        assert as_shown(text) == text


def test_the_page_has_every_section_and_escapes(folder):
    html = (folder / "report.html").read_text()
    assert EVIL not in html and "&lt;script&gt;alert(1)" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html.replace("xmlns:xlink", ""))
    for heading in ("Policies", "Checkpoints", "Reward models on held-out pairs", "PPO", "Before and after", "Stages",
                    "Fits", "Checks"):  # fmt: skip
        assert re.search(f"<h2[^>]*>{heading}", html)
    for text in ("0.710 [0.620, 0.790]", "0 (reference)", "Checks that failed: 3 of 4", "step 8", "torch: 2"):
        assert text in html, text
    drawn = {p.stem for p in (folder / "figures").glob("*.svg")}
    assert {"overoptimisation", "accuracy", "reward_training", "ppo_training"} <= drawn
    assert html.count("<svg") == len(drawn) + 1


def test_markdown_has_the_same_tables(folder):
    text = (folder / "report.md").read_text()
    assert "## Checkpoints" in text and "| 0 (reference) |" in text and "check failed: at least 500 prompts" in text
    facts = json.loads((folder / "conditions.json").read_text())
    assert f"{facts['grm']['gold']['mean']:+.2f}" in text


def test_figures_are_the_same_twice(found, tmp_path):
    from core import plotting
    from study.report.overoptimisation import overoptimisation

    first, second = (plotting.save(overoptimisation(found), tmp_path, "f") for _ in range(2))
    assert first == second and (tmp_path / "f.png").stat().st_size > 10_000


def test_what_else_ppo_did_is_said():
    """Own rewards, that gold was watched, and the average of the weights."""
    metrics = {"preferences": {"pairs": {"rm_train": 7}}}
    assert "policy-ema" not in description(CFG, metrics) and "watched" not in description(CFG, metrics)
    changes = ["ppo.reward.function=a:f", "ppo.reward.function_weight=0.5", "ppo.eval_every=2", "ppo.watch_gold=true"]
    metrics["eval"] = {"average": {"proxy_change": 0.5, "gold_change": -0.25, "kl": 3.0}}
    said = description(load([], changes), metrics)
    assert "1 x the reward model (in its standard deviations) + 0.5 x a:f; the proxy shown here is the reward" in said
    assert "Gold was watched while PPO ran, and not used for training." in said
    assert "(policy-ema) gained +0.50 SD of proxy and -0.25 SD of gold over the reference at a KL of 3.00 nats." in said
