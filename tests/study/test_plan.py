"""`grm plan`: what it prints, refuses and warns of. No model is run."""

import json

import pytest

from core.config.load import load
from core.files import write_json
from core.machine import code_version
from pipelines.__main__ import main
from pipelines.plan import measured
from pipelines.plan.lengths import lengths_of
from pipelines.plan.measure import groups
from pipelines.plan.plan import Where
from pipelines.plan.rates import GPUS, ON_GPU, FromPeaks
from pipelines.plan.shapes import measured as shape_of_config
from pipelines.plan.work import Fixed, Logits, Pass, Start, Update
from study.plan import of_configuration, on_gpus
from tests.builders.plan.sizes import tiny_shape
from tests.builders.processes import ROOT

GEMMA = ("--config", "configs/gemma-2b.yaml")
STAGES = ["prompts", "preferences", "rm", "bon", "ppo", "eval", "report"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_for_gpus(capsys):
    found = planned(capsys, *GEMMA, "--gpus", "8xH100", "--price", "2.5", "--share", "0.5")
    assert [stage["stage"] for stage in found["stages"]] == STAGES and found["gpus"] == 8
    assert "from published peaks, not measured" in found["rests_on"]
    assert found["cost"] == pytest.approx(found["seconds"] / 3600 * 2.5 * 8, rel=1e-3)
    assert any("256.0 tokens a response (as asked" in line for line in found["assumptions"])
    ppo = found["stages"][4]
    assert [stage["ranks"] for stage in found["stages"]] == [1, 8, 8, 8, 8, 8, 1]
    alone = planned(capsys, *GEMMA, "--gpus", "8xH100", "--share", "0.5", "generation.processes=1")["stages"]
    # preferences, bon, eval: all GPUs share what one has to do. Decoding fewer sequences at once takes as many steps.
    for number in (1, 3, 5):
        name, one, all_ = STAGES[number], alone[number], found["stages"][number]
        work = [sum(stage["seconds_of_phases"][p] for p in ("sample", "gold")) for stage in (one, all_)]
        assert one["ranks"] == 1 and 2 < work[0] / work[1] <= 8.01, (name, work)
    assert ppo["seconds"] == pytest.approx(sum(ppo["seconds_of_phases"].values()), abs=0.5)
    assert ppo["memory_bytes_per_rank"] == pytest.approx(sum(ppo["memory_parts"].values()), rel=1e-6)
    assert ppo["disk_peak_bytes"] >= ppo["disk_bytes"] > 0
    assert found["disk_peak_bytes"] >= sum(stage["disk_bytes"] for stage in found["stages"])


def test_text_has_every_stage_and_what_it_rests_on(capsys):
    assert main(["plan", *GEMMA, "--gpus", "h100", "--phases"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in STAGES)
    assert "rests on:" in shown and "\n    generate " in shown and "google/gemma-2b-it: 2,506M parameters" in shown


def test_it_refuses_nothing_that_will_not_fit(capsys):
    found = planned(capsys, *GEMMA, "--gpus", "3xRTX4090", "ppo.lora=null")
    assert any("a rank needs" in line and "22.4 GiB" in line for line in found["warnings"])
    assert any("rm.global_batch 32 is not divisible by 3 ranks" in line for line in found["warnings"])
    found = planned(capsys, *GEMMA, "--gpus", "64xH100")
    assert any("rm.global_batch 32 is not divisible by 64 ranks" in line for line in found["warnings"])


def test_processes_without_a_shard_are_warned_of(capsys):
    for size, warned in ((64, True), (8, False)):
        found = planned(capsys, *GEMMA, "--gpus", "8xH100", f"bon.shard_prompts={size}")
        assert any(line.startswith("bon: 3 shards for 8 processes") for line in found["warnings"]) == warned


def test_no_more_processes_than_gpus(capsys):
    """As the stages do: what a configuration sets for a CPU holds at most one process a GPU, and ranks are refused."""
    found = planned(capsys, "--config", "configs/offline.yaml", "--gpus", "H200", "generation.processes=2")
    assert {stage["ranks"] for stage in found["stages"]} == {1}
    assert main(["plan", "--config", "configs/offline.yaml", "--gpus", "H200", "engine.processes=2"]) == 2
    assert "every rank needs a GPU of its own: there are 1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["8xH900", "xxH100", "0xH100"])
def test_a_gpu_that_is_not_known(capsys, wrong):
    assert main(["plan", *GEMMA, "--gpus", wrong]) == 2
    assert "such as 8xH100" in capsys.readouterr().err


def test_a_study_is_planned_with_its_matrix(capsys):
    asked = ("study.kl_coefs=[0.0, 0.1]", "study.ppo_seeds=1", "study.ppo_ensembles=[]", "study.kl_sweep=[]")
    found = planned(capsys, "--config", "configs/study.yaml", *asked, "--gpus", "H100")
    names = [(stage["stage"], stage["times"]) for stage in found["stages"]]
    shared = [(name, 1) for name in STAGES[:4]]
    assert names == [*shared, *[("ppo", 2), ("eval", 2)] * 2, ("report", 1)]
    assert "the matrix of the study: 36 reward models, 4 policies" in found["assumptions"]
    whole = sum(s["times"] * (s["seconds"] + s["seconds_before"]) for s in found["stages"])
    assert found["seconds"] == pytest.approx(whole, rel=1e-3)


def test_policies_against_ensembles_score_with_all_members(capsys):
    options = ("study.ppo_ensembles=[mean, min]", "study.ppo_variants=[bt]", "study.ppo_seeds=1", "study.kl_sweep=[]")
    found = planned(capsys, "--config", "configs/study.yaml", *options, "ppo.steps=5000", "--gpus", "H100")
    alone, ensembles = (s for s in found["stages"] if s["stage"] == "ppo")
    assert (alone["times"], ensembles["times"]) == (1, 2)
    assert ensembles["seconds_of_phases"]["score"] == pytest.approx(3 * alone["seconds_of_phases"]["score"], rel=0.01)
    assert ensembles["memory_parts"]["proxies"] == pytest.approx(3 * alone["memory_parts"]["proxies"])


def test_policies_at_once_share_the_gpus(capsys):
    asked = ["--config", "configs/study.yaml", "ppo.minibatches=1", "ppo.rollouts=64", "--gpus", "8xH100"]
    of = lambda n: planned(capsys, *asked, f"study.policies_at_once={n}")  # noqa: E731
    alone, four = of(1), of(4)
    ppo = [(a, b) for a, b in zip(alone["stages"], four["stages"], strict=True) if a["stage"] == "ppo"]
    assert ppo and all((a["ranks"], b["ranks"], a["at_once"], b["at_once"]) == (8, 2, 1, 4) for a, b in ppo)
    total = lambda plan: sum((s["seconds"] + s["seconds_before"]) * s["times"] / s["at_once"] for s in plan["stages"])  # noqa: E731
    assert four["seconds"] == pytest.approx(total(four), rel=0.01) and four["seconds"] < alone["seconds"]


def test_peaks_by_hand():
    """One H100: 0.45 of 989 TFLOP/s forward, 150 us a layer at least; two: a gather of 2 bytes a parameter besides."""
    shape = shape_of_config(_wide(), "wide", "test")
    rates = FromPeaks(GPUS["H100"], ON_GPU, "")
    flops = 2 * (4 * 4096**2 + 3 * 4096 * 8192) + 4 * 4096 * 512
    large = Pass(shape, 10, 16384, 512, 3)
    assert rates.seconds(large) == pytest.approx(10 * 16384 * 3 * flops / (0.45 * 989e12))
    assert rates.seconds(Pass(shape, 10, 16, 16, 3)) == pytest.approx(10 * 3 * 150e-6)
    sharded = Pass(shape, 10, 16384, 512, 3, zero=3, ranks=2)
    gather = 10 * 3 * shape.layer_params * 2 / 2 / (0.6 * 450e9)
    assert rates.seconds(sharded) == pytest.approx(rates.seconds(large) + gather)
    assert rates.seconds(Update(1, 1e9, 3, 8)) == pytest.approx(1e9 / 8 * 28 / (0.6 * 3.35e12))


def _wide():
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=64, hidden_size=4096, intermediate_size=8192, num_hidden_layers=3,
                       num_attention_heads=32, num_key_value_heads=32)  # fmt: skip


FOUND = {
    "ranks": 2, "update": {"3": 2e-9}, "starts": {"process": 5.0, "engine": 3.0}, "samples": [],
    "passes": [{"kind": kind, "zero": 3, "rows": r, "length": n, "layers": layers,
                "seconds": layers * (0.001 + 1e-5 * r * n)}
               for kind in ("forward", "weights") for r, n in ((2, 96), (8, 96), (8, 384)) for layers in (2, 8)],
    "logits": [{"kind": "backward", "tokens": n, "seconds": 0.2 + 0.001 * n} for n in (8, 384)],
    "gather": {"3": 1e-6},
}  # fmt: skip


def test_measured_rates_are_used_for_what_was_measured():
    shape = tiny_shape()
    rates = measured.Measured({2: FOUND}, "measured", shape, FromPeaks(GPUS["H100"], ON_GPU, ""))
    work = Pass(shape, 5, 400, 100, 4, "weights", 3, 2)
    assert rates.seconds(work) == pytest.approx(5 * 4 * (0.001 + 1e-5 * 400), rel=1e-3)
    whole = 2 * shape.head_params * 1e-6  # gathered forward and backward
    assert rates.seconds(Logits(shape, 2, 100, True, zero=3, ranks=2)) == pytest.approx(2 * (0.3 + whole), rel=1e-3)
    assert rates.seconds(Logits(shape, 2, 100, True, zero=2, ranks=2)) == pytest.approx(2 * 0.3, rel=1e-3)
    assert rates.seconds(Update(3, 1e6, 3, 2)) == pytest.approx(3 * 1e6 * 2e-9)
    assert rates.seconds(Start("engine", 2, 2)) == 6 and rates.seconds(Fixed(4.0, "")) == 4
    assert not rates.missing
    rates.seconds(Pass(shape, 5, 400, 100, 4, "lora", 3, 2))
    assert rates.missing == {"pass on 2 ranks"}


def test_a_wider_model_is_scaled_and_said_to_be():
    shape, wide = tiny_shape(), tiny_shape(hidden_size=64, intermediate_size=96)
    rates = measured.Measured({2: FOUND}, "measured", shape, FromPeaks(GPUS["H100"], ON_GPU, ""))
    one, other = (rates.seconds(Pass(s, 1, 400, 100, 4, "weights", 3, 2)) for s in (shape, wide))
    assert other / one == pytest.approx(wide.linear_params / shape.linear_params)
    assert rates.scaled == {"tiny"}


def test_the_cache_is_keyed_by_what_a_measurement_depends_on(monkeypatch):
    offline = load(["configs/offline.yaml"], [])
    smoke = load(["configs/smoke.yaml"], [])
    key = measured.cache_key(offline)
    assert measured.cache_key(smoke) == key, "sizes of a run do not matter"
    dtypes = [load(["configs/offline.yaml"], [f"engine.dtype={dtype}"]) for dtype in ("float32", "bfloat16")]
    assert measured.cache_key(dtypes[0]) != measured.cache_key(dtypes[1])  # one of them is this machine's default
    assert measured.cache_key(load(["configs/offline.yaml"], ["policy.path=models/all-MiniLM-L6-v2"])) != key
    monkeypatch.setattr(measured, "package_versions", lambda: {"torch": "1"})
    assert measured.cache_key(offline) != key
    monkeypatch.undo()
    here = measured.machine()
    monkeypatch.setattr(measured, "machine", lambda: here | {"cores": 64})
    assert measured.cache_key(offline) != key


def test_engines_of_other_zero_stages_are_measured_by_themselves(tmp_path):
    cfg = load(["configs/offline.yaml"], ["engine.zero_stage=2"])
    assert groups(cfg, {"rm": 2, "ppo": 2}) == {"1": (1, False), "2 ranks, zero 2": (2, True)}
    other = load(["configs/offline.yaml"], ["ppo.engine.zero_stage=0", "rm.engine.zero_stage=3"])
    assert groups(other, {"rm": 2, "ppo": 2}) == {"1": (1, False), "2 ranks, zero 0, 3": (2, True)}
    divided = {"1": (1, False), "4 processes": (4, False), "2 ranks, zero 2": (2, True)}
    assert groups(cfg, {"rm": 2, "ppo": 2, "bon": 2, "eval": 4}) == divided
    assert groups(other, {"rm": 1, "ppo": 2}) == {"1 ranks, zero 3": (1, True), "2 ranks, zero 0": (2, True)}
    file = tmp_path / "kept.json"
    write_json(file, {"groups": {"1": {"ranks": 1}}, "code": {"git_sha": "abc"}, "load": 0.1})
    found, absent, (remark,) = measured.read(file, ["1", "2 ranks, zero 3"])
    assert (found, absent) == ({1: {"ranks": 1}}, ["2 ranks, zero 3"])
    assert "the code was abc then" in remark and "load" not in remark


def test_a_busy_machine_is_remarked_on(tmp_path):
    file = tmp_path / "kept.json"
    write_json(file, {"groups": {"1": {"ranks": 1}}, "code": code_version(), "load": 1000})
    assert measured.read(file, ["1"])[2] == ["other work ran on the machine meanwhile (load 1000): --measure again"]
    write_json(file, {"groups": {"1": {"ranks": 1}}, "code": code_version(), "load": 0.1})
    assert not measured.read(file, ["1"])[2]


def test_curves_need_a_measurement(capsys, tmp_path):
    assert main(["plan", "--config", "configs/offline.yaml", "--curves", str(tmp_path)]) == 2
    assert "--measure first" in capsys.readouterr().err


def test_predicted_beside_actual(capsys, tmp_path):
    run = tmp_path / "runs" / "gemma-2b"
    write_json(
        run / "rm" / "manifest.json",
        {"outputs": [], "seconds": 50.0, "metrics": {"variants": {"grm": {"seconds": 20.0}}}},
    )
    (run / "ppo").mkdir()
    (run / "ppo" / "metrics.jsonl").write_text('{"step": 1, "seconds_train": 3.0, "seconds_generate": 2.0}\n')
    write_json(run / "ppo" / "manifest.json", {"outputs": [], "seconds": 9.0, "metrics": {}})
    assert main(["plan", *GEMMA, "--gpus", "8xH100", "--check", str(run)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    actual = {" ".join(line[:-3]): line[-2] for line in lines[1:]}
    assert actual["rm"] == "50.0" and actual["variants, without start"] == "20.0"
    assert (actual["train"], actual["generate"], actual["start and save"]) == ("3.0", "2.0", "4.0")
    assert actual["all"] == "59.0" and "bon" not in actual


def test_responses_are_cut_where_the_configuration_cuts_them():
    cfg = load(["configs/gemma-2b.yaml"], ["generation.max_new_tokens=10"])
    found = lengths_of(cfg, None, [4, 8, 20, 40])
    assert found.response_tokens == (4 + 8 + 10 + 10) / 4 and list(found.response_draws) == [4, 8, 10, 10]


def test_prompts_are_counted_where_they_can_be_read(policy_path, tmp_path):
    found = lengths_of(load(["configs/offline.yaml"], []), None, None)
    assert sum(found.prompts.values()) == len(found.prompt_draws) == 1519
    assert found.prompt_tokens == pytest.approx(sum(found.prompt_draws) / 1519)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n' * 1000)
    elsewhere = load(["configs/gemma-2b.yaml"], [f"data.prompts={tmp_path / 'prompts.jsonl'}"])
    assumed = lengths_of(elsewhere, None, None)
    assert sum(assumed.prompts.values()) == 1000 and assumed.prompt_tokens == 256
    assert any("assumed: 0.5 of data.max_prompt_tokens" in note for note in assumed.notes)


def test_more_ranks_need_less_memory_and_more_steps_more_time():
    cfg = load(["configs/gemma-2b.yaml"], [])
    found = {}
    for gpus in ("1xH100", "8xH100"):
        where: Where = on_gpus(cfg, gpus)
        found[gpus] = of_configuration(cfg, lengths_of(cfg, None, None), where, None).stages[4]
    assert found["8xH100"].memory.total < found["1xH100"].memory.total
    longer = load(["configs/gemma-2b.yaml"], ["ppo.steps=160"])
    twice = of_configuration(longer, lengths_of(longer, None, None), on_gpus(longer, "8xH100"), None).stages[4]
    assert twice.phases["train"] == pytest.approx(2 * found["8xH100"].phases["train"])
