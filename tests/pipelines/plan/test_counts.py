"""Counts of the stages against the functions that the stages themselves call."""

import random
from dataclasses import replace

import pytest

from core.batching import by_length_on_ranks, evenly_on_ranks, row_length
from core.config import RewardVariant
from core.generation.local import Completion
from core.shares import Share
from pipelines.plan import pools, training
from pipelines.plan.sizes import Part, batches
from pipelines.plan.work import Judge, Kl, Logits, Pass, Sample, Update
from ppo.records import make_minibatches
from rm.model import UNPADDED_ROW
from rm.pairs import Pair, batch_plan
from rm.score import Limits, _rows
from tests.builders.plan.sizes import lengths, sizes, tiny_shape

RM = {"epochs": 2, "global_batch": 16, "micro_batch": 4, "trainable_layers": 1, "cache_frozen_layers": True}


def of_kind(phases, phase, kind):
    return [item for item in phases[phase] if isinstance(item, kind)]


def test_steps_of_a_reward_model_are_those_of_its_plan():
    found = sizes(rm=RM)
    variant = RewardVariant()
    pairs = [Pair([1], [2], [3])] * found.lengths.pairs["rm_train"]
    assert training.rm_steps(found, variant) == len(batch_plan(pairs, found.cfg.rm, variant, 0))


def test_passes_of_reward_models():
    """Two variants of one seed: the second finds all states of the frozen layers."""
    found = training.rm(sizes(rm=RM))
    steps, micros = 8, 2  # 64 pairs twice in batches of 16; 16 pairs are 2 micro-batches of 4 on each of 2 ranks
    trained = [p for p in of_kind(found, "train", Pass) if p.trained]
    assert [(p.layers, p.calls, p.zero, p.ranks) for p in trained] == [(1, steps * micros, 3, 2)] * 2
    assert trained[0].tokens == 4 * (20 + 2 * 12)
    frozen = [p for p in of_kind(found, "train", Pass) if not p.trained]
    assert [(p.layers, p.calls, p.tokens) for p in frozen] == [(3, 8, 176), (3, 7.5, 176 / 2 / 0.9375)]  # two epochs
    (logits,) = of_kind(found, "train", Logits)  # of `grm`, for the chosen responses
    assert (logits.tokens, logits.calls, logits.backward) == (4 * 12, steps * micros, True)
    assert [u.params for u in of_kind(found, "train", Update)] == [tiny_shape().layer_params] * 2


def test_a_variant_with_epochs_of_its_own():
    """Steps, and orders that fill the cache of frozen states: each seed has one for each epoch."""
    variants = {"four": {"epochs": 4}, "one": {"epochs": 1, "lr": 1e-3}, "other": {"seed": 1}, "five": {"epochs": 5}}
    found = sizes(rm=RM | {"variants": variants})
    pairs = [Pair([1], [2], [3])] * found.lengths.pairs["rm_train"]
    steps = [training.rm_steps(found, v) for v in found.cfg.rm.variants.values()]
    assert steps == [len(batch_plan(pairs, found.cfg.rm, v, 0)) for v in found.cfg.rm.variants.values()]
    assert steps == [16, 4, 8, 20]
    phases = training.rm(found)
    assert [u.calls for u in of_kind(phases, "train", Update)] == steps
    assert len([p for p in of_kind(phases, "train", Pass) if not p.trained]) == 4 + 0 + 2 + 1
    assert training.cached_orders(found) == 5 + 2


def test_states_that_a_rank_has_are_not_computed_again():
    """Pairs go to ranks at random in every order; of a micro-batch the pairs are computed that are new to its rank."""
    ranks, micro, count, orders, draws = 2, 4, 64, 4, 200
    rng, calls, rows = random.Random(0), [0.0] * orders, [0.0] * orders
    for _ in range(draws):
        known: list[set[int]] = [set() for _ in range(ranks)]
        for k in range(orders):
            order = rng.sample(range(count), count)
            for number, start in enumerate(range(0, count, micro)):
                new = set(order[start : start + micro]) - known[number % ranks]
                calls[k] += bool(new) / draws / ranks
                rows[k] += len(new) / draws / ranks
                known[number % ranks] |= new
    found = training.rm(sizes(rm=RM | {"variants": {"a": {"seed": 0}, "b": {"seed": 1}}}))
    frozen = [p for p in of_kind(found, "train", Pass) if not p.trained]
    assert [p.calls for p in frozen] == pytest.approx(calls, rel=0.1)
    assert [p.calls * p.tokens for p in frozen] == pytest.approx([n * (20 + 2 * 12) for n in rows], rel=0.05)


def test_micro_batches_of_ppo_are_those_that_it_makes():
    ppo = {"rollouts": 32, "minibatches": 2, "micro_batch": 4}
    draw = random.Random(1)
    prompts = [[1] * draw.randint(5, 30) for _ in range(16)]
    answers = [Completion([1] * (k := draw.randint(1, 12)), [0.0] * k, "", True) for _ in range(16)]
    made = make_minibatches(prompts, answers, list(range(16)), 0, minibatches=2, micro_batch=4, seed=0)
    known = lengths(
        prompt_draws=[len(p) for p in prompts], response_draws=[len(a.token_ids) for a in answers],
        prompt_tokens=sum(map(len, prompts)) / 16, response_tokens=sum(len(a.token_ids) for a in answers) / 16,
    )  # fmt: skip
    padded = [micro.input_ids.numel() for minibatch in made for micro in minibatch]
    real = [int(micro.attention_mask.sum()) for minibatch in made for micro in minibatch]
    on_gpu, found = sizes(ppo=ppo, known=known, gpu_memory=1e9), sizes(ppo=ppo, known=known)
    assert training.ppo_micro(on_gpu) == pytest.approx(sum(padded) / len(padded), rel=0.1)
    assert training.ppo_micro(found) == pytest.approx(sum(real) / len(real))
    tokens = real
    critics = [p for p in of_kind(training.ppo(found), "train", Pass) if p.trained == "weights"]
    assert [p.calls for p in critics] == [found.cfg.ppo.steps * len(tokens)]


def test_layers_of_ppo_are_run_once_where_they_are_shared():
    found = sizes(
        rm=RM,
        ppo={"lora": {"rank": 2, "top_layers": 2}, "critic_trainable_layers": 1, "rollouts": 16, "minibatches": 1},
    )
    assert (found.actor_part, found.critic_part, found.shared) == (Part(2, 2, "lora"), Part(3, 1, "weights"), 3)
    phases = training.ppo(found)
    reading = [(p.layers, p.zero) for p in of_kind(phases, "logprobs", Pass)]
    assert reading == [(3, None), (2, 3), (2, 3), (1, 3)]  # shared, actor, reference, critic: each from its own depth
    assert [p.layers for p in of_kind(phases, "score", Pass)] == [1]  # the proxy goes on from the shared layers
    assert [(p.layers, p.trained) for p in of_kind(phases, "train", Pass)] == [(2, "lora"), (1, "weights")]
    alone = sizes(rm=RM, ppo=found.cfg.ppo.model_dump() | {"reuse_frozen_layers": False})
    assert alone.shared == 0
    assert [p.layers for p in of_kind(training.ppo(alone), "logprobs", Pass)] == [4, 4, 4]
    assert [p.layers for p in of_kind(training.ppo(alone), "score", Pass)] == [4]


def test_a_reward_model_with_adapters_shares_no_layer():
    found = sizes(rm={"lora": {"rank": 2}}, ppo={"lora": {"rank": 2, "top_layers": 2}, "critic_trainable_layers": 1})
    assert (found.critic_shared, found.actor_shared, found.shared) == (0, 2, 2)  # actor and reference share two


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_are_those_of_scoring(ranks):
    rows, length, budget = 50, 32, 320
    for divided in (by_length_on_ranks, evenly_on_ranks):
        groups = divided([length] * rows, budget, ranks)
        mine = groups[0::ranks]
        calls, tokens = batches(rows * length, budget, ranks)
        assert calls == len(mine) and tokens == pytest.approx(length * sum(map(len, mine)) / len(mine), rel=0.1)


def test_samples_of_the_stages():
    given = {"preferences": {"max_train_pairs": None}, "bon": {"samples": 16, "prompts": 8, "shard_prompts": 4}}
    found = sizes(ranks=1, **given)
    (preferences,) = of_kind(pools.preferences(found), "sample", Sample)
    assert preferences.calls * preferences.sequences == 2 * (64 + 10 + 10)
    (bon,) = of_kind(pools.bon(found), "sample", Sample)
    assert (bon.calls, bon.sequences, bon.prompts) == (2, 64, 4)
    (bon,) = of_kind(pools.bon(sizes(ranks=2, **given)), "sample", Sample)
    assert (bon.calls, bon.sequences, bon.prompts, bon.ranks) == (1, 64, 4, 2)
    found = sizes(**given)
    (ppo,) = of_kind(training.ppo(found), "generate", Sample)
    assert ppo.calls * ppo.sequences * found.ranks == found.cfg.ppo.steps * found.cfg.ppo.rollouts


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("shard_prompts", [None, 2])
def test_work_of_the_process_with_the_most_shards(ranks, shard_prompts):
    """Ten prompts of the reference and three checkpoints; the judge scores shards of 16 prompts, so all of them."""
    found = sizes(ppo={"steps": 3, "checkpoint_every": 1}, eval={"shard_prompts": shard_prompts})
    found = replace(found, ranks=ranks)
    shards = [(step, part) for step in range(4) for part in range(5 if shard_prompts else 1)]
    mine = [[shards[number] for number in Share(rank, ranks).of(len(shards))] for rank in range(ranks)]
    most = max(mine, key=len)
    phases = pools.evaluate(found)
    (sample,) = of_kind(phases, "sample", Sample)
    prompts = shard_prompts or 10
    assert (sample.calls, sample.sequences) == (pytest.approx(len(most)), prompts)
    (sync,) = phases["sync"]
    assert sync.calls >= max(len({step for step, _ in one if step}) for one in mine)
    (judge,) = of_kind(phases, "gold", Judge)
    assert judge.samples == 4 * 10
    kl = [item for item in phases["kl"] if isinstance(item, Kl)][0]
    assert kl.tokens == pytest.approx(12 * len(most) * prompts)
    assert bool(pools.idle(found, "eval")) == (len(shards) < ranks) == (not all(mine))


@pytest.mark.parametrize("gpu_memory", [None, 1e9])
def test_pools_are_read_in_the_rows_that_scoring_makes(gpu_memory):
    found = sizes(bon={"samples": 700, "prompts": 3}, gpu_memory=gpu_memory)
    most = Limits().row_tokens if gpu_memory else min(UNPADDED_ROW, pools.SCORE_TOKENS)
    pairs = [((p,) * 20, (p, k) + (0,) * 10) for p in range(3) for k in range(700)]
    rows = _rows(sorted(pairs), most)
    assert pools.pool_tokens(found)[0] == sum(map(row_length, rows))


@pytest.mark.parametrize(
    ("steps", "every", "keep", "count"), [(12, 4, None, 3), (7, 4, None, 2), (3, 4, None, 1), (12, 2, 2, 3)]
)
def test_policies_that_are_evaluated(steps, every, keep, count):
    found = sizes(ppo={"steps": steps, "checkpoint_every": every, "keep_policies": keep})
    assert pools.checkpoints(found) == count
