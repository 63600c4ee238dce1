"""Dynamic sampling: which prompts a step trains on, and which are tried in their place."""

import pytest
import torch

from core.config import Ppo
from core.generation.local import Completion
from ppo.methods.dynamic import Scored, chosen, facts, is_enough, more_prompts
from ppo.records import Sampled
from ppo.rollout import Collector

K = 2


def scored(round_: int, rewards: list[list[float]]) -> Scored:
    """Two responses to each prompt, with texts that name round, prompt and response."""
    prompts = [f"{round_}{p}" for p in range(len(rewards))]
    rows = [{"prompt_id": name} for name in prompts for _ in range(K)]
    done = [Completion([1], [0.0], f"{name}-{i}", True) for name in prompts for i in range(K)]
    sampled = Sampled(rows, [[int(name)] for name in prompts for _ in range(K)], 4,
                      [p for p in range(len(prompts)) for _ in range(K)], done)  # fmt: skip
    flat = torch.tensor(rewards).flatten()
    return Scored(sampled, flat, {"function": flat / 2})


def test_prompts_whose_samples_differ_come_first_and_the_batch_keeps_its_size():
    rounds = [scored(1, [[1, 1], [0, 1], [0, 0]]), scored(2, [[0, 0], [1, 0], [0, 1]])]
    found = chosen(rounds, K)
    assert [c.text for c in found.sampled.completions] == ["11-0", "11-1", "21-0", "21-1", "22-0", "22-1"]
    assert found.rewards.tolist() == [0, 1, 1, 0, 0, 1] and found.parts["function"].tolist() == [0, 0.5, 0.5, 0, 0, 0.5]
    assert found.sampled.groups == [0, 0, 1, 1, 2, 2] and found.sampled.policy == 4
    assert [row["prompt_id"] for row in found.sampled.rows] == ["11", "11", "21", "21", "22", "22"]
    assert found.sampled.prompts == [[11], [11], [21], [21], [22], [22]]
    assert is_enough(rounds, K) and not is_enough(rounds[:1], K)
    assert facts(rounds, K) == {"sampling_rounds": 2.0, "varied_share": 0.5}


def test_where_too_few_differ_the_first_ones_fill_the_batch():
    found = chosen([scored(1, [[1, 1], [0, 1], [0, 0]]), scored(2, [[0, 0], [1, 1], [1, 1]])], K)
    assert [c.text for c in found.sampled.completions] == ["11-0", "11-1", "10-0", "10-1", "12-0", "12-1"]


def test_nothing_is_changed_where_all_differ():
    one = scored(1, [[1, 2], [0, 1], [0, 3]])
    found = chosen([one], K)
    assert found.sampled == one.sampled and torch.equal(found.rewards, one.rewards)


def test_further_prompts_are_others_each_round_until_they_are_used_up():
    rows = [{"prompt_id": f"p{i}"} for i in range(10)]
    used = {"p0", "p1", "p2"}
    rounds = [more_prompts(rows, used, step=5, number=n, count=3, seed=1) for n in (1, 2, 3)]
    assert [len(found) for found in rounds] == [3, 3, 0]  # seven are left: the last one is no whole round
    names = [row["prompt_id"] for found in rounds for row in found]
    assert len(set(names)) == 6 and not used & set(names)
    assert rounds[0] == more_prompts(rows, used, step=5, number=1, count=3, seed=1)
    assert rounds[0] != more_prompts(rows, used, step=6, number=1, count=3, seed=1)


class Judged:
    """A sampler whose first two answers to a prompt differ if its number is even, and a reward that reads them."""

    class tokenizer:
        pad_id, fingerprint = 0, "f"

        @staticmethod
        def prompt_ids(prompt):
            return [int(prompt[0]["content"])]

    def __init__(self):
        self.asked, self.awake = [], True

    def generate(self, prompts, *, n, seed):
        assert self.awake
        self.asked.append([ids[0] for ids in prompts])
        return [[Completion([1], [0.0], str(i * (ids[0] % 2 == 0)), True) for i in range(n)] for ids in prompts]

    def score(self, rows, batches=()):
        assert not self.awake  # on a GPU the reward models have the memory now
        return torch.tensor([float(row["response"]) for row in rows]), {}

    def sleep(self):
        self.awake = False

    def wake(self):
        self.awake = True


def test_a_collector_samples_until_enough_prompts_differ():
    """In at most as many rounds as it may."""
    prompts = [{"prompt_id": f"p{i}", "prompt": [{"role": "user", "content": str(i)}]} for i in range(40)]
    for most in (2, 4):
        ppo = Ppo(estimator="rloo", samples_per_prompt=K, rollouts=16, micro_batch=8, dynamic_sampling=most)
        judged = Judged()
        collector = Collector(ppo, None, None, judged, None, judged, prompts=prompts, seed=1)
        found, told = collector._sample_and_score(3)
        count = sum(number % 2 == 0 for asked in judged.asked for number in asked)
        assert len(judged.asked) == told["sampling_rounds"] <= most and judged.awake
        assert told["varied_share"] == pytest.approx(count / sum(map(len, judged.asked)))
        even = [row["prompt_id"] for row in found.sampled.rows if int(row["prompt_id"][1:]) % 2 == 0]
        assert len(found.rewards) == 16 and len(even) == K * min(8, count)
        assert len(set(sum(judged.asked, []))) == len(sum(judged.asked, []))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "gae"}, "is for rloo, grpo and dr_grpo, not for estimator gae"),
        ({"estimator": "rloo", "samples_per_prompt": 2, "overlap": True, "vllm_servers": ("http://a:1",)},
         "dynamic_sampling and overlap exclude each other"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ppo(dynamic_sampling=3, **options)
