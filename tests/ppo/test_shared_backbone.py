"""A critic of adapters, and the one backbone that it shares with policy, reference and reward models."""

import json

import pytest
import torch
from pydantic import ValidationError

from core.config import Lora, Model, Ppo
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.models.shared_weights import SharedWeights
from tests.builders.planted_pairs import write_base
from tests.builders.processes import run_program
from tests.builders.tiny_lm import tiny_lm
from tests.programs.training.critic_problem import configuration, write_reward_models

TOP = "|ppo.reuse_frozen_layers=true|ppo.lora.top_layers=1|ppo.critic_lora.top_layers=1"
TWO = "|ppo.ensemble={members: [adapter-0, adapter-1]}"
WHOLE = "|ppo.lora=null|ppo.critic_lora=null|ppo.critic_trainable_layers=1"
CASES = {
    1: ["0|same|policy", "1|all|proxy", "2|same|proxy", "2|same|policy" + WHOLE, "3|same|policy"],
    2: ["2|same|policy", "1|upper|proxy", "2|upper|proxy" + TOP, "2|adapter-0|policy" + TWO, "3|same|policy",
        "2|same|policy|engine.dtype=bfloat16", "0|upper|policy|engine.gradient_checkpointing=true"],
}  # fmt: skip
RUNS = [(ranks, case) for ranks, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory):
    return write_base(tokenizer_path, tmp_path_factory.mktemp("backbone") / "base")


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    models, runs = tmp_path_factory.mktemp("reward-models"), {}
    write_reward_models(configuration(base, 2), models)
    for ranks, cases in CASES.items():
        out = tmp_path_factory.mktemp("shared")
        run_program("tests/programs/training/shared_backbone.py", base, models, out, *cases, ranks=ranks)
        runs |= {(ranks, case): run for case, run in json.loads((out / "found.json").read_text()).items()}
    return runs


def language_model(base):
    return load_causal_lm(Model(path=str(base)), dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_steps_are_those_of_separate_models(found, ranks, case):
    """Weights after three PPO steps of four updates each: to the bit those of engines with backbones of their own, and
    to rounding those of two copies in plain PyTorch. All that is trained has moved."""
    run = found[ranks, case]
    assert run["equal"] and run["shared"]["moved"] == run["shared"]["trained"] > 10
    if "bfloat16" not in case:
        assert run["from plain"] < 2e-5
    assert run["shared"]["proxy"] == run["shared"]["proxy after"] == run["separate"]["proxy"]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_a_resumed_run_goes_on_the_same(found, ranks, case):
    assert found[ranks, case]["resumed"]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_the_saved_policy_has_its_own_adapter_alone(found, base, ranks, case):
    policy = found[ranks, case]["policy"]
    assert policy["adapter"]
    names = {name for name, _ in language_model(base).named_parameters()}
    assert set(policy["names"]) == names and len(policy["names"]) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_equal_weights_are_in_memory_once(found, base, ranks, case):
    """Bytes of all backbones on a rank, by which layers of which reward model are the policy's."""
    lm, size = language_model(base), 2 if "bfloat16" in case else 4
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    policy, trunk, layer, norm = map(count, (lm, lm.model, lm.model.layers[1], lm.model.norm))
    own, once = (found[ranks, case][name]["bytes"] / size for name in ("separate", "shared"))
    stage, proxy, start = case.split("|")[:3]
    if stage == "3":
        assert once == own
        return
    different = {"same": 0, "upper": layer, "all": trunk, "adapter-0": 0}[proxy]
    if WHOLE in case:  # the reference is the policy as it was; the critic trains a layer and the final norm
        assert once == policy and own == policy + 2 * trunk - layer - norm
        return
    adapters = 0
    if TWO in case:
        lm = add_lora(language_model(base), Lora(rank=4, alpha=32, top_layers=1))
        adapters = 2 * sum(p.numel() for name, p in lm.named_parameters() if "lora_" in name)
    assert once == policy + different + adapters
    apart = (trunk - layer) * (TOP in case)  # embedding, one layer and the final norm, which are run once for all
    assert own == policy + 2 * trunk + adapters + apart


def test_only_equal_frozen_weights_of_one_name_are_shared():
    one, other = tiny_lm(1), tiny_lm(1)
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-6
    other.lm_head.weight.data = other.lm_head.weight.data.double()
    for lm in (one, other):
        lm.requires_grad_(False)
    other.model.norm.weight.requires_grad_(True)
    other.model.layers[0].mlp.up_proj.weight.data.copy_(one.model.layers[1].mlp.up_proj.weight)
    adapted = add_lora(other, Lora(rank=2))
    adapted.base_model.model.model.norm.weight.requires_grad_(True)
    size = sum(p.nbytes for p in one.parameters())
    shared = SharedWeights()
    assert shared.take(one) == 0 == shared.take(one)
    apart = {
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
    }
    theirs = dict(one.named_parameters())
    assert shared.take(adapted) == size - sum(theirs[name].nbytes for name in apart)
    found = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for n, p in adapted.named_parameters() if "lora_" not in n
    }  # fmt: skip
    assert {name for name, p in theirs.items() if found[name] is not p} == apart
    ids = torch.arange(8)[None]
    assert torch.equal(one(ids).logits, tiny_lm(1)(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"critic_lora": {}, "critic_trainable_layers": 2}, "critic_lora and critic_trainable_layers exclude each other"),
     ({"critic_lora": {"dropout": 0.1}}, "critic_lora.dropout 0.1 would make values random")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Ppo(**options)
