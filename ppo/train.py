"""Stage `ppo`: optimise the policy against the proxy reward with PPO (1707.06347), a critic and a KL-shaped reward.

Actor and critic are two DeepSpeed engines, reference and proxy run without gradients, every rank samples its
own prompts with its own vLLM engine. Gold is not among this stage's inputs. What an update does is in `ppo.update`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from pipelines import engine
from pipelines.artefacts import ArtefactError, read_json, write_json
from pipelines.config import Config
from pipelines.data import ChatTokenizer, DataError, stream_seed
from pipelines.generate import Generator
from pipelines.generate_server import ServerGenerator
from pipelines.models import LowerLayers, add_lora, load_causal_lm, shared_depth, train_top_layers
from pipelines.prompts import read_split
from pipelines.stopping import MARK, Stopped, StopSignal
from ppo.card import write_card
from ppo.keep import PolicyKeeper
from ppo.log import RunLog, read_rows
from ppo.math import AdaptiveKL
from ppo.policy import PolicyModule, save_adapter
from ppo.probe import SyncProbe
from ppo.proxy import LocalProxy, RemoteProxy
from ppo.rewards import RewardScale
from ppo.rollout import Clock, collect, statistics
from ppo.update import Learner
from rm.heads import zero_output
from rm.model import RewardModel, save_lm

MAX_MISMATCH = 0.2
"""Mean |log-prob difference| of vLLM and trainer, nats: bf16 rounding gives 0.03 to 0.05, mixed weights 0.3."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    trainer = Trainer(cfg, inputs, out)
    first, stop = trainer.resume(), StopSignal()
    steps = range(first, cfg.ppo.steps + 1)
    for step in tqdm(
        steps, desc="ppo", unit="step", initial=first - 1, total=cfg.ppo.steps, disable=engine.rank() != 0
    ):
        trainer.step(step)
        if stop.asked() and step < cfg.ppo.steps:
            trainer.save_state(step)
            if engine.rank() == 0:
                (out / MARK).write_text(f"after step {step}\n")
            torch.distributed.barrier()
            raise Stopped(f"stopped after step {step} of {cfg.ppo.steps}; the same command goes on from there")
    trainer.finish()
    return summary(out / "metrics.jsonl") if engine.rank() == 0 else {}


class Trainer:
    """The models of one PPO run and one method per phase of a step."""

    def __init__(self, cfg: Config, inputs: dict[str, Path], out: Path):
        engine.init_distributed()
        self.cfg, self.out = cfg, out
        self.seed = stream_seed(cfg.run.seed, "ppo", cfg.ppo.seed)
        self.tokenizer = ChatTokenizer(cfg.policy)
        self.prompts = read_split(inputs["prompts"], "rl_train")
        self.generator = self._generator()
        self.generator.sleep()
        self._make_engines(inputs["rm"])
        self.kl = AdaptiveKL(cfg.ppo.kl.coef, cfg.ppo.kl.target, cfg.ppo.kl.horizon)
        self.policies = PolicyKeeper(out, cfg.ppo.keep_policies)
        self.probe = SyncProbe(self.actor, self.generator)
        self.log: RunLog | None = None

    def _generator(self) -> Generator | ServerGenerator:
        cfg = self.cfg
        if not cfg.ppo.vllm_servers:
            return Generator(cfg.policy, cfg.generation, self.tokenizer)
        return ServerGenerator(
            cfg.ppo.vllm_servers, cfg.policy, cfg.generation, self.tokenizer, folder=self.out / "sync",
            timeout=cfg.ppo.server_timeout,
        )  # fmt: skip

    def _make_engines(self, reward_models: Path) -> None:
        cfg, settings = self.cfg, self.cfg.engine
        micro, updates = cfg.ppo.micro_batch, cfg.ppo.epochs * cfg.ppo.minibatches
        per_rank = cfg.ppo.rollouts // engine.world_size()
        trained = {"micro_batch": micro, "accumulation": per_rank // (micro * cfg.ppo.minibatches)}
        base = lambda: load_causal_lm(cfg.policy, dtype=settings.dtype)  # noqa: E731
        module = lambda lm: PolicyModule(lm, cfg.generation.temperature)  # noqa: E731
        members = {name: self._reward_model(reward_models / name) for name in cfg.ppo.members}
        torch.manual_seed(stream_seed(self.seed, "ppo", "adapter"))
        lm = add_lora(base(), cfg.ppo.lora) if cfg.ppo.lora else base()
        critic = self._critic(reward_models / cfg.ppo.proxy) if cfg.ppo.estimator == "gae" else None
        # Weights are compared, so before they are sharded.
        self.lower = self._lower_layers(lm, *([critic.lm] if critic else []))
        actor_updates = (cfg.ppo.steps - cfg.ppo.critic_warmup_steps) * updates
        self.actor = engine.Engine(module(lm), settings, optim=cfg.ppo.actor, total_steps=actor_updates, **trained)
        critic_updates = cfg.ppo.steps * updates
        self.critic = critic and engine.Engine(
            critic, settings, optim=cfg.ppo.critic, total_steps=critic_updates, **trained
        )
        self.reference = self.actor if cfg.ppo.lora else engine.Engine(module(base()), settings, micro_batch=micro)
        if cfg.ppo.reward_server:
            self.proxy = RemoteProxy(cfg.ppo.reward_server, members[cfg.ppo.proxy])
        else:
            engines = [engine.Engine(member, settings, micro_batch=micro) for member in members.values()]
            self.proxy = LocalProxy(engines, cfg.ppo.combine)
        self.scale = RewardScale(cfg.ppo.reward, self.proxy.mean, self.proxy.std)
        self.learner = Learner(cfg.ppo, self.actor, self.critic, self.scale, self.seed)

    def _reward_model(self, path: Path) -> RewardModel:
        model = RewardModel.from_pretrained(path, dtype=self.cfg.engine.dtype, attention=self.cfg.policy.attention)
        if model.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise DataError(f"{path} has another tokenizer than the policy {self.cfg.policy.path}")
        return model

    def _critic(self, proxy_path: Path) -> RewardModel:
        """The layers of the proxy or of the policy under a value head."""
        ppo = self.cfg.ppo
        if ppo.critic_init == "proxy":
            critic = self._reward_model(proxy_path)
        else:
            lm = load_causal_lm(self.cfg.policy, dtype=self.cfg.engine.dtype)
            critic = RewardModel(lm, "mlp", self.tokenizer)
            critic.head.to(dtype=lm.dtype)
        if ppo.critic_head == "zero":
            zero_output(critic)
        train_top_layers(critic.lm, ppo.critic_trainable_layers)
        return critic

    def _lower_layers(self, *lms: torch.nn.Module) -> engine.Engine | None:
        """The frozen layers that these models have in common, to be run once for all; None where there are none."""
        depth = shared_depth(*lms) if self.cfg.ppo.reuse_frozen_layers else 0
        if not depth:
            return None
        base = load_causal_lm(self.cfg.policy, dtype=self.cfg.engine.dtype)
        layers = LowerLayers(base.to(engine.device()), depth)
        for lm in lms:
            layers.check(lm.to(engine.device()))
        return engine.Engine(layers, self.cfg.engine, micro_batch=self.cfg.ppo.micro_batch)

    def step(self, step: int) -> None:
        """One PPO iteration."""
        clock = Clock()
        rollout = collect(self, step)
        stats = statistics(rollout)
        self._check(stats, step)
        self.probe.before(rollout.micros)
        clock.lap("collect")
        self.scale.update([m.proxy for m in rollout.micros])
        stats |= self.learner.advantages(rollout.micros, self.kl.coef)
        stats |= self.learner.update(rollout.micros, step, self.kl.coef)
        clock.lap("train")
        self.generator.wake()
        self._sync()
        clock.lap("sync")
        stats |= self.probe.after(step)
        self.generator.sleep()
        clock.lap("probe")
        stats["kl_coef"] = self.kl.coef
        self.kl.update(stats["kl_nats_per_response"], self.cfg.ppo.rollouts)
        seconds = rollout.seconds | {k: clock.seconds[k] for k in ("train", "sync", "probe")}
        stats |= {f"seconds_{phase}": s for phase, s in seconds.items()}
        stats["seconds_total"] = sum(clock.seconds.values())
        stats["tokens_per_second"] = stats.pop("tokens") / stats["seconds_total"]
        samples = engine.gather_rows(rollout.samples[:4])
        if self.log:
            self.log.step(step, stats, samples)
            self.policies.scored(step - 1, stats["reward_mean"] - stats["kl_coef"] * stats["kl_nats_per_response"])
        self._checkpoint(step)

    def _sync(self) -> None:
        self.generator.sync(self.actor.named_weights(self.actor.module.lm))

    def _check(self, stats: dict, step: int) -> None:
        """A bound on what `probe` tells by direction: all samples of the step, and whatever happened since the sync."""
        if stats["mismatch_mean_abs"] > MAX_MISMATCH:
            raise DataError(
                f"ppo step {step}: log-probs of vLLM and trainer differ by {stats['mismatch_mean_abs']:.3f} nats"
                f" (limit {MAX_MISMATCH}): vLLM does not run the actor's weights"
            )

    def _checkpoint(self, step: int) -> None:
        ppo, last = self.cfg.ppo, step == self.cfg.ppo.steps
        if step % ppo.checkpoint_every == 0 or last:
            self._save_policy(self.policies.folder(step))
        if step % ppo.save_every == 0 and not last:
            self.save_state(step)

    def save_state(self, step: int) -> None:
        """What `resume` needs. Draws are named by step, so there are no random states; the mark is written last."""
        folder = self.out / "state" / f"{step:06d}"
        self.actor.save(folder / "actor")
        if self.critic:
            self.critic.save(folder / "critic")
        torch.distributed.barrier()
        if engine.rank() == 0:
            state = {"kl": self.kl.state_dict(), "scale": self.scale.state_dict(), "ranks": engine.world_size()}
            write_json(self.out / "state" / "last.json", {"step": step, **state})
            for old in (self.out / "state").glob("[0-9]*"):
                if old != folder:
                    shutil.rmtree(old)

    def _save_policy(self, folder: Path) -> None:
        lm = self.actor.module.lm
        if self.cfg.ppo.lora:
            self.actor.settle()
            save_adapter(folder, lm)
        else:
            weights = list(self.actor.named_weights(lm))
            if engine.rank() == 0:
                save_lm(folder, lm.config, weights, self.tokenizer)

    def resume(self) -> int:
        """The first step to run: 1, or the one after the last saved state.

        Raises:
            ArtefactError: the state was written by another number of ranks.
        """
        mark = self.out / "state" / "last.json"
        state = read_json(mark) if mark.is_file() else {"step": 0}
        if state["step"]:
            if state["ranks"] != engine.world_size():
                raise ArtefactError(
                    f"{mark} was written by {state['ranks']} ranks and there are {engine.world_size()} now: start as "
                    f"many (engine.processes), or delete {mark.parent} to begin anew"
                )
            folder = self.out / "state" / f"{state['step']:06d}"
            self.actor.load(folder / "actor")
            if self.critic:
                self.critic.load(folder / "critic")
            self.kl.load_state_dict(state["kl"])
            self.scale.load_state_dict(state["scale"])
            self.generator.wake()
            self._sync()
            self.generator.sleep()
        if engine.rank() == 0:
            (self.out / MARK).unlink(missing_ok=True)
            self.log = RunLog(self.cfg, self.out, state["step"] + 1)
        return state["step"] + 1

    def finish(self) -> None:
        """The result: a merged policy that transformers and vLLM load as it is. Resume states are dropped."""
        lm = self.actor.module.lm
        weights = list(self.actor.named_weights(lm))
        if engine.rank() == 0:
            save_lm(self.out / "policy", lm.config, weights, self.tokenizer)
            write_card(self.out / "policy" / "README.md", self.cfg, summary(self.out / "metrics.jsonl"))
            for folder in ("state", "sync"):
                shutil.rmtree(self.out / folder, ignore_errors=True)
            self.log.close()


def summary(metrics: Path) -> dict:
    """Headline and first and last step."""
    rows = read_rows(metrics)
    first, last = rows[0], rows[-1]
    change = last["proxy_mean"] - first["proxy_mean"]
    error = (first["proxy_se"] ** 2 + last["proxy_se"] ** 2) ** 0.5
    return {
        "headline": (
            f"proxy {first['proxy_mean']:+.3f} -> {last['proxy_mean']:+.3f} (change {change:+.3f}, SE {error:.3f})"
            f" over {len(rows)} steps at KL {last['kl_nats_per_response']:.2f} nats a response"
        ),
        "first": first,
        "last": last,
        "proxy_change_over_se": change / error if error else None,
    }
