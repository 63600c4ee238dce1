"""Tables of rollouts: what a row says of its response, how many are kept, and what a resumed run does with them."""

import numpy as np
import pytest
import torch

from core.data.rows import RolloutRow
from core.files import read_table
from ppo.measured.rollouts import FOLDER, RolloutTables, completed, tables
from ppo.records import Rollout
from tests.builders.ppo_tables import PPO, learner, micro


def sampled(lengths: list[int], step: int = 1) -> list[dict]:
    """What `ppo.rollout` knows of responses of these lengths."""
    return [
        {
            "step": step, "policy": step - 1, "prompt_id": f"p{i}", "finished": i % 2 == 0, "n_tokens": n,
            "prompt": [{"role": "user", "content": f"Why {i}?"}], "response": f"answer {i}", "proxy": float(i),
            "token_ids": np.arange(n, dtype=np.int32), "sampler_logprobs": np.full(n, -1.0, np.float32),
        }
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def rollout() -> Rollout:
    """Five responses in two micro-batches that do not hold them in the order in which they were sampled."""
    lengths = [3, 1, 6, 2, 4]
    parts = [[4, 0, 2], [3, 1]]
    micros = []
    for k, part in enumerate(parts):
        m = micro([lengths[i] for i in part], [float(i) for i in part], seed=k)
        m.rows = torch.tensor(part)
        for name, factor in (("logprobs", 1.0), ("ref_logprobs", 2.0)):  # -1 - number - token / 10, and twice that
            number, token = m.rows[:, None], torch.arange(m.is_response.shape[1])
            setattr(m, name, torch.where(m.is_response, factor * (-1 - number - token / 10), torch.nan))
        m.critic_outputs = torch.zeros(m.is_response.shape)
        micros.append(m)
    return Rollout([micros[:1], micros[1:]], sampled(lengths), policy=0, behind=0)


def test_a_row_has_what_was_computed_of_its_response(tmp_path):
    made = rollout()
    learner(PPO.model_copy(update={"whiten_advantages": False})).advantages(made.micros, 0.0)
    RolloutTables(tmp_path, 1.0).write(1, completed(made))
    rows = read_table(tables(tmp_path / FOLDER)[1], RolloutRow)
    assert [row["prompt_id"] for row in rows] == [f"p{i}" for i in range(5)]
    for i, row in enumerate(rows):
        n = row["n_tokens"]
        expected = [-1 - i - t / 10 for t in range(n)]
        assert row["logprobs"] == pytest.approx(expected) and row["token_ids"] == list(range(n))
        assert row["ref_logprobs"] == pytest.approx([2 * x for x in expected])
        assert row["proxy"] == row["reward"] == i
        # Without a critic's values, GAE is lam^(steps to the end) * reward.
        advantages = [i * PPO.lam ** (n - 1 - t) for t in range(n)]
        found = [row["advantage_min"], row["advantage_mean"], row["advantage_max"]]
        assert found == pytest.approx([min(advantages), sum(advantages) / n, max(advantages)])


def test_the_oldest_tables_make_room_and_the_last_one_stays(tmp_path):
    rows = completed(advantaged())
    RolloutTables(tmp_path / "all", 10.0).write(1, rows)
    size = tables(tmp_path / "all" / FOLDER)[1].stat().st_size
    kept = RolloutTables(tmp_path, 3.5 * size / (1 << 20))
    for step in range(1, 7):
        kept.write(step, rows)
    assert list(tables(tmp_path / FOLDER)) == [4, 5, 6]
    tight = RolloutTables(tmp_path / "tight", 0.5 * size / (1 << 20))
    tight.write(1, rows)
    tight.write(2, rows)
    assert list(tables(tmp_path / "tight" / FOLDER)) == [2]
    assert not RolloutTables(tmp_path, 0).are_kept


def test_a_run_that_is_resumed_writes_its_steps_again(tmp_path):
    kept, rows = RolloutTables(tmp_path, 10.0), completed(advantaged())
    for step in (9, 10, 11, 12):
        kept.write(step, rows)
    kept.forget_after(10)
    assert list(tables(tmp_path / FOLDER)) == [9, 10]


def advantaged() -> Rollout:
    made = rollout()
    learner(PPO).advantages(made.micros, 0.0)
    return made
