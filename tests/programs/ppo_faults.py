"""A PPO step on two ranks that is spoilt in each of its phases, and the bundles that it leaves. No vLLM."""

import json
import math
import os
import sys
from pathlib import Path

import deepspeed
import torch

from core import config
from core.data.chat import ChatTokenizer
from core.training import distributed
from core.training.distributed import NotFinite
from ppo import guard
from ppo.faults import bundled
from ppo.models import make_engines
from ppo.probe import SyncProbe
from ppo.records import Micro
from ppo.reward.mixed import MixedReward
from ppo.rewards import RewardScale
from ppo.rollout import Collector
from ppo.update import Learner
from tests.programs.ppo_stages import PPO, TEMPERATURE, Table, make_models, prompts


def break_weight(module: torch.nn.Module, part: str) -> None:
    name, weight = next((n, w) for n, w in module.named_parameters() if part in n and w.requires_grad)
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.view(-1)[0] = math.nan


class Step:
    """What `ppo.train.Trainer` does in a step but for vLLM, with a place for a fault before each phase."""

    def __init__(self, cfg: config.Config, folder: Path, reward_models: Path):
        self.cfg, self.folder, self.reward_models = cfg, folder, reward_models
        tokenizer = ChatTokenizer(cfg.policy)
        self.engines = make_engines(
            cfg.ppo, cfg.policy, cfg.engine, temperature=TEMPERATURE, reward_models=reward_models, tokenizer=tokenizer,
            seed=1,
        )  # fmt: skip
        scale = RewardScale(cfg.ppo.reward, 0.0, 1.0)
        self.learner = Learner(cfg.ppo, self.engines.actor, self.engines.critic, scale, seed=1)
        sampler = Table(tokenizer)
        self.probe = SyncProbe(self.engines.actor, sampler, dtype=torch.float32)
        reward = MixedReward(cfg.ppo.reward, self.engines.proxy, {})
        self.collector = Collector(
            cfg.ppo, self.engines, self.learner, sampler, self.probe, reward, prompts=prompts(), seed=1
        )

    def run(self, name: str) -> str:
        """The message of the fault that is named."""
        last = distributed.rank() == distributed.world_size() - 1
        if name in ("actor", "critic"):
            engine = self.engines.actor if name == "actor" else self.engines.critic
            break_weight(engine.module, "lora_B" if name == "actor" else "mlp.down_proj")
        rollout = self.collector.collect(1)
        micros = rollout.micros
        try:
            guard.check_rollout(1, rollout)
            if name == "advantages" and last:
                micros[0].proxy[0] = math.nan
            self.learner.advantages(micros, 0.1)
            guard.check_advantages(1, micros)
            if last and name == "loss":
                self.spoil(rollout.minibatches[0][0])
            self.learner.update(rollout.minibatches, 1, 0.1)
            if name == "weights":
                break_weight(self.engines.critic.module, "mlp.down_proj")
            guard.check_weights(1, self.engines.actor, self.engines.critic)
        except NotFinite as fault:
            return str(bundled(
                fault, self.cfg, self.folder / name / "ppo.partial", step=1, rollout=rollout, learner=self.learner,
                kl_coef=0.1, reward_models=self.reward_models,
            ))  # fmt: skip
        return "nothing was noticed"

    @staticmethod
    def spoil(m: Micro) -> None:
        first = tuple(int(i[0]) for i in m.is_response.nonzero(as_tuple=True))
        m.advantages[first] = math.nan


def main(tokenizer: str, out: str) -> None:
    distributed.init_distributed()
    folder = Path(out)
    if distributed.rank() == 0:
        make_models(Path(tokenizer), folder)
    torch.distributed.barrier()
    policy = config.Model(path=str(folder / "policy"), attention="eager")
    cfg = config.Config(
        policy=policy, ppo=PPO, rm=config.RewardTraining(variants={n: config.RewardVariant() for n in ("top", "all")}),
        generation=config.Generation(temperature=TEMPERATURE), engine=config.Engine(dtype="float32"),
    )  # fmt: skip
    said = {}
    for name in ("actor", "critic", "advantages", "loss", "weights"):
        said[name] = Step(cfg, folder, folder / "rm").run(name)
    if distributed.rank() == 0:
        spoil_reward_model(folder)
    torch.distributed.barrier()
    said["proxy"] = Step(cfg, folder, folder / "broken").run("proxy")
    if distributed.rank() == 0:
        (folder / "found.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    os._exit(0)


def spoil_reward_model(folder: Path) -> None:
    """A copy of the reward models, one of which has a broken weight in its head."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "rm", folder / "broken")
    (file,) = (f for f in (folder / "broken" / "all").glob("*.safetensors") if f.name != "model.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = math.nan
    save_file(weights, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
