"""Averaged reward models: the numbers, the calibration, and what must not be averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from core.files import write_json, write_table
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.checkpoints import CHATS, edit_json, read, write_full
from tests.builders.command_line import grm
from tests.builders.reward_models import nudged, tiny_reward_model


def saved(model: RewardModel, folder: Path) -> Path:
    save_reward_model(folder, model, named_weights(model.lm), model.head.state_dict())
    return folder


@pytest.fixture(scope="module")
def members(tokenizer_path, tmp_path_factory) -> list[Path]:
    model, folder = tiny_reward_model(tokenizer_path, "mlp"), tmp_path_factory.mktemp("members")
    return [saved(nudged(model, seed), folder / f"seed-{seed}") for seed in (1, 2, 3)]


def command(*arguments: object) -> int:
    return grm("rm-merge", *arguments)


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f}:{k}": t for f in ("model", "head") for k, t in load_file(folder / f"{f}.safetensors").items()}


def test_every_weight_is_the_weighted_mean(members, tmp_path, capsys):
    assert command(tmp_path / "even", *members) == 0
    text = capsys.readouterr().out
    assert "mean 0 and std 1 are written" in text and "--calibrate" in text and "WARM assumes heads" not in text
    assert command(tmp_path / "uneven", *members, "--weights", "2,1,1") == 0
    parts = [files(folder) for folder in members]
    for name, shares in (("even", (1 / 3, 1 / 3, 1 / 3)), ("uneven", (0.5, 0.25, 0.25))):
        found = files(tmp_path / name)
        assert found.keys() == parts[0].keys() and {t.dtype for t in found.values()} == {torch.float32}
        for key, tensor in found.items():
            expected = sum(w * part[key].double() for w, part in zip(shares, parts, strict=True))
            torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)
    model, about = read(tmp_path / "uneven"), json.loads((tmp_path / "uneven" / "reward_model.json").read_text())
    assert (model.mean, model.std) == (0.0, 1.0)
    assert about["weights"] == [0.5, 0.25, 0.25] and about["members"] == [str(m) for m in members]
    scores = torch.stack([read(m).score(CHATS) for m in members])
    assert (model.score(CHATS) - (scores.T @ torch.tensor([0.5, 0.25, 0.25]))).abs().max() < scores.std(0).max()


def test_equal_members_give_the_member_to_the_bit_in_its_type(tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "linear")
    model.lm.to(torch.bfloat16)
    folder = saved(model, tmp_path / "rm")
    assert command(tmp_path / "out", folder, folder, folder, "--weights", "0,0.3,0.7") == 0
    found, expected = files(tmp_path / "out"), files(folder)
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)
    assert {t.dtype for k, t in found.items() if k.startswith("model:")} == {torch.bfloat16}


def test_mean_and_std_are_measured_on_samples(members, tmp_path, capsys):
    rows = [{"prompt_id": str(i), "prompt": c[:-1], "response": c[-1]["content"]} for i, c in enumerate(CHATS)]
    write_table(tmp_path / "calibration.parquet", rows)
    assert command(tmp_path / "out", *members, "--calibrate", tmp_path / "calibration.parquet") == 0
    model = read(tmp_path / "out")
    rewards = model.score(CHATS).double()
    assert model.mean == pytest.approx(float(rewards.mean()), abs=1e-5)
    assert model.std == pytest.approx(float(rewards.std(correction=1)), rel=1e-4)
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["calibrated_on"] == 3
    write_table(tmp_path / "one.parquet", rows[:1])
    capsys.readouterr()
    assert command(tmp_path / "no", *members, "--calibrate", tmp_path / "one.parquet") == 2
    assert "1 samples have no standard deviation" in capsys.readouterr().err
    assert command(tmp_path / "no", *members, "--calibrate", tmp_path / "none.parquet") == 2
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_heads_of_other_seeds_are_reported(tokenizer_path, members, tmp_path, capsys):
    other = nudged(tiny_reward_model(tokenizer_path, "mlp"), 5)
    for parameter in other.head.parameters():
        torch.nn.init.normal_(parameter)
    assert command(tmp_path / "out", members[0], saved(other, tmp_path / "rm")) == 0
    assert "WARM assumes heads that started from the same numbers" in capsys.readouterr().out


def test_trunks_that_have_nothing_in_common_are_refused(tokenizer_path, members, tmp_path, capsys):
    other = tiny_reward_model(tokenizer_path, "mlp")
    for parameter in other.lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert command(tmp_path / "out", members[0], saved(other, tmp_path / "rm")) == 2
    assert "not fine-tuned from one model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_members_that_differ_are_refused_by_name(tokenizer_path, members, tmp_path, capsys):
    def refused(folder: Path, message: str) -> None:
        assert command(tmp_path / "out", members[0], folder) == 2
        assert message in capsys.readouterr().err

    refused(saved(tiny_reward_model(tokenizer_path, "linear"), tmp_path / "head"), "head linear, not mlp")
    refused(
        saved(tiny_reward_model(tokenizer_path, "mlp", num_hidden_layers=1), tmp_path / "depth"),
        "num_hidden_layers 1, not 2",
    )
    half = tiny_reward_model(tokenizer_path, "mlp")
    half.lm.to(torch.bfloat16)
    refused(saved(half, tmp_path / "half"), "type bfloat16, not float32")
    model = tiny_reward_model(tokenizer_path, "mlp")
    edit_json(saved(model, tmp_path / "words") / "reward_model.json", tokenizer="0123")
    refused(tmp_path / "words", "tokenizer 0123")
    write_full(tmp_path / "full", AutoTokenizer.from_pretrained(tokenizer_path))
    refused(tmp_path / "full", "rm-export")
    runs = [saved(model, tmp_path / name / "grm") for name in ("a", "b")]
    for folder in runs:
        config = {"rm": {"base": {"path": f"models/{folder.parent.name}"}}}
        write_json(folder.parent / "manifest.json", {"config": config, "outputs": {}})
    assert command(tmp_path / "out", *runs) == 2
    assert "base models/b, not models/a" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["1,2", "1,-1,1", "0,0,0", "a,b,c", "1,nan,1"])
def test_weights_that_do_not_fit_are_refused(members, weights, tmp_path, capsys):
    assert command(tmp_path / "out", *members, f"--weights={weights}") == 2
    assert "--weights" in capsys.readouterr().err
