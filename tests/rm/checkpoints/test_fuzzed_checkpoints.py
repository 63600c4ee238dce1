"""Checkpoints with odd and damaged files: read, or refused with the name of the folder or file."""

import json
import shutil
from collections import Counter

import pytest

from core.config import Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError, ConfigError, DataError
from core.models.loading import load_causal_lm
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.inputs.fuzz import cases, damaged, mutated
from tests.builders.policies import tiny_policy

TREES = ("config.json", "reward_model.json", "tokenizer_config.json")
FILES = (*TREES, "model.safetensors", "head.safetensors", "tokenizer.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def whole(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    policy = Model(path=str(tiny_policy("llama", tokenizer_path, folder / "policy")))
    model = RewardModel(load_causal_lm(policy, dtype="float32"), "mlp", ChatTokenizer(policy), std=0.1)
    save_reward_model(folder / "rm", model, model.lm.named_parameters(), model.head.state_dict())
    return folder / "rm"


def outcome(folder, name: str) -> str:
    try:
        RewardModel.from_pretrained(folder, dtype="float32")
    except (ArtefactError, ConfigError, DataError) as error:
        assert str(folder) in str(error), f"{name}: {error}"
        return "refused"
    return "read"


@pytest.mark.parametrize("name", TREES)
def test_odd_values_in_json(whole, tmp_path, name):
    outcomes = Counter()
    for case, rng in enumerate(cases(name, 40)):
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder)
        tree = json.loads((folder / name).read_text())
        for _ in range(rng.randrange(1, 4)):
            tree = mutated(rng, tree)
        (folder / name).write_text(json.dumps(tree))
        outcomes[outcome(folder, name)] += 1
        shutil.rmtree(folder)
    assert outcomes["refused"] and outcomes["read"]


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(whole, tmp_path, name):
    for case, rng in enumerate(cases(f"damaged {name}", 12)):
        folder = tmp_path / str(case)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(damaged(rng, (folder / name).read_bytes()))
        outcome(folder, name)
        shutil.rmtree(folder)
