"""Scoring the pools by many reward models: layers they share run once, and change no reward."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bon.scores import SharedLayers, put_together, score_proxies
from core.config import Model
from core.data.chat import ChatTokenizer, conversation
from core.files import read_table
from core.generation.pool import SampledPool
from core.models.loading import load_causal_lm
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.checkpoints import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def where(tokenizer_path, tmp_path_factory) -> Model:
    """A base of six layers: what is shared does not depend on what they compute."""
    tokenizer, folder = AutoTokenizer.from_pretrained(tokenizer_path), tmp_path_factory.mktemp("scores") / "base"
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config(tokenizer, num_hidden_layers=6)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(path=str(folder))


def test_shared_layers_change_no_reward(where, tmp_path):
    samples = [
        {"prompt_id": p, "sample_id": k, "prompt": [{"role": "user", "content": p}], "response": f"It is {k} {p}."}
        for p in ("one", "another question") for k in range(3)
    ]  # fmt: skip
    conversations, models = [conversation(s["prompt"], s["response"]) for s in samples], {}
    for seed, name in enumerate(("a", "b", "other")):
        torch.manual_seed(seed)
        model = RewardModel(load_causal_lm(where, dtype="float32", num_layers=4), "mlp", ChatTokenizer(where), std=2.0)
        changed = model.lm.base_model.layers[0 if name == "other" else 3]  # "other" shares no layer
        changed.mlp.up_proj.weight.data += 0.01
        changed.mlp.up_proj.weight.data[seed] = 0
        save_reward_model(tmp_path / "rm" / name, model, named_weights(model.lm), model.head.state_dict())
        models[name] = RewardModel.from_pretrained(tmp_path / "rm" / name)
    shared = SharedLayers.of(models["a"], models["b"], samples)
    assert shared.cache.layers.depth == 3 and shared.fits(models["b"]) and not shared.fits(models["other"])
    pool = SampledPool(tmp_path / "samples.parquet", 1, {0: samples})
    names = score_proxies(tmp_path / "rm", pool, tmp_path)
    put_together([tmp_path / "scores" / f"{name}.parquet" for name in names], pool, title="bon")
    for name, model in models.items():
        found = [r["score"] for r in read_table(tmp_path / "scores" / f"{name}.parquet")]
        assert torch.equal(torch.tensor(found), model.score(conversations))
        assert name in names and len(set(found)) == len(samples)


def test_pools_are_scored_alike_with_reward_models_of_several_sizes(where, tmp_path):
    samples = [
        {"prompt_id": p, "sample_id": k, "prompt": [{"role": "user", "content": p}], "response": f"It is {k} {p}."}
        for p in ("one", "another question") for k in range(3)
    ]  # fmt: skip
    expected = {}
    for seed, (name, layers) in enumerate((("a", 4), ("b", 6), ("c", 4), ("d", 6))):  # sizes alternate by name
        torch.manual_seed(seed)
        lm = load_causal_lm(where, dtype="float32", num_layers=layers)
        model = RewardModel(lm, "mlp", ChatTokenizer(where))
        lm.model.layers[-1].mlp.up_proj.weight.data[seed] = 0
        save_reward_model(tmp_path / "rm" / name, model, named_weights(lm), model.head.state_dict())
        loaded = RewardModel.from_pretrained(tmp_path / "rm" / name)
        assert len(loaded.lm.model.layers) == layers
        expected[name] = loaded.score([conversation(s["prompt"], s["response"]) for s in samples])
    pool = SampledPool(tmp_path / "samples.parquet", 1, {0: samples})
    names = score_proxies(tmp_path / "rm", pool, tmp_path)
    put_together([tmp_path / "scores" / f"{name}.parquet" for name in names], pool, title="bon")
    for name, rewards in expected.items():
        found = [r["score"] for r in read_table(tmp_path / "scores" / f"{name}.parquet")]
        assert torch.equal(torch.tensor(found), rewards), name
    assert len({tuple(rewards.tolist()) for rewards in expected.values()}) == 4
