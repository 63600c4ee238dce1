"""An audit says how soon a reward model is over-optimised: on planted scores, and with real models and a policy."""

import json
import shutil

import numpy as np
import pytest

from bon.estimators import best_of_n, kl_bound
from bon.gains import gains
from bon.scores import write_scores
from core.config.load import load
from core.environment import STARTED
from core.errors import ArtefactError, ConfigError
from core.files import digest, read_json, read_table, write_jsonl, write_table
from core.training.weights import named_weights
from pipelines import __main__ as command_line
from rm.checkpoints.layout import save_reward_model
from study import audit, audit_pools
from tests.builders.processes import GRM, ROOT, background, run_program, wait_for
from tests.builders.reward_models import nudged, tiny_reward_model

P, N = 150, 64


def planted(folder):
    """Scores by a reward model that goes wrong in its tail, one that does not, and one that is noise."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(P, N))
    gold = z - 1.5 * np.maximum(z - 0.8, 0) ** 2
    proxies = {"good": gold + 0.3 * rng.normal(size=(P, N)), "bad": z + 0.1 * rng.normal(size=(P, N)),
               "noise": rng.normal(size=(P, N))}  # fmt: skip
    rows = [
        {"prompt_id": f"p{p:02d}", "sample_id": k, "gold": gold[p, k], "response": f"{p} {k}", "prompt": f"q{p}",
         **{name: table[p, k] for name, table in proxies.items()}}
        for p in range(P) for k in range(N)
    ]  # fmt: skip
    write_table(folder / "scores.parquet", rows)
    return rows, gold, proxies


@pytest.mark.slow
def test_scores_with_their_own_gold_are_audited_without_a_model(tmp_path, capsys):
    _, gold, proxies = planted(tmp_path)
    out = tmp_path / "out"
    status = command_line.main(["audit", "--scores", str(tmp_path / "scores.parquet"), "--out", str(out),
                                "--baseline", "bad", "eval.bootstrap=200"])  # fmt: skip
    said, found = capsys.readouterr().out, read_json(out / "audit.json")
    assert status == 0 and list(found["models"]) == ["bad", "good", "noise"] and found["baseline"] == "bad"
    kinds = {name: facts["verdict"]["kind"] for name, facts in found["models"].items()}
    assert kinds == {"bad": "over-optimised", "good": "no turn-over within range", "noise": "does not help"}
    assert "bad: over-optimised: gold falls by" in said and "good less bad, gold at best of 64: +" in said
    at_end = {name: best_of_n(p, gains(gold), [N])[:, 0] for name, p in proxies.items()}
    difference = found["models"]["good"]["difference"]
    assert difference["mean"] == pytest.approx((at_end["good"] - at_end["bad"]).mean()) and difference["lo"] > 0
    curve = best_of_n(proxies["bad"], gains(gold), np.arange(1, N + 1)).mean(axis=0)
    peak = found["models"]["bad"]["peak_kl"]
    assert peak["lo"] <= kl_bound(int(curve.argmax()) + 1) <= peak["hi"] < found["kl"]
    assert found["models"]["bad"]["agreement"]["accuracy"]["mean"] > 0.5
    page = (out / "audit.html").read_text()
    assert "Audit of bad, good, noise" in page and "150 prompts, pools of 64" in page


def samples(folder):
    """A pool as an audit leaves it."""
    rows = [
        {"prompt_id": f"p{p}", "sample_id": k, "split": "eval", "prompt": [{"role": "user", "content": f"q{p}"}],
         "response": f"{p} {k}", "token_ids": [1], "n_tokens": 1, "finished": True, "logp_sampler": -1.0,
         "tokenizer": "t"}
        for p in range(4) for k in range(3)
    ]  # fmt: skip
    write_table(folder / "samples.parquet", rows)
    return rows


def test_columns_of_scores_join_the_pool_by_id(tmp_path):
    rows = samples(tmp_path)
    scores = [{"prompt_id": r["prompt_id"], "sample_id": r["sample_id"], "response": r["response"], "mine": k / 2,
               "theirs": -k} for k, r in enumerate(rows)]  # fmt: skip
    np.random.default_rng(0).shuffle(scores)
    write_jsonl(tmp_path / "s.jsonl", scores)
    columns = audit_pools.given_scores(tmp_path / "s.jsonl", rows, tmp_path)
    entries = audit_pools.register(tmp_path, {}, columns)
    assert [entry["name"] for entry in entries.values()] == ["mine", "theirs"]
    for key, name in columns.items():
        table = read_table(audit_pools.score_file(tmp_path, key))
        expected = np.arange(12) / 2 if name == "mine" else -np.arange(12)
        assert [row["score"] for row in table] == expected.tolist()
        assert [row["text_sha"] for row in table] == [digest(r["response"]) for r in rows]
    write_jsonl(tmp_path / "s.jsonl", scores[1:])
    with pytest.raises(ArtefactError, match="no row for 1 of 12 samples"):
        audit_pools.given_scores(tmp_path / "s.jsonl", rows, tmp_path)
    write_jsonl(tmp_path / "s.jsonl", [row | {"response": "other"} for row in scores])
    with pytest.raises(ArtefactError, match="12 rows have other responses"):
        audit_pools.given_scores(tmp_path / "s.jsonl", rows, tmp_path)


def test_models_keep_their_places_and_names_tell_them_apart(tmp_path):
    audit_pools.register(tmp_path, {"k1": "runs/a/rm/grm", "k2": "runs/a/rm/bt"}, {})
    entries = audit_pools.register(tmp_path, {"k3": "runs/b/rm/grm"}, {"k4": "mine"})
    assert [e["name"] for e in entries.values()] == ["a_rm_grm", "a_rm_bt", "b_rm_grm", "mine"]
    entries = audit_pools.register(tmp_path, {"k5": "runs/a/rm/grm"}, {"k6": "mine"})  # trained again, scored again
    assert list(entries) == ["k5", "k2", "k3", "k6"] == list(audit_pools.listed(tmp_path))
    with pytest.raises(ConfigError, match="two reward models are named a_rm_bt"):
        audit_pools.register(tmp_path, {}, {"k7": "a_rm_bt"})


def test_a_folder_holds_one_pool(tmp_path):
    audit_pools.settle(tmp_path, {"policy": "a", "samples": 4})
    audit_pools.settle(tmp_path, {"policy": "a", "samples": 4})
    with pytest.raises(ConfigError, match=r"holds the samples of another audit \(samples differ\)"):
        audit_pools.settle(tmp_path, {"policy": "a", "samples": 8})


def test_options_are_laid_over_the_configuration(tmp_path):
    cfg = load(["configs/offline.yaml"], [])
    options = lambda *words: audit._parser().parse_args(["m", *words])  # noqa: E731
    changed = audit.configured(cfg, options("--policy", "owner/chat", "--samples", "64", "--gold", str(tmp_path)))
    assert (changed.policy.path, changed.bon.samples) == ("owner/chat", 64)
    assert (changed.gold.kind, changed.gold.path) == ("checkpoint", str(tmp_path))
    assert audit.configured(cfg, options("--gold", "owner/gold")).gold.kind == "hub"
    assert audit.configured(changed, options("--gold", "judge")).gold.path == cfg.gold.path
    assert audit.configured(cfg, options()) == cfg


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(STARTED, "1")  # as in the process that `grm` starts
    assert command_line.main(["audit"]) == 2 and "give a reward model" in capsys.readouterr().err
    assert command_line.main(["audit", str(tmp_path), "--baseline", "x"]) == 2
    assert "holds no reward model" in capsys.readouterr().err
    write_jsonl(tmp_path / "s.jsonl", [{"prompt_id": "p", "sample_id": 0, "mine": 0.5}])
    assert command_line.main(["audit", "--scores", str(tmp_path / "s.jsonl"), "--out", str(tmp_path)]) == 2
    assert "has no gold, and" in capsys.readouterr().err
    planted(tmp_path)
    arguments = ["audit", "--scores", str(tmp_path / "scores.parquet"), "--out", str(tmp_path), "--baseline", "x"]
    assert command_line.main(arguments) == 2
    assert "--baseline x: no such reward model; there are good, bad, noise" in capsys.readouterr().err


@pytest.fixture(scope="module")
def models(tokenizer_path, tmp_path_factory):
    """Three tiny reward models, of which the first two share a base."""
    folder, first = tmp_path_factory.mktemp("models"), tiny_reward_model(tokenizer_path, "mlp")
    for seed, name in enumerate("abc"):
        model = nudged(first, seed)
        save_reward_model(folder / name, model, named_weights(model.lm), model.head.state_dict())
    return folder


def command(models, policy, out, *names):
    return [*GRM, "audit", *(models / name for name in names), "--out", out, *sampling(policy)]


def sampling(policy):
    words = ["generation.max_new_tokens=8", "bon.prompts=24", "bon.shard_prompts=6", "eval.bootstrap=100"]
    return ["--config", ROOT / "configs" / "smoke.yaml", "--policy", policy, "--samples", "4", *words]


@pytest.mark.slow
def test_an_audit_with_a_real_policy_resumes_and_takes_another_model(models, small_policy, tmp_path):
    """Killed between two shards, it draws what an uninterrupted one draws; a third model is scored alone."""
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    said = run_program(*command(models, small_policy, whole, "a", "b")[1:])
    assert "b less a, gold at best of 4:" in said and (whole / "audit.html").is_file()
    with background(*command(models, small_policy, out, "a", "b"), log=log) as killed:
        wait_for(lambda: list(out.glob("samples/shard-*.parquet")), killed)
    assert not (out / "samples.parquet").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("samples/shard-*.parquet")}
    assert 0 < len(kept) < 4
    run_program(*command(models, small_policy, out, "a", "b")[1:])
    assert read_table(out / "samples.parquet") == read_table(whole / "samples.parquet")
    found, expected = (read_json(folder / "audit.json") for folder in (out, whole))
    assert found["models"] == expected["models"] and found["prompts"] == 24 and found["samples"] == 4
    before = {p.name: p.stat().st_mtime_ns for p in (out / "scores").glob("*.parquet")}
    assert len(before) == 3
    said = run_program(*GRM[1:], "audit", models / "c", "--out", out)  # the pool and gold are those of before
    after = {p.name: p.stat().st_mtime_ns for p in (out / "scores").glob("*.parquet")}
    assert len(after) == 4 and before.items() <= after.items()
    added = read_json(out / "audit.json")
    assert list(added["models"]) == ["a", "b", "c"] and added["baseline"] == "a" and "c less a" in said
    same = [{k: v for k, v in f["models"]["b"].items() if "holm" not in k} for f in (added, expected)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_the_pool_and_the_scores_of_a_run_are_taken(models, tmp_path):
    """A finished stage bon gives its pool; gold and the rewards of its own models are not computed again."""
    run = tmp_path / "run"
    (run / "bon").mkdir(parents=True)
    rows = samples(run / "bon")
    shutil.copytree(models, run / "rm")
    rm = {"stage": "rm", "config": {}, "inputs": {}, "outputs": []}
    gold = load([ROOT / "configs" / "smoke.yaml"], []).gold.model_dump(mode="json")
    (run / "rm" / "manifest.json").write_text(json.dumps(rm))
    bon = {"stage": "bon", "config": {"gold": gold}, "inputs": {"rm": manifest_of(rm)}, "outputs": []}
    (run / "bon" / "manifest.json").write_text(json.dumps(bon))
    for shift, name in enumerate(("gold", "a", "b")):
        scores = [float((k * (shift + 3)) % 7) for k in range(len(rows))]
        write_scores(run / "bon" / "scores" / f"{name}.parquet", rows, scores)
    out = tmp_path / "out"
    run_program(*GRM[1:], "audit", run / "rm" / "a", models / "c", "--pools", run / "bon", "--out", out,
                "eval.bootstrap=100")  # fmt: skip
    found = read_json(out / "audit.json")["models"]
    names = {name: entry["key"] for name, entry in found.items()}
    scores = {n: [r["score"] for r in read_table(audit_pools.score_file(out, key))] for n, key in names.items()}
    taken, own = (next(n for n in names if n.endswith(letter)) for letter in "ac")
    assert scores[taken] == [float((k * 4) % 7) for k in range(len(rows))] and len(set(scores[own])) > 2
    [file] = [p for p in (out / "scores").iterdir() if p.name.startswith("gold-")]
    assert [r["score"] for r in read_table(file)] == [float((k * 3) % 7) for k in range(len(rows))]
    before = {p.name: p.stat().st_mtime_ns for p in (out / "scores").glob("*.parquet")}
    run_program(*GRM[1:], "audit", models / "b", "--out", out)  # the pool, gold and settings are those of before
    after = {p.name: p.stat().st_mtime_ns for p in (out / "scores").glob("*.parquet")}
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    added = read_json(out / "audit.json")["models"]
    for (old, one), new in zip(found.items(), list(added)[:2], strict=True):
        both = [{k: v for k, v in facts.items() if k != "name" and "holm" not in k} for facts in (one, added[new])]
        assert both[0] == both[1], (old, new)


def manifest_of(manifest):
    from core.artefacts import manifest_digest

    return manifest_digest(manifest)
