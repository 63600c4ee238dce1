"""Reading evaluation sets in their published layouts, and `grm rm-eval` from files to numbers."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from core.config import Model
from core.data.chat import ChatTokenizer
from core.data.layouts.text import parse_dialogue
from core.errors import DataError
from core.files import read_json, read_table, write_table
from core.models.loading import load_causal_lm
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.evaluation.command import main, metrics_of, model_names, parse_set, score_set
from rm.evaluation.sets import read_set
from rm.model import RewardModel
from tests.builders.processes import ROOT

DATA = Path(os.environ.get("RLHF_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: set RLHF_DATA to the folder of real sets")

HHH = {"input": "Hi", "targets": {"choices": ["rude", "kind"], "labels": [0, 1]}}
PPE = {"question_id": "q1", "prompt": "Hi", "response_1": "one", "response_2": "two", "winner": "model_b"}


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def judgement(**changes):
    return {
        "question_id": 81, "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "expert_1", "turn": 1,
        "conversation_a": chat("Q1", "a1", "Q2", "a2"), "conversation_b": chat("Q1", "b1", "Q2", "b2"),
    } | changes  # fmt: skip


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def texts(comparison):
    return [m["content"] for m in comparison.chosen], [m["content"] for m in comparison.rejected]


def test_hhh_takes_the_label_and_the_file_name(tmp_path):
    write(tmp_path / "honest.jsonl", HHH)
    write(tmp_path / "harmless.jsonl", HHH | {"input": "Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nso?"})
    found = read_set("hhh", tmp_path)
    assert found.layout == "hhh" and [c.subset for c in found.comparisons] == ["harmless", "honest"]
    assert texts(found.comparisons[0]) == (["Hi", "Yes?", "Why\n\nso?", "kind"], ["Hi", "Yes?", "Why\n\nso?", "rude"])
    assert [m["role"] for m in found.comparisons[0].chosen] == ["user", "assistant"] * 2


def test_a_leading_human_is_no_part_of_the_turn():
    expected = chat("Hi", "Yes?", "Why Human: so?")
    for head in ("Hi", "Human: Hi", "\n\nHuman: Hi"):
        assert parse_dialogue(f"{head}\n\nAssistant: Yes?\n\nHuman: Why Human: so?") == expected


def test_mt_bench_compares_what_the_turn_was_judged_on(tmp_path):
    table = tmp_path / "human.parquet"
    rows = [judgement(), judgement(turn=2, winner="model_a"), judgement(judge="gpt4_pair", winner="tie (inconsistent)")]
    write_table(table, rows)
    first, second = read_set("mt", table).comparisons
    assert texts(first) == (["Q1", "b1"], ["Q1", "a1"]) and first.subset == "human, turn 1"
    assert texts(second) == (["Q1", "a1", "Q2", "a2"], ["Q1", "b1", "Q2", "b2"]) and second.subset == "human, turn 2"
    assert first.prompt_id == second.prompt_id  # one question, so not independent
    kept = read_set("mt", table, label_ties="half")
    assert [c.label_tie for c in kept.comparisons] == [False, False, True]
    assert kept.comparisons[2].subset == "gpt-4, turn 1" and kept.label_ties == 1


def test_mt_bench_counts_repeated_judgements_apart(tmp_path):
    found = read_set("mt", write(tmp_path / "human.jsonl", judgement(), judgement(), judgement(judge="expert_2")))
    assert len({c.id for c in found.comparisons}) == 3


def test_rewardbench_and_ppe(tmp_path):
    rows = [{"prompt": "P", "chosen": "good", "rejected": "bad", "subset": "donotanswer", "id": i} for i in (7, 8)]
    found = read_set("rb", write(tmp_path / "rb.jsonl", *rows))
    assert found.layout == "rewardbench" and [c.id for c in found.comparisons] == ["7", "8"]
    assert found.comparisons[0].prompt_id == found.comparisons[1].prompt_id
    arena = [PPE, PPE | {"winner": "model_a", "question_id": "q2"}, PPE | {"winner": "tie (bothbad)"}]
    found = read_set("ppe", write(tmp_path / "ppe.jsonl", *arena))
    assert found.layout == "ppe" and found.label_ties == 1
    assert [texts(c)[0][-1] for c in found.comparisons] == ["two", "one"]


def test_lists_of_candidates_are_crossed(tmp_path):
    row = {"id": "5", "prompt": "P", "chosen": ["c0"], "rejected": ["r0", "r1", "r2"], "subset": "Math"}
    found = read_set("rb2", write(tmp_path / "rb2.jsonl", row))
    assert found.layout == "rewardbench2" and {c.item for c in found.comparisons} == {"5"}
    assert [(c.chosen_index, c.rejected_index) for c in found.comparisons] == [(0, 0), (0, 1), (0, 2)]
    row = {"id": "5", "prompt": "P", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"], "domain": "chat"}
    (tmp_path / "total.json").write_text(json.dumps([row]))
    found = read_set("rm", tmp_path / "total.json")
    assert found.layout == "rm_bench" and len(found.comparisons) == 9
    assert all(texts(c) == (["P", f"c{c.chosen_index}"], ["P", f"r{c.rejected_index}"]) for c in found.comparisons)


def styles(**about):
    return {"id": 8, "prompt": "P", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]} | about


@pytest.mark.parametrize("layout", ["auto", "rm_bench"])
def test_rm_bench_by_domain(tmp_path, layout):
    """Its own files have no column `domain`, and their `subset` is that of where the prompts come from."""
    subsets = {"chat": "alpacaeval", "code": "bigcode/humanevalpack", "safety-refuse": "xstest-should-refuse"}
    for domain, subset in subsets.items():
        (tmp_path / f"{domain}_filtered.json").write_text(json.dumps([styles(subset=subset, prompt=domain)]))
    found = read_set("rm", tmp_path, layout)
    assert found.layout == "rm_bench" and Counter(c.subset for c in found.comparisons) == dict.fromkeys(subsets, 9)
    alone = read_set("rm", tmp_path / "safety-refuse_filtered.json", layout)
    assert {c.subset for c in alone.comparisons} == {"safety-refuse"}


def test_rm_bench_and_rewardbench2_are_not_taken_for_each_other(tmp_path):
    focus = {"id": "1", "prompt": "P", "chosen": ["c"], "rejected": ["r0", "r1", "r2"], "subset": "Focus"}
    assert read_set("x", write(tmp_path / "chat_filtered.jsonl", focus)).layout == "rewardbench2"
    ties = styles(id="tied:1", subset="Ties")
    assert read_set("x", write(tmp_path / "ties.jsonl", ties)).layout == "rewardbench2"
    unknown = write(tmp_path / "mine.jsonl", styles(subset="alpacaeval"))
    with pytest.raises(DataError, match="nor a `subset` of RewardBench 2 .*name the layout"):
        read_set("x", unknown)
    assert read_set("x", unknown, "rewardbench2").layout == "rewardbench2"
    with pytest.raises(DataError, match="the file is named after none of the domains chat, code"):
        read_set("x", unknown, "rm_bench")


def test_correctness_sets_of_ppe_compare_their_conflict_pairs(tmp_path):
    row = {
        "question_id": "q", "prompt": "P", "scores": [False, True, False], "response_1": "a", "response_2": "b",
        "response_3": "c", "sampled_conflict_pairs": [[0, 1], [1, 2]],
    }  # fmt: skip
    broken = row | {"question_id": "z", "sampled_conflict_pairs": [[0, 2]]}
    file = write(tmp_path / "math_best_of_k.jsonl", row, broken)
    found = read_set("ppe", file, max_malformed=0.5)
    assert found.layout == "ppe" and {c.subset for c in found.comparisons} == {"math_best_of_k"}
    assert [(c.chosen[-1]["content"], c.rejected[-1]["content"]) for c in found.comparisons] == [("b", "a"), ("b", "c")]
    assert len({c.id for c in found.comparisons}) == 2 and len({c.item for c in found.comparisons}) == 1
    assert found.malformed.counts == {"the responses 0 and 2 of a conflict pair have one score": 1}


def test_an_item_of_two_files_is_refused(tmp_path):
    for name in ("filtered", "raw"):
        write(tmp_path / f"{name}.jsonl", {"id": 1, "prompt": "P", "chosen": "a", "rejected": "b", "subset": "hep-go"})
    with pytest.raises(DataError, match=r"item '1' is in .*filtered.jsonl and in .*raw.jsonl"):
        read_set("rb", tmp_path)


def test_bad_rows_are_counted_up_to_a_share(tmp_path):
    bad = [PPE | {"winner": "both"}, {"prompt": "Hi"}, PPE | {"response_1": None}, PPE | {"prompt": " "}]
    file = write(tmp_path / "set.jsonl", *[PPE] * 6, *bad, *bad[:1] * 4)
    with pytest.raises(DataError, match=r"8 of 14 rows .*--max-malformed 0.1: 5 x winner is none of .*set.jsonl row 7"):
        read_set("ppe", file, max_malformed=0.1)
    found = read_set("ppe", file, max_malformed=0.9)
    assert len(found.comparisons) == 6 and found.malformed.counts.total() == 8
    assert found.malformed.first["winner is none of model_a, model_b, tie"] == [
        f"set.jsonl row {n}" for n in (7, 11, 12)
    ]
    assert "1 x a user turn is empty (set.jsonl row 10)" in found.malformed.lines()
    assert "1 x no column 'response_1' (set.jsonl row 8)" in found.malformed.lines()


@pytest.mark.parametrize(
    "row",
    [
        PPE,
        HHH | {"id": 1},
        {"prompt": "Hi", "chosen": "two", "rejected": "one", "subset": "donotanswer", "id": 7},
        {"prompt": "Hi", "chosen": ["two"], "rejected": ["one"], "subset": "Math", "id": 7},
        {"prompt": "Hi", "chosen": "two", "rejected": "one"},
    ],
    ids=["ppe", "hhh", "rewardbench", "rewardbench2", "pairs"],
)
def test_system_turns_count_and_images_are_refused(tmp_path, row):
    file = write(tmp_path / "s.jsonl", row | {"system": "Be brief.", "history": [["Yo", "Yes?"]]})
    for side in (read_set("s", file).comparisons[0].chosen, read_set("s", file).comparisons[0].rejected):
        assert side[:-1] == [{"role": "system", "content": "Be brief."}, *chat("Yo", "Yes?", "Hi")]
    file = write(tmp_path / "i.jsonl", row, row | {"images": ["a.png"]})
    with pytest.raises(DataError, match=r"1 of 2 rows do not fit .*: 1 x images \(i\.jsonl row 2\)"):
        read_set("i", file)


def test_rows_of_rated_responses_are_counted_as_rows(tmp_path):
    """Ten responses to one prompt are 45 pairs; one bad row of eleven is a share of 1 / 11."""
    rows = [{"prompt": "Hi", "response": f"r{i}", "rating": i} for i in range(10)]
    file = write(tmp_path / "r.jsonl", *rows, {"prompt": "Hi", "response": "", "rating": 3})
    with pytest.raises(DataError, match="1 of 11 rows do not fit the layout pairs"):
        read_set("r", file, max_malformed=0.05)
    found = read_set("r", file, max_malformed=0.1)
    assert found.rows == 11 and len(found.comparisons) == 45


def test_a_broken_line_is_one_malformed_row(tmp_path):
    file = write(tmp_path / "p.jsonl", PPE, PPE)
    file.write_bytes(file.read_bytes() + b"\n{broken")
    found = read_set("p", file, max_malformed=0.5)
    assert found.malformed.lines() == ["1 x not JSON (p.jsonl row 3)"] and found.rows == 3


def test_votes_of_the_arena_are_of_whole_chats(tmp_path):
    """There `turn` is the number of turns; in MT-Bench it is the one that was judged."""
    arena = judgement(judge="arena_user_1", turn=3, conversation_a=chat("Q1", "a1"), conversation_b=chat("Q1", "b1"))
    found = read_set("arena", write(tmp_path / "arena.jsonl", arena))
    assert found.layout == "pairs" and texts(found.comparisons[0]) == (["Q1", "b1"], ["Q1", "a1"])


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing is neither"):
        read_set("x", tmp_path / "nothing")
    with pytest.raises(DataError, match="no comparison among 1 rows .*1 of them ties"):
        read_set("x", write(tmp_path / "t.jsonl", PPE | {"winner": "tie"}))
    for text in ("noname", "=x", "a:nolayout=x", "a/b=x"):
        with pytest.raises(DataError, match="NAME=PATH"):
            parse_set(text)
    with pytest.raises(DataError, match="the layout nearest to 'mtbench' is mt_bench"):
        parse_set("mt:mtbench=a")
    assert parse_set("mt:mt_bench=a=b") == ("mt", "mt_bench", Path("a=b"))
    with pytest.raises(DataError, match="given twice"):
        main(["m", "--set", f"x={tmp_path}", "--set", f"x={tmp_path}"])


def test_models_get_the_shortest_names_that_differ():
    assert model_names(["runs/a/rm/grm", "runs/a/rm/bt/"]) == ["grm", "bt"]
    assert model_names(["runs/a/rm/grm", "/runs/b/rm/grm"]) == ["a_rm_grm", "b_rm_grm"]
    with pytest.raises(DataError, match="given twice"):
        model_names(["runs/a", "runs/a/"])


@needs_data
def test_the_hhh_set_is_whole_and_parsed_as_its_authors_mean():
    found = read_set("hhh", DATA / "hhh_alignment")
    counts = Counter(c.subset for c in found.comparisons)
    assert counts == {"harmless": 58, "helpful": 59, "honest": 61, "other": 43}
    assert len(found.comparisons) == 221 and not found.malformed.counts
    twins = [json.loads(line) for line in (DATA / "unified" / "hhh_alignment.jsonl").read_text().splitlines()]
    pairs = {json.dumps(sorted([json.dumps(r["conv_A"]), json.dumps(r["conv_B"])])) for r in twins}
    mine = [json.dumps(sorted([json.dumps(c.chosen), json.dumps(c.rejected)])) for c in found.comparisons]
    assert sum(pair in pairs for pair in mine) == 221


@needs_data
def test_other_pair_files_are_read_as_for_training():
    file = DATA / "unified" / "dpo_en_demo.jsonl"
    found = read_set("dpo", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    preferred = [r["conv_A" if r["conv_A_rating"] > r["conv_B_rating"] else "conv_B"] for r in rows]
    assert found.layout == "pairs" and [c.chosen for c in found.comparisons] == preferred


@pytest.fixture(scope="module")
def models(policy_path, tmp_path_factory):
    where = Model(path=str(policy_path), attention="eager")
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = RewardModel(load_causal_lm(where, dtype="float32", num_layers=2), "mlp", ChatTokenizer(where)).eval()
        folders.append(tmp_path_factory.mktemp("models") / f"m{seed}")
        save_reward_model(folders[-1], model, named_weights(model.lm), model.head.state_dict())
    return folders


def evaluate(*arguments):
    return main([*map(str, arguments), "--bootstrap", "200"])


@pytest.mark.slow
def test_the_command_writes_what_its_tables_hold(models, tmp_path, capsys):
    candidates = {"prompt": "P", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "long r1", "r2"], "domain": "chat"}
    sets = {
        "arena": write(tmp_path / "arena.jsonl", PPE, PPE | {"winner": "model_a", "prompt": "Hello there"},
                       PPE | {"response_2": "one", "question_id": "same"}, PPE | {"winner": "tie"}),
        "styles": write(tmp_path / "styles.jsonl", candidates | {"id": 1}, candidates | {"id": 2, "prompt": "Q"}),
    }  # fmt: skip
    out = tmp_path / "out"
    named = [f"--set={name}={path}" for name, path in sets.items()]
    assert evaluate(*models, *named, "--out", out, "--label-ties", "half") == 0
    report = read_json(out / "metrics.json")
    for model in ("m0", "m1"):
        for name in sets:
            rows = read_table(out / model / f"{name}.parquet")
            reported = report["models"][model]["sets"][name]
            assert reported == metrics_of(rows, reported["layout"], draws=200) | {"too_long": 0, "system_moved": 0}
            delta = np.array([r["reward_chosen"] - r["reward_rejected"] for r in rows])
            hits = np.where([r["label_tie"] for r in rows], 0.5, (delta > 0) + 0.5 * (delta == 0))
            assert reported["accuracy"]["mean"] == pytest.approx(hits.mean())
    arena = [read_table(out / m / "arena.parquet") for m in ("m0", "m1")]
    assert [r["id"] for r in arena[0]] == ["q1", "q1#2", "same", "q1#3"] and arena[0][0]["chosen_words"] == 1
    assert arena[0][2]["reward_chosen"] == arena[0][2]["reward_rejected"]  # one text has one reward
    hits = [[m["accuracy"]["mean"] for m in (report["models"][k]["sets"]["arena"],)][0] for k in ("m0", "m1")]
    assert report["differences"]["arena"]["m1"]["mean"] == pytest.approx(hits[1] - hits[0])
    assert report["sets"]["arena"]["label_ties"] == 1 and report["options"]["ties"] == "half"
    table = capsys.readouterr().out
    assert "| arena  | m0 " in table and "= hard" in table and "m1 - m0" in table and "* without code" in table


@pytest.mark.slow
def test_rounding_is_said_where_there_is_any(models, tmp_path, capsys):
    """float32 unless asked otherwise, whatever this machine computes fast; and no difference is shown as exact."""
    rows = [PPE | {"question_id": f"q{i}", "prompt": f"Question {i}?" * (1 + i % 3)} for i in range(6)]
    arena = write(tmp_path / "arena.jsonl", *rows)
    for dtype in ("float32", "bfloat16"):
        options = [] if dtype == "float32" else ["--dtype", dtype]
        twice = models[0], models[0].parent / "m0" / ".." / "m0"
        assert evaluate(*twice, f"--set=a={arena}", "--out", tmp_path / dtype, *options) == 0
        report, table = read_json(tmp_path / dtype / "metrics.json"), capsys.readouterr().out
        of_model = next(iter(report["models"].values()))
        assert of_model["dtype"] == dtype and ("decided otherwise" in table) == (dtype == "bfloat16")
    noise = of_model["sets"]["a"]["rounding"]
    assert noise["pairs"] == 6 and 0 < noise["rms"] < 0.1 and 0 <= noise["changed"] <= 6
    [same] = report["differences"]["a"].values()
    assert (same["n"], same["differing"]) == (6, 0) and same["hi"] == -same["lo"] > 0.3
    assert "[+0.000, +0.000]" not in table and "[-0.390, +0.390]" in table


@pytest.mark.slow
def test_rewards_are_those_of_the_model(models, tmp_path):
    model = RewardModel.from_pretrained(models[0], dtype="float32")
    found = read_set("mt", write(tmp_path / "mt.jsonl", judgement(turn=2), judgement()))
    rows, long = score_set(model, found, batch_tokens=512)
    alone = [[float(model.score([c])) for c in (x.chosen, x.rejected)] for x in found.comparisons]
    reported = [[r["reward_chosen"], r["reward_rejected"]] for r in rows]
    np.testing.assert_allclose(reported, alone, atol=1e-5, rtol=1e-4)
    assert long == 0


@pytest.mark.slow
def test_long_items_are_left_out_whole(models, tmp_path):
    model = RewardModel.from_pretrained(models[0], dtype="float32")
    row = {"prompt": "P", "chosen": ["c"], "rejected": ["r0", "r1 " * 100], "subset": "Math"}
    file = write(tmp_path / "x.jsonl", row | {"id": "1"}, row | {"id": "2", "rejected": ["r", "s"]})
    rows, long = score_set(model, read_set("x", file), batch_tokens=512, max_tokens=100)
    assert {r["item"] for r in rows} == {"2"} and long == 2
    with pytest.raises(DataError, match="within 10 tokens: raise --max-tokens"):
        score_set(model, read_set("x", file), batch_tokens=512, max_tokens=10)
