"""Scores and series of other tools become the very pools they hold, however their rows are ordered."""

import csv
import json

import numpy as np
import pytest

from core.errors import ArtefactError
from core.files import write_jsonl, write_table
from study.design import Condition
from study.other_tools import by_seed, read_scores, read_series
from tests.builders.scores.other_tools import (
    GOLD,
    PROXY,
    N,
    P,
    gens,
    grm_rows,
    repository,
    seed_folder,
    series_rows,
    table,
    write_csv,
)  # fmt: skip


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


def by_answer(pools, values, prompt):
    """Text of a sample -> its score, for one prompt of pools."""
    at = pools.prompts.index(prompt)
    return dict(zip(pools.responses[at], values[at].tolist(), strict=True))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_gold_labelled_gens(tmp_path, suffix):
    file = tmp_path / f"gens.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(gens(), indent=4))  # as their own code writes it
    else:
        {"jsonl": write_jsonl, "parquet": write_table}[suffix](file, gens())
    pools = read_scores(file)
    assert set(pools.proxies) == {"proxy", "other"} and {"q1\n\nmore", "q0"} < set(pools.prompts)
    for prompt, p in (("q1\n\nmore", 1), ("q0", 0)):
        for values, planted in ((pools.gold, GOLD), (pools.proxies["other"], PROXY["bt-seed1"])):
            assert by_answer(pools, values, prompt) == {f"a{k}": planted[p, k] for k in range(N)}
    np.testing.assert_array_equal(np.sort(pools.length[0]), np.sort([len(f"a{k}") for k in range(N)]))


def test_columns_of_seeds_are_seeds_of_one_condition(tmp_path):
    rows = [{k: v for k, v in row.items() if "proxy" not in k} for row in gens()]
    for seed in range(1, 6):
        for p, row in enumerate(rows):
            row[f"proxy_scores_seed{seed}"] = (GOLD[p] + seed).tolist()
            row[f"proxy_scores_grm_seed{seed}"] = (GOLD[p] - seed).tolist()
    write_jsonl(tmp_path / "gens.jsonl", rows)
    found = by_seed(list(read_scores(tmp_path / "gens.jsonl").proxies))
    assert found == {
        Condition("proxy"): [f"proxy-seed{s}" for s in range(1, 6)],
        Condition("grm"): [f"grm_seed{s}" for s in range(1, 6)],
    }


def test_files_of_seeds_are_joined_by_their_texts(tmp_path):
    proxies = seed_folder(tmp_path)
    pools = read_scores(tmp_path)
    assert by_seed(list(pools.proxies)) == {Condition("proxy"): ["proxy-seed1", "proxy-seed2", "proxy-seed3"]}
    for seed, planted in proxies.items():
        for prompt, p in (("q3\n\nmore", 3), ("q0", 0)):
            found = by_answer(pools, pools.proxies[f"proxy-seed{seed}"], prompt)
            assert found == {f"a{k}": planted[p, k] for k in range(N)}
            assert by_answer(pools, pools.gold, prompt) == {f"a{k}": GOLD[p, k] for k in range(N)}


def test_files_about_other_samples_or_of_another_gold_do_not_join(tmp_path):
    seed_folder(tmp_path, ensemble=False)
    file = tmp_path / "seed2" / "proxy_labelled_sorted.json"
    rows = json.loads(file.read_text())
    changed = [rows[0] | {"answers": ["other", *rows[0]["answers"][1:]]}, *rows[1:]]
    file.write_text(json.dumps(changed))
    with pytest.raises(ArtefactError, match="seed2.* and seed1.* are not about the same responses"):
        read_scores(tmp_path)
    file.write_text(json.dumps([rows[0] | {"gold_scores": rows[0]["gold_scores"][::-1]}, *rows[1:]]))
    with pytest.raises(ArtefactError, match="gold of seed2.* and of seed1.* differ on 16 of 192"):
        read_scores(tmp_path)
    file.write_text(json.dumps(rows[1:]))
    with pytest.raises(ArtefactError, match="are not about the same prompts: 1 are in one of them only"):
        read_scores(tmp_path)


def test_equal_answers_are_one_that_was_drawn_twice(tmp_path):
    """Two scores of one text differ by rounding only, so best-of-n must take them for a tie."""
    row = {
        "instruction": "q",
        "answers": ["a", "b", "a"],
        "gold_scores": [1.0, 5.0, 1.2],
        "proxy_scores": [0.1, 3, 0.3],
    }
    write_jsonl(tmp_path / "g.jsonl", [row, row | {"instruction": "r"}])
    pools = read_scores(tmp_path / "g.jsonl")
    scores = sorted(zip(pools.responses[0], pools.proxies["proxy"][0], pools.gold[0], strict=True))
    np.testing.assert_allclose([s[1:] for s in scores], [(0.2, 1.1), (0.2, 1.1), (3, 5)])


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


def test_files_of_the_grm_repository_with_texts_in_place_of_orders(tmp_path):
    """Gold of all samples: rows are joined by id and text, in whatever order they are."""
    write_csv(tmp_path / "proxy_score.csv", grm_rows(PROXY["bt-seed0"]))
    moved = grm_rows(GOLD)
    np.random.default_rng(0).shuffle(moved)
    write_csv(tmp_path / "gold_score.csv", moved)
    pools = read_scores(tmp_path)
    for p, prompt in enumerate(pools.prompts):
        at = int(prompt)
        assert {t: GOLD[at, int(t.split()[1])] for t in pools.responses[p]} == by_answer(pools, pools.gold, prompt)
        found = by_answer(pools, pools.proxies["proxy"], prompt)
        assert found == {f"{at} {k}": PROXY["bt-seed0"][at, k] for k in range(N)}
    write_csv(tmp_path / "gold_score.csv", [row | {"response": f"[INST]{row['response']}"} for row in moved])
    with pytest.raises(ArtefactError, match="192 of 192 rows of gold_score.csv .* needs a column order_ids"):
        read_scores(tmp_path)


def test_the_grm_repositorys_own_columns_with_gold_of_all_samples(tmp_path):
    repository(tmp_path, {"grm": PROXY["bt-seed0"].copy(), "bt": PROXY["bt-seed1"].copy()}, chosen=False)
    pools = read_scores(tmp_path)
    assert set(pools.proxies) == {"grm", "bt"} and pools.gold.shape == (P, N)
    for name, planted in (("grm", PROXY["bt-seed0"]), ("bt", PROXY["bt-seed1"])):
        p = int(pools.prompt_ids[5]) - 100
        found = {int(t.split("answer ")[1].split()[0]): i for i, t in enumerate(pools.responses[5])}
        np.testing.assert_allclose([pools.proxies[name][5, found[k]] for k in range(N)], planted[p])
        np.testing.assert_allclose([pools.gold[5, found[k]] for k in range(N)], GOLD[p])


def test_gold_of_chosen_answers_alone_gives_the_best_of_the_first_n(tmp_path):
    """As step 6 of the GRM repository computes it, from its own columns."""
    methods = repository(tmp_path, {"grm": PROXY["bt-seed0"].copy(), "bt": PROXY["bt-seed1"].copy()})
    found = read_scores(tmp_path)
    assert "which is all choices up to n = 16" in found.about and len({r["step"] for r in found.rows}) == N
    for row in found.rows:
        proxy, place = methods[row["run"]]
        p, n = int(row["prompt_id"]) - 100, row["step"]
        best = max(place[p][:n], key=lambda k, p=p, proxy=proxy: proxy[p, k])
        assert (row["proxy"], row["gold"]) == pytest.approx((proxy[p, best], GOLD[p, best]))
        assert row["kl"] == pytest.approx(np.log(n) - (n - 1) / n)


def test_gold_of_other_samples_is_refused(tmp_path):
    repository(tmp_path, {"grm": PROXY["bt-seed0"].copy()})
    file = tmp_path / "step3" / "grm" / "proxy_score.csv"
    rows = list(csv.DictReader(file.open(newline="")))
    write_csv(file, sorted(rows, key=lambda row: float(row["rewards"])))  # orders then name other rows
    with pytest.raises(ArtefactError, match=r"are about other samples: \d+ texts of one id and order "):
        read_scores(tmp_path)
    write_csv(file, rows)
    gold = tmp_path / "step5" / "grm" / "gold_score.csv"
    write_csv(gold, [r for r in csv.DictReader(gold.open(newline="")) if r["order_ids"] != "1"])
    with pytest.raises(ArtefactError, match="gold lacks the best of the first 1 samples of id 10"):
        read_scores(tmp_path)
    gold.unlink()
    with pytest.raises(ArtefactError, match="no gold_score.csv"):
        read_scores(tmp_path / "step3" / "grm")


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


def test_series(tmp_path):
    write_csv(tmp_path / "s.csv", series_rows()[::-1])
    rows = read_series(tmp_path / "s.csv")
    assert [r["step"] for r in rows[::P]] == list(range(6)) and rows[0]["kl_kind"] == "k1" and rows[-1]["kl"] == 2.5
    write_jsonl(tmp_path / "t.jsonl", [*series_rows(), series_rows()[0]])
    with pytest.raises(ArtefactError, match="row 73: run, seed, step, prompt and sample .* occur twice"):
        read_series(tmp_path / "t.jsonl")
    seeds = [{**r, "seed": seed, "response": "long"} for seed in (1, 2) for r in series_rows()]
    write_jsonl(tmp_path / "v.jsonl", seeds)
    found = read_series(tmp_path / "v.jsonl")
    assert len(found) == len(seeds) and all("response" not in row for row in found)
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
