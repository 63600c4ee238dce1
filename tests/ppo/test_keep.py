"""Which policies a run keeps."""

import json

import pytest
import torch
from safetensors.torch import load_file

from core.files import read_rows
from ppo.keep import PolicyKeeper, Spacing
from tests.builders.processes import run_program


def run(out, keep, scores: dict[int, float], every=1) -> list[int]:
    keeper = PolicyKeeper(out, keep)
    for step, score in scores.items():
        if step % every == 0:
            keeper.folder(step).mkdir(parents=True, exist_ok=True)
        keeper.scored(step, score)
    return sorted(int(p.name[5:]) for p in (out / "checkpoints").iterdir())


def test_the_last_two_and_the_best(tmp_path):
    assert run(tmp_path, 2, {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.5, 5: 0.3}) == [2, 4, 5]
    assert json.loads((tmp_path / "policies.json").read_text()) == {"2": 0.9, "4": 0.5, "5": 0.3}


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_best_is_kept_where_scores_come_steps_later(tmp_path, ahead):
    """With `ppo.overlap` a policy is scored when its rollout is back, and until then must not be deleted."""
    keeper, scores = PolicyKeeper(tmp_path, 1), {step: 1.0 - 0.01 * step for step in range(1, 13)} | {4: 9.0}
    for step in range(1, 13):
        keeper.folder(step).mkdir(parents=True)
        if step > ahead:
            keeper.scored(step - ahead, scores[step - ahead])
    left = {int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir()}
    assert left == {4, *range(13 - ahead, 13)}
    assert json.loads((tmp_path / "policies.json").read_text())["4"] == 9.0


def test_all_are_kept_by_default(tmp_path):
    assert run(tmp_path, None, {1: 0.1, 2: 0.9, 3: 0.4}) == [1, 2, 3]


def test_steps_that_left_no_policy_have_no_score(tmp_path):
    assert run(tmp_path, 1, {1: 5.0, 2: 0.1, 3: 5.0, 4: 0.2}, every=2) == [4]


def test_a_resumed_run_records_its_steps_again(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.4}
    run(tmp_path / "a", 1, scores)
    run(tmp_path / "b", 1, scores)
    assert run(tmp_path / "b", 1, {3: 0.4}) == [2, 3]
    assert (tmp_path / "a" / "policies.json").read_text() == (tmp_path / "b" / "policies.json").read_text()


def kept(every: int, nats: float | None, kls: list[float], forget_at: int | None = None) -> list[int]:
    """Steps whose policy is saved, where `kls[k]` is the KL of the policy after step k, known in step k + 1."""
    spacing, found = Spacing(every, nats), set()
    for step in range(1, len(kls) + 1):
        if step == forget_at:  # a run that is stopped here, and resumed with its state
            state, spacing = spacing.state_dict(), Spacing(every, nats)
            spacing.load_state_dict(json.loads(json.dumps(state)))
        if spacing.measured(step - 1, kls[step - 1]):
            found.add(step - 1)
        if spacing.after(step):
            found.add(step)
    return sorted(found)


def test_policies_are_saved_where_the_kl_has_moved():
    """Fast at first, then slow, then back: 0 is the reference, which needs no saving."""
    kls = [0.0, 0.5, 2.5, 3.0, 4.4, 4.6, 8.0, 8.5, 9.0, 9.5, 5.9, 7.0]
    assert kept(100, 2.0, kls) == [2, 5, 6, 10]
    assert kept(100, None, kls) == [] and kept(4, None, kls) == [4, 8, 12]
    # A policy that is saved for its step counts: from 4.4 on it is 8.0 that has moved, and from 9.0 on 5.9.
    assert kept(4, 2.0, kls) == [2, 4, 6, 8, 10, 12]
    assert all(kept(4, 2.0, kls, forget_at=step) == kept(4, 2.0, kls) for step in range(2, 12))


def test_policies_that_a_resumed_run_may_not_come_to_are_deleted(tmp_path):
    keeper = PolicyKeeper(tmp_path, None)
    keeper.forget_after(0)  # nothing is there yet
    for step in (2, 4, 5, 11):
        keeper.folder(step).mkdir(parents=True)
    keeper.forget_after(4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0002", "step-0004"]


@pytest.mark.long
def test_a_run_keeps_the_policies_whose_kl_was_measured(small_policy, tmp_path):
    """Real vLLM, two ZeRO-3 ranks, resumed once: the steps are those of the KLs in metrics.jsonl, worked out here, and
    each folder holds the weights after its step, not those after the step in which its KL was known."""
    nats = 0.5
    run_program("tests/programs/ppo_kept_by_kl.py", small_policy, tmp_path, nats, ranks=2)
    assert json.loads((tmp_path / "found.json").read_text()) == {"first": 1, "again": 3}
    rows = read_rows(tmp_path / "ppo" / "metrics.jsonl")
    kl = {row["step"] - 1: row["kl_nats_per_response"] for row in rows}
    expected, last = {4, 8}, 0.0
    for step in range(1, 8):
        if step in expected or abs(kl[step] - last) >= nats:
            expected.add(step)
            last = kl[step]
    folders = {int(p.name[5:]): p for p in (tmp_path / "ppo" / "checkpoints").iterdir()}
    assert folders.keys() == expected and len(expected) > 2
    assert not (tmp_path / "ppo" / "checkpoints" / "step-0007" / "lost").exists()
    weights = load_file(tmp_path / "weights.safetensors")
    for step in expected & {int(name) for name in weights}:
        saved = load_file(folders[step] / "adapter_model.safetensors")
        assert any(
            torch.equal(weights[str(step)], w.float()) for w in saved.values() if w.shape == weights[str(step)].shape
        )
        assert step == 8 or not any(torch.equal(weights[str(step + 1)], w.float()) for w in saved.values())
