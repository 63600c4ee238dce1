"""Scores and series of other tools become the very pools they hold, however their rows are ordered."""

import csv
import json

import numpy as np
import pytest

from core.errors import ArtefactError
from core.files import write_jsonl, write_table
from study import run as study
from study.design import Condition
from study.other_tools import by_seed, read_scores, read_series

P, N = 12, 16
RNG = np.random.default_rng(0)
GOLD = RNG.normal(size=(P, N))
PROXY = {"bt-seed0": GOLD + RNG.normal(size=(P, N)), "bt-seed1": GOLD + RNG.normal(size=(P, N))}


def table():
    return [
        {"prompt_id": f"p{p:02d}", "sample_id": k, "gold": GOLD[p, k], "prompt": f"q{p}", "response": "a" * (k + 1),
         **{name: v[p, k] for name, v in PROXY.items()}}
        for p in range(P) for k in range(N)
    ]  # fmt: skip


def gens():
    return [
        {"instruction": f"q{p}", "input": "more" if p else "", "answers": [f"a{k}" for k in range(N)],
         "gold_scores": GOLD[p].tolist(), "proxy_scores": PROXY["bt-seed0"][p].tolist(),
         "proxy_scores_other": PROXY["bt-seed1"][p].tolist()}
        for p in range(P)
    ]  # fmt: skip


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def grm_rows(values):
    return [{"id": p, "response": f"{p} {k}", "reward": values[p, k]} for p in range(P) for k in range(N)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_in_any_order_and_format(tmp_path, suffix):
    rows, file = table(), tmp_path / f"scores.{suffix}"
    np.random.default_rng(1).shuffle(rows)
    {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_table}[suffix](file, rows)
    pools = read_scores(file)
    np.testing.assert_allclose(pools.gold, GOLD)
    assert set(pools.proxies) == set(PROXY) and pools.prompts[3] == "q3"
    np.testing.assert_allclose(pools.proxies["bt-seed1"], PROXY["bt-seed1"])
    np.testing.assert_array_equal(pools.length[0], np.arange(1, N + 1))  # characters, where there are no tokens


def test_gold_labelled_gens(tmp_path):
    (tmp_path / "gens.json").write_text(json.dumps(gens()))
    pools = read_scores(tmp_path / "gens.json")
    at = {text: i for i, text in enumerate(pools.prompts)}
    assert set(pools.proxies) == {"proxy", "other"} and "q1\n\nmore" in at and "q0" in at
    np.testing.assert_allclose(pools.gold[at["q1\n\nmore"]], GOLD[1])
    np.testing.assert_allclose(pools.proxies["other"][at["q0"]], PROXY["bt-seed1"][0])


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "columns"])
def test_results_of_rewardbench_are_scores(tmp_path, lines):
    """`rewardbench` writes lines, `scripts/run_rm.py` an object of columns with the model's name."""
    rows = [{"prompt": f"q{p}", "results": 1, "scores_chosen": PROXY["bt-seed0"][p, 0], "text_rejected": f"no {p}",
             "scores_rejected": PROXY["bt-seed0"][p, 1], "text_chosen": f"yes {p}", "subset": "hep-go"}
            for p in range(P)]  # fmt: skip
    file = tmp_path / ("mine_outputs.jsonl" if lines else "columns.json")
    columns = {name: [row[name] for row in rows] for name in rows[0]} | {"model": "owner/mine"}
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(columns, indent=4))
    pools = read_scores(file)
    np.testing.assert_array_equal(pools.gold, [[1.0, 0.0]] * P)
    np.testing.assert_allclose(pools.proxies["mine"], PROXY["bt-seed0"][:, :2])
    assert pools.responses[3] == ("yes 3", "no 3") and pools.prompts[3] == "q3"


def test_results_of_rewardbench_2_are_scores(tmp_path):
    columns = {"id": list(range(P)), "subset": ["Math"] * (P - 1) + ["Ties"], "num_correct": [1] * (P - 1) + [3],
               "scores": PROXY["bt-seed0"][:, :4].tolist(), "text": [["a", "b", "c", "d"]] * P, "results": [1.0] * P,
               "model": "owner/mine", "model_type": "Seq. Classifier"}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(columns, indent=4, sort_keys=True))
    pools = read_scores(tmp_path / "mine.json")
    np.testing.assert_array_equal(pools.gold, [[1.0, 0.0, 0.0, 0.0]] * (P - 1))
    np.testing.assert_allclose(pools.proxies["mine"], PROXY["bt-seed0"][:-1, :4])
    columns["scores"][2][1] = None
    (tmp_path / "mine.json").write_text(json.dumps(columns))
    with pytest.raises(ArtefactError, match=r"mine.json \(read as rewardbench\): row 3: scores is None, not a number"):
        read_scores(tmp_path / "mine.json")


def test_files_of_the_grm_repository(tmp_path):
    write_csv(tmp_path / "proxy_score.csv", grm_rows(PROXY["bt-seed0"]))
    write_csv(tmp_path / "gold_score.csv", grm_rows(GOLD))
    pools = read_scores(tmp_path)
    order = sorted(range(P), key=str)
    np.testing.assert_allclose(pools.gold, GOLD[order])
    np.testing.assert_allclose(pools.proxies["proxy"], PROXY["bt-seed0"][order])
    moved = grm_rows(GOLD)
    moved[0], moved[1] = moved[1], moved[0]  # without ids of samples an order that differs must not be joined
    write_csv(tmp_path / "gold_score.csv", moved)
    with pytest.raises(ArtefactError, match="2 ids name different texts"):
        read_scores(tmp_path)
    write_csv(tmp_path / "gold_score.csv", grm_rows(GOLD)[:5])
    with pytest.raises(ArtefactError, match="gold_score.csv has 5 rows .* score the whole pool"):
        read_scores(tmp_path)


def without(column):
    return [{k: v for k, v in row.items() if k != column} for row in table()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table()[1:], "ragged"),
        ([*table(), table()[0]], "ragged|doubled"),
        ([table()[0] | {"gold": "nan"}, *table()[1:]], "row 1: gold is nan"),
        ([table()[0] | {"bt-seed0": "x"}, *table()[1:]], "no proxy|row 1|row 2|not a number"),
        (without("gold"), "no column gold"),
        ([{k: r[k] for k in ("prompt_id", "sample_id", "gold")} for r in table()], "no proxy"),
    ],
)
def test_faults_of_a_table_are_named(tmp_path, rows, message):
    write_jsonl(tmp_path / "scores.jsonl", rows)
    if rows[0].get("bt-seed0") == "x":
        pools = read_scores(tmp_path / "scores.jsonl")
        assert set(pools.proxies) == {"bt-seed1"}  # a column of texts is none of scores
        return
    with pytest.raises(ArtefactError, match=message):
        read_scores(tmp_path / "scores.jsonl")


def test_faults_of_files_are_named(tmp_path):
    with pytest.raises(ArtefactError, match="no file or folder"):
        read_scores(tmp_path / "none")
    (tmp_path / "a.jsonl").write_text("{bad\n")
    with pytest.raises(ArtefactError, match="a.jsonl, line 1: not JSON"):
        read_scores(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ArtefactError, match="holds no rows"):
        read_scores(tmp_path / "b.json")
    write_jsonl(tmp_path / "c.jsonl", [{k: v for k, v in r.items() if "proxy" not in k} for r in gens()])
    with pytest.raises(ArtefactError, match="add a column of as many scores"):
        read_scores(tmp_path / "c.jsonl")
    write_jsonl(tmp_path / "d.jsonl", [gens()[0] | {"gold_scores": [1.0]}])
    with pytest.raises(ArtefactError, match="row 1 has 16 answers and 1 gold_scores"):
        read_scores(tmp_path / "d.jsonl")
    with pytest.raises(ArtefactError, match="no layout 'other'"):
        read_scores(tmp_path / "d.jsonl", layout="other")


def series_rows():
    return [
        {"run": "a", "step": s, "prompt_id": f"p{p:02d}", "proxy": s + 0.1 * p, "gold": s - 0.2 * s * s,
         "kl_k1": 0.5 * s}
        for s in range(6) for p in range(P)
    ]  # fmt: skip


def test_series(tmp_path):
    write_csv(tmp_path / "s.csv", series_rows()[::-1])
    rows = read_series(tmp_path / "s.csv")
    assert [r["step"] for r in rows[::P]] == list(range(6)) and rows[0]["kl_kind"] == "k1" and rows[-1]["kl"] == 2.5
    write_jsonl(tmp_path / "t.jsonl", [*series_rows(), series_rows()[0]])
    with pytest.raises(ArtefactError, match="row 73: run, step, prompt and sample .* occur twice"):
        read_series(tmp_path / "t.jsonl")
    write_jsonl(tmp_path / "u.jsonl", [{k: v for k, v in r.items() if k != "kl_k1"} for r in series_rows()])
    with pytest.raises(ArtefactError, match="no column one of kl_rb"):
        read_series(tmp_path / "u.jsonl")


def test_names_of_other_tools_are_seeds_or_variants_and_nothing_more():
    names = ["bt-seed0", "bt-seed1", "grm_s2", "grm-5layers-noise0.25", "x.s3"]
    assert by_seed(names) == {
        Condition("bt"): ["bt-seed0", "bt-seed1"], Condition("grm"): ["grm_s2"],
        Condition("grm-5layers-noise0.25"): ["grm-5layers-noise0.25"], Condition("x"): ["x.s3"],
    }  # fmt: skip
    unknown = next(iter(by_seed(["grm-5layers-noise0.25"])))
    assert (unknown.pairs, unknown.layers, unknown.label_noise, unknown.rule) == (None, None, None, None)


@pytest.mark.slow
def test_a_report_of_imported_scores(tmp_path, capsys):
    write_jsonl(tmp_path / "mine.jsonl", table())
    write_jsonl(tmp_path / "rl.jsonl", series_rows())
    arguments = ["--scores", tmp_path / "mine.jsonl", "--series", tmp_path / "rl.jsonl", "--out", tmp_path / "out"]
    assert study.main([*map(str, arguments), "--config", "configs/study.yaml", "eval.bootstrap=100"]) == 0
    assert "study.html" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "conditions.json").read_text())
    assert facts["bt"]["seeds"] == 2 and "bt x 2, min" in facts
    page = (tmp_path / "out" / "study.html").read_text()
    assert "12 prompts, pools of 16" in page and 'id="samples"' in page and "oracle" in page
