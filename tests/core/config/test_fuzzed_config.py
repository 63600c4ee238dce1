"""Configurations of every kind of mistake: one message with the faults, never a traceback."""

import json

import pytest
import yaml

from core.config import Config
from core.config.fields import all_fields
from core.config.load import load
from core.errors import ConfigError
from tests.builders.inputs.fuzz import TEXTS, cases, damaged, mutated, value
from tests.builders.processes import ROOT

KEYS = [field.key.replace("*", "grm") for field in all_fields()]


def outcome(files, overrides=()) -> str:
    try:
        load(files, overrides)
    except ConfigError as error:
        assert str(error).strip()
        return "refused"
    return "loaded"


def seen(outcomes: list[str]) -> None:
    assert {"refused", "loaded"} == set(outcomes), "the cases are all of one kind"


def test_trees_with_wrong_places(tmp_path):
    whole, file, outcomes = Config().model_dump(mode="json"), tmp_path / "a.yaml", []
    for rng in cases("trees", 50):
        tree = {key: whole[key] for key in rng.sample(sorted(whole), 3)}
        for _ in range(rng.randrange(1, 4)):
            tree = mutated(rng, tree)
        file.write_text(json.dumps(tree), encoding="utf-8")
        outcomes.append(outcome([file]))
    seen(outcomes)


@pytest.mark.parametrize("name", ["smoke", "gold"])
def test_damaged_files(tmp_path, name):
    content, file, outcomes = (ROOT / "configs" / f"{name}.yaml").read_bytes(), tmp_path / "a.yaml", []
    for rng in cases(name, 20):
        file.write_bytes(damaged(rng, content))
        outcomes.append(outcome([file]))
    seen(outcomes)


def test_overrides(tmp_path):
    outcomes = []
    for rng in cases("overrides", 80):
        key = rng.choice(KEYS) if rng.randrange(4) else rng.choice((*TEXTS, "ppo.", ".a", "rm.variants.x", "run"))
        text = rng.choice((*TEXTS, str(value(rng)), json.dumps(value(rng)), yaml.safe_dump(value(rng, 1)), "&a [*a]"))
        outcomes.append(outcome([], [f"{key}={text}"]))
    seen(outcomes)
