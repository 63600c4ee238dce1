"""Frozen weights that PPO's models have in memory once: counted, and held by real engines."""

import json

import pytest

from pipelines.plan.memory import memory_of
from pipelines.plan.shapes import shape_of
from tests.builders.plan.sizes import sizes
from tests.builders.planted_pairs import write_base
from tests.builders.processes import run_program
from tests.programs.training.critic_problem import configuration, write_reward_models

TOP = "|ppo.reuse_frozen_layers=true|ppo.lora.top_layers=1|ppo.critic_lora.top_layers=1"
CASES = ["2|same|policy", "1|upper|proxy", "2|upper|proxy" + TOP, "2|all|proxy", "3|same|policy",
         "2|upper|policy|ppo.lora=null|ppo.critic_lora=null|ppo.critic_trainable_layers=1"]  # fmt: skip
TRAINED = {"same": {"trainable_layers": 0}, "upper": {"trainable_layers": 1}, "all": {}}
"""What stage `rm` trained of each reward model."""


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory):
    return write_base(tokenizer_path, tmp_path_factory.mktemp("backbone") / "base")


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    models, out = tmp_path_factory.mktemp("reward-models"), tmp_path_factory.mktemp("held")
    write_reward_models(configuration(base, 2), models)
    run_program("tests/programs/training/shared_backbone.py", base, models, out, *CASES, ranks=1)
    return json.loads((out / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_a_rank_holds(found, base, case):
    stage, proxy, start, *options = case.split("|")
    cfg = configuration(base, int(stage), f"ppo.proxy={proxy}", f"ppo.critic_init={start}", *options)
    engine = {"processes": 1, "dtype": "float32", "zero_stage": int(stage)}
    rm = {"variants": TRAINED, "trainable_layers": None, "lora": None}
    counted = sizes(shape_of(cfg.policy), 1, engine=engine, ppo=cfg.ppo.model_dump(), rm=rm)
    parts = memory_of(counted, "ppo", None).parts
    held = sum(parts.get(name, 0) for name in ("actor", "reference", "critic", "proxies", "frozen layers"))
    trained = 4 * (counted.actor_trained + counted.critic_trained)
    assert held - trained == pytest.approx(found[case]["shared"]["bytes"], rel=0.001)
