"""Which policies a run keeps."""

import json

from ppo.keep import PolicyKeeper


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
