"""Two PPO steps on the ranks of torchrun, by several engines and with shared frozen layers or without.

What is collected and trained is written down by number of the response. The sampler is a table of responses: no vLLM.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import ppo.models
from core import config
from core.data.chat import ChatTokenizer
from core.data.splits import prompt_id
from core.generation.local import Completion
from core.models.loading import load_causal_lm
from core.training import distributed
from ppo.models import make_engines
from ppo.probe import SyncProbe
from ppo.reward.mixed import MixedReward
from ppo.rewards import RewardScale
from ppo.rollout import Collector
from ppo.update import Learner
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.checkpoints import tiny_config
from tests.builders.tiny_lm import OPTIM

LAYERS, PROMPTS, TEMPERATURE = 4, 8, 1.0
PPO = config.Ppo(
    proxy="top", ensemble=config.Ensemble(members=("top", "all"), combine="mean"), estimator="gae",
    samples_per_prompt=2, rollouts=2 * PROMPTS, micro_batch=2, minibatches=2, steps=2, epochs=2,
    lora=config.Lora(rank=4, alpha=8, top_layers=2), critic_trainable_layers=1, actor=OPTIM, critic=OPTIM,
    critic_head="reward", kl=config.Kl(coef=0.1),
)  # fmt: skip
LAYOUTS = {
    # name: ZeRO stage of what is trained, of what is frozen, whether frozen layers are shared
    "slow": (3, 3, False), "sharded": (3, 3, True), "whole": (3, 0, True), "zero2": (2, 0, True),
    "read whole": (3, 3, True),
}  # fmt: skip
"""In the last one each rank reads the models whole before ZeRO-3 shards them, else straight into shards."""
OF_TOKENS = ("logprobs", "ref_logprobs", "critic_outputs")
NOTHING_KEPT_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def prompts() -> list[dict]:
    rows = [[{"role": "user", "content": "Why? " * (1 + 3 * (i % 4)) + str(i)}] for i in range(PROMPTS)]
    return [{"prompt_id": prompt_id(p), "prompt": p} for p in rows]


class Table:
    """A sampler of responses that depend on the prompt alone; to some prompts both responses are equal."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer

    def generate(self, prompts, *, n, seed):
        return [self._two(ids) for ids in prompts]

    def _two(self, prompt):
        rng = random.Random(str(prompt))
        made = []
        for _ in range(2):
            ids = [rng.randrange(100, 1000) for _ in range(rng.randrange(1, 9))] + [self.tokenizer.eot_id]
            made.append(Completion(ids, [-1.0] * len(ids), self.tokenizer.decode(ids), True))
        return [made[0]] * 2 if rng.random() < 0.3 else made

    def logprobs_of(self, sequences):
        raise AssertionError("at temperature 1 the log-probs of the samples are there")

    def wake(self, *parts):
        pass

    sleep = wake


def make_models(tokenizer: Path, folder: Path) -> config.Model:
    """A policy, a reward model that differs from it in the top layer, and one that differs everywhere."""
    hf = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(1)
    lm = LlamaForCausalLM(tiny_config(hf, num_hidden_layers=LAYERS, initializer_range=0.1))
    lm.save_pretrained(folder / "policy")
    hf.save_pretrained(folder / "policy")
    policy = config.Model(path=str(folder / "policy"), attention="eager")
    for name, lowest in (("top", LAYERS - 1), ("all", 0)):
        lm = load_causal_lm(policy, dtype="float32")
        with torch.no_grad():
            for layer in lm.model.layers[lowest:]:
                for weight in layer.parameters():
                    weight.add_(0.05 * torch.randn_like(weight))
        model = RewardModel(lm, "mlp", ChatTokenizer(policy), mean=0.25, std=0.5)
        save_reward_model(folder / "rm" / name, model, lm.named_parameters(), model.head.state_dict())
    return policy


def train(policy: config.Model, folder: Path, trained: int, frozen: int, shared: bool) -> dict:
    settings = config.Engine(
        zero_stage=trained, frozen_zero_stage=frozen, dtype="float32",
        overrides=NOTHING_KEPT_WHOLE if 3 in (trained, frozen) else {},
    )  # fmt: skip
    options, tokenizer = PPO.model_copy(update={"reuse_frozen_layers": shared}), ChatTokenizer(policy)
    engines = make_engines(
        options, policy, settings, temperature=TEMPERATURE, reward_models=folder / "rm", tokenizer=tokenizer, seed=1
    )
    learner = Learner(options, engines.actor, engines.critic, RewardScale(options.reward, 0.0, 1.0), seed=1)
    sampler = Table(tokenizer)
    probe = SyncProbe(engines.actor, sampler, dtype=torch.float32)
    reward = MixedReward(options.reward, engines.proxy, {})
    collector = Collector(options, engines, learner, sampler, probe, reward, prompts=prompts(), seed=1)
    depths = [engines.actor.continues, engines.critic.continues]
    found = {"depths": depths, "shared": engines.frozen_layers is not None, "rows": [], "metrics": []}
    for step in (1, 2):
        collector.ahead.policy = step - 1
        rollout = collector.collect(step)
        probe.before()
        for m in rollout.micros:
            for b, response in enumerate(m.is_response):
                n = int(m.attention_mask[b].sum())
                of_tokens = {name: getattr(m, name)[b][response].tolist() for name in OF_TOKENS}
                row = {"step": step, "ids": m.input_ids[b, :n].tolist(), "proxy": float(m.proxy[b]), **of_tokens}
                found["rows"].append(row)
        stats = learner.advantages(rollout.micros, 0.1)
        found["metrics"].append(stats | learner.update(rollout.minibatches, step, 0.1))
    found["rows"] = distributed.gather_rows(found["rows"])
    trained_weights = {"actor": engines.actor, "critic": engines.critic}
    found["weights"] = {
        f"{name}.{key}": float(weight.double().square().sum())
        for name, engine in trained_weights.items()
        for key, weight in engine.named_weights(engine.module.lm)
        if f"layers.{LAYERS - 1}" in key
    }
    return found


def main(tokenizer: str, out: str) -> None:
    distributed.init_distributed()
    folder = Path(out)
    if distributed.rank() == 0:
        make_models(Path(tokenizer), folder)
    torch.distributed.barrier()
    policy = config.Model(path=str(folder / "policy"), attention="eager")
    found = {}
    for name, layout in LAYOUTS.items():
        if name == "read whole":
            ppo.models.shards = lambda *_: None
        found[name] = train(policy, folder, *layout)
    if distributed.rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
