"""The probes for real, on four layers of the real model: what they leave suffices for a plan of every stage."""

import pytest

from core.config.load import load
from core.files import read_json
from pipelines.plan import measured
from pipelines.plan.curves import passes, write_curves
from pipelines.plan.lengths import lengths_of
from pipelines.plan.measure import groups, measure
from pipelines.plan.plan import Where, as_json, make_plan
from pipelines.plan.rates import rough
from pipelines.plan.shapes import shape_of

pytestmark = pytest.mark.slow
RANKS = {"rm": 2, "ppo": 2}


@pytest.fixture(scope="module")
def kept(small_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    overrides = [f"policy.path={small_policy}", f"rm.base.path={small_policy}", "ppo.lora.top_layers=2",
                 "ppo.critic_trainable_layers=2", "rm.trainable_layers=2", f"run.dir={folder}"]  # fmt: skip
    cfg = load(["configs/offline.yaml"], overrides)
    file = measured.cache_file(cfg, folder)
    measure(cfg, file, groups(cfg, RANKS))
    return cfg, file


def test_a_plan_rests_on_measured_rates_alone(kept):
    cfg, file = kept
    found, absent, _ = measured.read(file, list(groups(cfg, RANKS)))
    rates = measured.Measured(found, "measured", shape_of(cfg.policy), rough("float32", measure=False))
    sampled, most = rates.responses
    assert not absent and most >= cfg.generation.max_new_tokens and max(sampled) <= most
    plan = make_plan(cfg, lengths_of(cfg, None, sampled), Where(rates, RANKS, 2**35))
    assert not rates.missing and not rates.scaled
    stages = {stage["stage"]: stage for stage in as_json(plan)["stages"]}
    assert all(stage["seconds"] > 0 and stage["seconds_before"] > 0 for stage in stages.values())
    work = {name: n for name, n in stages["ppo"]["seconds_of_phases"].items() if name != "save"}
    assert all(seconds > 0 for seconds in work.values()), work


def test_curves_show_every_point(kept, tmp_path):
    _, file = kept
    write_curves(file, tmp_path)
    table, points = (tmp_path / "cost-curves.md").read_text(), passes(read_json(file))
    assert (tmp_path / "images" / "cost-curves.png").stat().st_size > 10_000
    assert table.count("\n| ") > len(points) and {p["ranks"] for p in points} == {1, 2}
    assert {(p["kind"], p["zero"]) for p in points} >= {("forward", None), ("weights", 2), ("lora", 2)}
