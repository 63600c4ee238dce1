"""What an update reports, in which units values are, and what it refuses: on tables in place of models."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from core.config import Kl, Ppo, Reward
from core.errors import DataError
from core.files import write_json
from ppo import guard, update
from ppo.math import kl_k3
from ppo.records import Rollout
from ppo.rewards import RewardScale
from ppo.rollout import statistics
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine
from tests.builders.ppo_tables import PPO, learner, micro, reported, rollout
from tests.builders.processes import run_program


def test_metrics_are_means_over_all_tokens(monkeypatch):
    monkeypatch.setitem(update.FIRST_RATIO, torch.float32, math.inf)  # the old policy is another one on purpose
    trained = learner(PPO)
    minibatches = rollout(trained)
    found = reported(trained, minibatches)
    micros = [m for part in minibatches for m in part]
    flat = lambda value: torch.cat([value(m)[m.is_response] for m in micros])  # noqa: E731
    with torch.no_grad():
        new = flat(lambda m: trained.actor(m.input_ids, None, m.is_response)[0])
        values = flat(trained.critic_outputs)
    old, adv, returns, old_values = (flat(lambda m, k=k: getattr(m, k))
                                     for k in ("logprobs", "advantages", "returns", "values"))  # fmt: skip
    ratio = (new - old).exp()
    clipped = ((ratio > 1.2) & (adv > 0)) | ((ratio < 0.8) & (adv < 0))
    near = old_values + (values - old_values).clamp(-0.1, 0.1)
    expected = {
        "approx_kl": kl_k3(old, new).mean(),
        "clipfrac": clipped.float().mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "value_clipfrac": ((near - returns).abs() > (values - returns).abs()).float().mean(),
        "explained_variance": 1 - (returns - old_values).var(correction=0) / returns.var(correction=0),
    }
    assert 0 < expected["clipfrac"] < 1 and 0 < expected["value_clipfrac"] < 1
    assert {k: found[k] for k in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)


@pytest.mark.slow
def test_metrics_and_what_is_not_finite_are_those_of_all_ranks():
    assert run_program("tests/programs/metrics.py", ranks=2).count("equal") == 2


def test_the_policy_is_left_alone_once_its_kl_is_too_large(monkeypatch):
    """By the KL of a token, however the tokens are spread over micro-batches."""
    monkeypatch.setitem(update.FIRST_RATIO, torch.float32, math.inf)
    plain = learner(PPO)
    minibatches = rollout(plain)
    plain.advantages([m for part in minibatches for m in part], 0.0)
    first = plain.update(minibatches[:1], 1, 0.0)["approx_kl"]
    for stop, rests in ((0.99 * first, True), (1.01 * first, False)):
        trained = learner(PPO.model_copy(update={"kl": Kl(coef=0.0, stop=stop)}), lr=1e-6)
        trained.update(minibatches[:1] * 2, 1, 0.0)
        assert (trained.actor._passes == 2) is rests and trained.critic._passes == 4


class Proxy(nn.Module):
    """A critic that gives every token the proxy's raw reward of its response, which stands in the ids."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask, *, read, frozen=None):
        return (input_ids.float() + 0 * self.weight).flatten()[read], None, None


def test_a_reward_head_has_the_scale_of_its_own_steps_rewards():
    """Critic and rewards that agree have advantage 0, at whatever scale the rewards of the run have come to."""
    ppo = Ppo(critic_head="reward", reward=Reward(normalise="running", clip=None), whiten_advantages=False, lam=1.0)
    module = Proxy()
    critic = PlainEngine(module, torch.optim.SGD(module.parameters(), lr=0.0))
    trained = Learner(ppo, None, critic, RewardScale(ppo.reward, 0.0, 1.0), seed=0)
    for step, rewards in enumerate(([3, 5, 9], [20, 2, 1])):
        m = micro([1, 4, 6], [float(r) for r in rewards], seed=step)
        m.input_ids = torch.tensor(rewards)[:, None].expand(m.input_ids.shape).contiguous()
        m.critic_outputs = trained.critic_outputs(m).detach()
        stats = trained.advantages([m], 0.0)
        assert m.advantages.abs().max() < 1e-5 and stats["explained_variance"] == pytest.approx(1.0)
        assert float(m.values[0, 0]) == pytest.approx((rewards[0] - trained.scale.mean) / trained.scale.std)


def test_the_error_of_the_mean_reward_takes_prompts_as_clusters():
    """Four prompts with eight responses each, that have most of their reward in common."""
    g = torch.Generator().manual_seed(1)
    of_prompt, k = torch.randn(4, generator=g, dtype=torch.float64), 8
    rewards = (of_prompt[:, None] + 0.3 * torch.randn(4, k, generator=g)).flatten().tolist()
    m = micro([3] * len(rewards), rewards, seed=0)
    samples = [{"prompt_id": f"p{i // k}", "proxy": r} for i, r in enumerate(rewards)]
    found = statistics(Rollout([[m]], samples, policy=0, behind=0))
    means = torch.tensor(rewards, dtype=torch.float64).view(4, k).mean(-1)
    assert found["proxy_se"] == pytest.approx(float(means.std() / 2))
    alone = statistics(Rollout([[m]], [s | {"prompt_id": i} for i, s in enumerate(samples)], policy=0, behind=0))
    assert alone["proxy_se"] == pytest.approx(float(torch.tensor(rewards).std() / len(rewards) ** 0.5), rel=1e-5)


@pytest.mark.parametrize("name", ["sampler_logprobs", "proxy", "logprobs", "ref_logprobs", "critic_outputs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_rollout_that_is_not_finite_is_refused_by_name(name, bad):
    minibatches = rollout(learner(PPO))
    made = Rollout(minibatches, [], policy=0, behind=0)
    guard.check_rollout(3, made)
    minibatches[1][0] = dataclasses.replace(minibatches[1][0])
    for field in ("logprobs", "ref_logprobs", "critic_outputs"):
        setattr(minibatches[1][0], field, torch.zeros(1, 6))
    minibatches[1][0].proxy = torch.zeros(1)
    getattr(minibatches[1][0], name).view(-1)[0] = bad
    with pytest.raises(DataError, match=rf"ppo step 3: 1 of \d+ {guard.OF_ROLLOUT[name]} are NaN or infinite. Nothing"):
        guard.check_rollout(3, made)


@pytest.mark.parametrize(("field", "named"), [("advantages", "policy_loss"), ("returns", "value_loss")])
def test_a_loss_that_is_not_finite_stops_the_update(monkeypatch, field, named):
    monkeypatch.setitem(update.FIRST_RATIO, torch.float32, math.inf)
    trained = learner(PPO)
    minibatches = rollout(trained)
    trained.advantages([m for part in minibatches for m in part], 0.0)
    getattr(minibatches[0][1], field)[0, 0] = math.nan
    with pytest.raises(DataError, match=f"ppo step 7, on a minibatch: 1 of 2 values of {named} are NaN or infinite"):
        trained.update(minibatches, 7, 0.0)


def test_a_gradient_norm_that_is_not_finite_stops_the_update(monkeypatch):
    monkeypatch.setitem(update.FIRST_RATIO, torch.float32, math.inf)
    trained = learner(PPO)
    minibatches = rollout(trained)
    trained.advantages([m for part in minibatches for m in part], 0.0)

    class Overflowing(PlainEngine):
        grad_norm = property(lambda self: math.inf, lambda self, _: None)

    trained.critic.__class__ = Overflowing
    with pytest.raises(DataError, match="1 of 1 values of critic_grad_norm are NaN or infinite"):
        trained.update(minibatches, 7, 0.0)


def test_weights_and_metrics_that_are_not_finite_are_refused(tmp_path):
    class Held:
        def __init__(self, *weights):
            self.weights = weights

        def trained_values(self):
            return iter(self.weights)

    good, bad = Held(torch.ones(3), torch.ones(2, 2)), Held(torch.ones(3), torch.tensor([[1.0, -math.inf]]))
    guard.check_weights(2, good, None)
    with pytest.raises(DataError, match="ppo step 2: 1 of 5 weights of the critic are NaN or infinite"):
        guard.check_weights(2, good, bad)
    guard.check_metrics(2, {"kl": 1.0})
    with pytest.raises(DataError, match="values of the metric sync_slope are NaN"):
        guard.check_metrics(2, {"kl": 1.0, "sync_slope": math.nan})
    with pytest.raises(ValueError, match="JSON"):  # what would have been the only guard
        write_json(tmp_path / "policies.json", {"1": math.nan})
