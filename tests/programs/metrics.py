"""Metrics of an update on two ranks equal those on one, and what is not finite on one rank stops both."""

import math

import torch
import torch.distributed as dist

from core.errors import DataError
from core.training import distributed
from ppo import guard, update
from ppo.records import Rollout
from tests.builders.ppo_tables import PPO, learner, reported, rollout

update.FIRST_RATIO[torch.float32] = math.inf  # the old policy is another one on purpose
trained = learner(PPO)
alone = reported(trained, rollout(trained))
dist.init_process_group("gloo")
trained = learner(PPO)
mine = [[minibatch[dist.get_rank()]] for minibatch in rollout(trained)]  # 2 and 22 tokens, then 2 and 17
found = reported(trained, mine)
for name in ("approx_kl", "clipfrac", "ratio_max_dev", "value_clipfrac", "explained_variance", "policy_loss",
             "value_loss", "reward_mean"):  # fmt: skip
    assert math.isclose(found[name], alone[name], rel_tol=1e-4, abs_tol=1e-6), (name, found[name], alone[name])
assert distributed.global_max(float(dist.get_rank())) == 1.0
if dist.get_rank() == 1:
    mine[0][0].proxy[0] = math.nan
try:
    guard.check_rollout(4, Rollout(mine, [], policy=0, behind=0))
except DataError as error:
    assert "ppo step 4: 1 of 10 rewards of the proxy are NaN" in str(error)
    print("equal", flush=True)
dist.destroy_process_group()
