"""Stage `ppo`: optimise the policy against the proxy reward with PPO (1707.06347), a critic and a KL-shaped reward.

Actor and critic are two DeepSpeed engines, reference and proxy run without gradients, every rank samples its
own prompts with its own vLLM engine. Gold is not among this stage's inputs.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipelines import engine
from pipelines.artefacts import read_json, write_json
from pipelines.config import Config
from pipelines.data import ChatTokenizer, DataError, stream_seed
from pipelines.generate import Generator
from pipelines.models import LowerLayers, add_lora, load_causal_lm, shared_depth, train_top_layers
from pipelines.prompts import read_split
from ppo.math import (
    AdaptiveKL,
    explained_variance,
    gae,
    kl_k1,
    masked_whiten,
    policy_loss,
    shaped_rewards,
    value_loss,
)
from ppo.policy import PolicyModule, save_adapter, scatter
from ppo.proxy import LocalProxy, RemoteProxy
from ppo.rollout import Clock, Micro, Rollout, collect, statistics
from rm.model import RewardModel, save_lm

MAX_MISMATCH = 0.2
"""Mean |log-prob difference| of vLLM and trainer, nats: bf16 rounding gives 0.03, stale weights 0.3 and more."""


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    trainer = Trainer(cfg, inputs, out)
    first = trainer.resume()
    steps = range(first, cfg.ppo.steps + 1)
    for step in tqdm(
        steps, desc="ppo", unit="step", initial=first - 1, total=cfg.ppo.steps, disable=engine.rank() != 0
    ):
        trainer.step(step)
    trainer.finish()
    return summary(out / "metrics.jsonl") if engine.rank() == 0 else {}


class Trainer:
    """The models of one PPO run and one method per phase of a step."""

    def __init__(self, cfg: Config, inputs: dict[str, Path], out: Path):
        engine.init_distributed()
        self.cfg, self.out = cfg, out
        self.tokenizer = ChatTokenizer(cfg.policy)
        self.prompts = read_split(inputs["prompts"], "rl_train")
        self.generator = Generator(cfg.policy, cfg.generation, self.tokenizer)
        self.generator.sleep()
        self._make_engines(inputs["rm"] / cfg.ppo.proxy)
        self.kl = AdaptiveKL(cfg.ppo.kl.coef, cfg.ppo.kl.target, cfg.ppo.kl.horizon)
        self.writer = None

    def _make_engines(self, proxy_path: Path) -> None:
        cfg, settings = self.cfg, self.cfg.engine
        micro, updates = cfg.ppo.micro_batch, cfg.ppo.epochs * cfg.ppo.minibatches
        per_rank = cfg.ppo.rollouts // engine.world_size()
        trained = {"micro_batch": micro, "accumulation": per_rank // (micro * cfg.ppo.minibatches)}
        base = lambda: load_causal_lm(cfg.policy, dtype=settings.dtype)  # noqa: E731
        module = lambda lm: PolicyModule(lm, cfg.generation.temperature)  # noqa: E731
        reward_model = lambda: RewardModel.from_pretrained(  # noqa: E731
            proxy_path, dtype=settings.dtype, attention=cfg.policy.attention
        )
        torch.manual_seed(stream_seed(cfg.run.seed, "ppo", "adapter"))
        lm = add_lora(base(), cfg.ppo.lora) if cfg.ppo.lora else base()
        critic = reward_model()
        if critic.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise DataError(f"the critic starts from {proxy_path}, which has another tokenizer than {cfg.policy.path}")
        train_top_layers(critic.lm, cfg.ppo.critic_trainable_layers)
        self.lower = self._lower_layers(lm, critic.lm)  # compares weights, so before they are sharded
        actor_updates = (cfg.ppo.steps - cfg.ppo.critic_warmup_steps) * updates
        self.actor = engine.Engine(module(lm), settings, optim=cfg.ppo.actor, total_steps=actor_updates, **trained)
        critic_updates = cfg.ppo.steps * updates
        self.critic = engine.Engine(critic, settings, optim=cfg.ppo.critic, total_steps=critic_updates, **trained)
        self.reference = self.actor if cfg.ppo.lora else engine.Engine(module(base()), settings, micro_batch=micro)
        if cfg.ppo.reward_server:
            self.proxy = RemoteProxy(cfg.ppo.reward_server, critic)
        else:
            self.proxy = LocalProxy(engine.Engine(reward_model(), settings, micro_batch=micro))

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
        clock.lap("collect")
        self._advantages(rollout, stats)
        stats |= self._update(rollout, step)
        clock.lap("train")
        self.generator.wake()
        self.generator.sync(self.actor.named_weights(self.actor.module.lm))
        self.generator.sleep()
        clock.lap("sync")
        stats["kl_coef"] = self.kl.coef
        self.kl.update(stats["kl_nats_per_response"], self.cfg.ppo.rollouts)
        seconds = {**rollout.seconds, "train": clock.seconds["train"], "sync": clock.seconds["sync"]}
        stats |= {f"seconds_{phase}": s for phase, s in seconds.items()}
        stats["seconds_total"] = sum(clock.seconds.values())
        stats["tokens_per_second"] = stats.pop("tokens") / stats["seconds_total"]
        self._log(step, stats, rollout)
        self._checkpoint(step)

    def values(self, micro: Micro) -> torch.Tensor:
        """Critic values [B, L-1] in units of the normalised reward, 0 outside responses."""
        raw = self.critic(micro.input_ids, micro.attention_mask, read=micro.reads, lower=micro.lower)[0]
        return scatter(self.critic.module.normalise(raw), micro.is_response)

    def _check(self, stats: dict, step: int) -> None:
        """The log-probs of each step's samples prove that vLLM ran the actor's weights."""
        if stats["mismatch_mean_abs"] > MAX_MISMATCH:
            raise DataError(
                f"ppo step {step}: log-probs of vLLM and trainer differ by {stats['mismatch_mean_abs']:.3f} nats"
                f" (limit {MAX_MISMATCH}): the weights of the last sync did not arrive"
            )

    def _advantages(self, rollout: Rollout, stats: dict) -> None:
        """KL-shaped rewards, GAE, and whitening over the rollouts of all ranks."""
        ppo = self.cfg.ppo
        for m in rollout.micros:
            scores = self.proxy.normalise(m.proxy)
            if ppo.reward_clip:
                scores = scores.clamp(-ppo.reward_clip, ppo.reward_clip)
            scores = scores - ppo.missing_eos_penalty * (~m.finished).float()
            rewards = shaped_rewards(scores, kl_k1(m.logprobs, m.ref_logprobs), m.is_response, self.kl.coef)
            m.advantages, m.returns = gae(rewards, m.values, m.is_response, ppo.gamma, ppo.lam)
        flat = lambda name: torch.cat([getattr(m, name)[m.is_response] for m in rollout.micros])  # noqa: E731
        values, returns, advantages = flat("values"), flat("returns"), flat("advantages")
        everywhere = torch.ones_like(values, dtype=torch.bool)
        stats["explained_variance"] = float(explained_variance(values, returns, everywhere))
        whitened = masked_whiten(advantages, everywhere).split([int(m.is_response.sum()) for m in rollout.micros])
        for m, part in zip(rollout.micros, whitened, strict=True):
            m.advantages = scatter(part, m.is_response)

    def _update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Epochs of minibatches over the rollout; metrics are means over all updates and ranks."""
        ppo, sums, count = self.cfg.ppo, {}, 0
        size = len(rollout.micros) // ppo.minibatches
        for epoch in range(ppo.epochs):
            # The same order on all ranks; whole micro-batches, so shapes and hence ratios stay those of the rollout.
            rng = random.Random(stream_seed(self.cfg.run.seed, "ppo", "minibatches", step, epoch))
            order = rng.sample(rollout.micros, len(rollout.micros))
            for i in range(0, len(order), size):
                minibatch = order[i : i + size]
                tokens = engine.global_sum(sum(int(m.is_response.sum()) for m in minibatch))[0]
                for m in minibatch:
                    self._update_micro(m, tokens, step, sums)
                sums["actor_grad_norm"] = sums.get("actor_grad_norm", 0.0) + self._grad_norm(self.actor, step)
                sums["critic_grad_norm"] = sums.get("critic_grad_norm", 0.0) + self.critic.grad_norm
                count += 1
        world = engine.world_size()
        norms = {k: sums.pop(k) / count for k in ("actor_grad_norm", "critic_grad_norm")}
        totals = engine.global_sum(*sums.values())
        # losses are shares of the global token mean: they add up over micro-batches and ranks
        means = {
            k: t / count if k.endswith("loss") else t / (count * size * world)
            for k, t in zip(sums, totals, strict=True)
        }
        return means | norms

    def _update_micro(self, m: Micro, tokens: float, step: int, sums: dict) -> None:
        ppo = self.cfg.ppo
        # DeepSpeed averages over ranks and accumulation; the loss is a mean over all tokens of the optimiser batch.
        scale = engine.world_size() * self.actor.accumulation
        if step > ppo.critic_warmup_steps:
            logps, entropy = self.actor(
                m.input_ids, m.attention_mask, m.is_response, with_entropy=ppo.entropy_coef > 0, lower=m.lower
            )  # fmt: skip
            loss, stats = policy_loss(
                logps, m.logprobs, m.advantages, m.is_response, ppo.clip.low, ppo.clip.high,
                dual_clip=ppo.clip.dual, is_weight=m.is_weight, denominator=tokens,
            )  # fmt: skip
            total = loss if entropy is None else loss - ppo.entropy_coef * entropy.sum() / tokens
            self.actor.backward(total * scale)
            self.actor.step()
            add(sums, policy_loss=loss, **stats)
        values = self.values(m)
        loss, clipfrac = value_loss(values, m.values, m.returns, m.is_response, ppo.clip.value, denominator=tokens)
        self.critic.backward(loss * scale)
        self.critic.step()
        add(sums, value_loss=loss, value_clipfrac=clipfrac)

    def _grad_norm(self, trained: engine.Engine, step: int) -> float:
        return trained.grad_norm if step > self.cfg.ppo.critic_warmup_steps else 0.0

    def _log(self, step: int, stats: dict, rollout: Rollout) -> None:
        samples = engine.gather_rows(rollout.samples[:4])
        if engine.rank() != 0:
            return
        self.writer = self.writer or SummaryWriter(self.out / "tensorboard", purge_step=step)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **stats}) + "\n")
        with (self.out / "samples.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in samples)
        for name, value in stats.items():
            self.writer.add_scalar(f"ppo/{name}", value, step)
        self.writer.flush()
        tqdm.write(
            "ppo {step:>4}: proxy {proxy_mean:+.3f} +- {proxy_se:.3f}  KL {kl_nats_per_response:.2f}  tokens "
            "{response_tokens:.0f}  EOS {eos_rate:.0%}  {seconds_total:.0f} s".format(step=step, **stats)
        )

    def _checkpoint(self, step: int) -> None:
        ppo, last = self.cfg.ppo, step == self.cfg.ppo.steps
        if step % ppo.checkpoint_every == 0 or last:
            self._save_policy(self.out / "checkpoints" / f"step-{step:04d}")
        if step % ppo.save_every == 0 and not last:
            folder = self.out / "state" / f"{step:06d}"
            self.actor.save(folder / "actor")
            self.critic.save(folder / "critic")
            torch.distributed.barrier()
            if engine.rank() == 0:
                write_json(self.out / "state" / "last.json", {"step": step, "kl": self.kl.state_dict()})
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
        """The first step to run: 1, or the one after the last saved state. All draws are named by step."""
        mark = self.out / "state" / "last.json"
        if not mark.is_file():
            if engine.rank() == 0:
                for name in ("metrics.jsonl", "samples.jsonl"):
                    (self.out / name).unlink(missing_ok=True)
            return 1
        state = read_json(mark)
        folder = self.out / "state" / f"{state['step']:06d}"
        self.actor.load(folder / "actor")
        self.critic.load(folder / "critic")
        self.kl.load_state_dict(state["kl"])
        self.generator.wake()
        self.generator.sync(self.actor.named_weights(self.actor.module.lm))
        self.generator.sleep()
        if engine.rank() == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                lines = (self.out / name).read_text().splitlines(keepends=True)
                (self.out / name).write_text("".join(x for x in lines if json.loads(x)["step"] <= state["step"]))
        return state["step"] + 1

    def finish(self) -> None:
        """The result: a merged policy that transformers and vLLM load as it is. Resume states are dropped."""
        lm = self.actor.module.lm
        weights = list(self.actor.named_weights(lm))
        if engine.rank() == 0:
            save_lm(self.out / "policy", lm.config, weights, self.tokenizer)
            shutil.rmtree(self.out / "state", ignore_errors=True)
            if self.writer:
                self.writer.close()


def add(sums: dict, **values: torch.Tensor) -> None:
    for key, value in values.items():
        sums[key] = sums.get(key, 0.0) + float(value.detach())


def summary(metrics: Path) -> dict:
    """Headline and first and last step."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
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
