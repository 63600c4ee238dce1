"""Stage `ppo`: optimise the policy against the proxy reward with PPO (1707.06347), a critic and a KL penalty.

Actor and critic are trained under a DeepSpeed engine each. Reference and proxy run without gradients. Every rank
samples its own prompts with its own vLLM, or from a server. Gold is not among the inputs of this stage, unless
`ppo.watch_gold` has it measured, and then training does not see it.

`Trainer.step` is the loop. `ppo.rollout` collects a rollout and `ppo.update` trains on it.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from core import starting, whereabouts
from core.artefacts import RESUME
from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.splits import read_split
from core.data.streams import stream_seed
from core.generation.local import Generator
from core.generation.remote import ServerGenerator
from core.models.loading import save_lm
from core.stopping import MARK, Stopped, StopSignal
from core.training import distributed
from core.training.saved import mark_state, saved_state
from core.training.weights import save_adapter
from ppo import guard
from ppo.card import write_card
from ppo.ema import WeightAverage
from ppo.faults import bundled
from ppo.keep import PolicyKeeper, Spacing
from ppo.log import RunLog, summary
from ppo.math import AdaptiveKL
from ppo.measured.held_out import HeldOut, watched_gold
from ppo.measured.rollouts import completed
from ppo.models import make_engines
from ppo.probe import SyncProbe
from ppo.records import Clock, Rollout
from ppo.reward.mixed import MixedReward
from ppo.reward.own import own_rewards
from ppo.rewards import RewardScale
from ppo.rollout import Collector, statistics
from ppo.sampling import make_generator
from ppo.saved import SavedFiles, check_saved
from ppo.update import Learner


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Run the stage on this rank, or resume it.

    Args:
        inputs: folders of the stages `prompts` and `rm`.
        out: folder of this stage.

    Returns:
        The metrics of the stage (`summary`) on the first rank, nothing on the others.

    Raises:
        Stopped: SIGTERM came; the state after the current step is saved.
    """
    trainer = Trainer(cfg, inputs, out)
    first, stop = trainer.resume(), StopSignal()
    steps = range(first, cfg.ppo.steps + 1)
    starting.working()
    progress = tqdm(
        steps, desc="ppo", unit="step", initial=first - 1, total=cfg.ppo.steps, disable=distributed.rank() != 0
    )
    with closing(trainer.collector.ahead):
        for step in progress:
            trainer.step(step)
            if (who := stop.requested()) and step < cfg.ppo.steps:
                trainer.save_state(step)
                if distributed.rank() == 0:
                    (out / MARK).write_text(f"after step {step}\n")
                torch.distributed.barrier()
                raise Stopped(f"stopped after step {step} of {cfg.ppo.steps} ({who}); the same command resumes there")
    trainer.finish()
    return summary(out / "metrics.jsonl") if distributed.rank() == 0 else {}


def tidy(cfg: Config, folder: Path) -> None:
    """Delete the state from which the stage could have been continued until its result was published."""
    if not cfg.ppo.keep_state:
        shutil.rmtree(folder / RESUME, ignore_errors=True)


class Trainer:
    """The parts of one PPO run, what a step does with them, and what the run writes.

    Every rank makes one, with the same arguments.
    """

    def __init__(self, cfg: Config, inputs: dict[str, Path], out: Path):
        distributed.init_distributed()
        # A state that cannot be continued is refused before models are loaded.
        state = saved_state(out, distributed.world_size())
        if distributed.rank() == 0 and "written" in state:
            check_saved(out, state["written"], keeps_all=cfg.ppo.keep_policies is None)
        self.cfg, self.out, self.reward_models = cfg, out, inputs["rm"]
        seed = stream_seed(cfg.run.seed, "ppo", cfg.ppo.seed)
        self.tokenizer = ChatTokenizer(cfg.policy)
        own = own_rewards(cfg.ppo.reward, self.tokenizer)  # a function that is not there fails now
        gold = watched_gold(cfg)
        prompts = read_split(inputs["prompts"], "rl_train")
        self.generator = make_generator(cfg.ppo, cfg.policy, cfg.generation, sync_folder=out / "sync")
        self.generator.sleep()
        engines = make_engines(
            cfg.ppo, cfg.policy, cfg.engine_of("ppo"), temperature=cfg.generation.temperature,
            reward_models=inputs["rm"], tokenizer=self.tokenizer, seed=seed,
        )  # fmt: skip
        self.actor, self.critic = engines.actor, engines.critic
        reward = MixedReward(cfg.ppo.reward, engines.proxy, own)
        self.scale = RewardScale(cfg.ppo.reward, reward.mean, reward.std)
        longest = cfg.generation.max_new_tokens
        self.learner = Learner(cfg.ppo, self.actor, self.critic, self.scale, seed, longest)
        self.kl = AdaptiveKL(cfg.ppo.kl.coef, cfg.ppo.kl.target, cfg.ppo.kl.horizon)
        self.probe = SyncProbe(self.actor, self.generator, dtype=getattr(torch, cfg.generation.vllm.dtype))
        self.collector = Collector(
            cfg.ppo, engines, self.learner, self.generator, self.probe, reward, prompts=prompts, seed=seed
        )
        self.held_out = None
        if cfg.ppo.eval_every:
            self.held_out = HeldOut(
                cfg.ppo, engines, reward, self.generator,
                prompts=read_split(inputs["prompts"], "rm_val"), gold=gold, seed=seed,
            )  # fmt: skip
        self.policies = PolicyKeeper(out, cfg.ppo.keep_policies)
        self.saved = SavedFiles(out)
        self.spacing = Spacing(cfg.ppo.checkpoint_every, cfg.ppo.checkpoint_kl)
        self.average = WeightAverage(self.actor.module.lm, cfg.ppo.ema) if cfg.ppo.ema else None
        offloads = cfg.ppo.offload_while_sampling and torch.cuda.is_available()
        self.offloaded = [engine for engine in (self.actor, self.critic) if engine] if offloads else []
        self.log: RunLog | None = None

    def step(self, step: int) -> None:
        """One iteration of PPO: a rollout, updates on it, the new weights to vLLM.

        Raises:
            DataError: vLLM does not run the actor's weights, before the updates or after the sync; or a number is
                NaN or infinite (`NotFinite`, with a bundle for `grm replay`). Nothing of the step is saved then.
        """
        if step == 1:
            self._evaluate(0)
        clock = Clock()
        whereabouts.enter("collect", step)
        rollout = self.collector.collect(step)
        try:
            self._train(step, rollout, clock)
            self._checkpoint(step)
        except distributed.NotFinite as fault:
            raise bundled(
                fault, self.cfg, self.out, step=step, rollout=rollout, learner=self.learner, kl_coef=self.kl.coef,
                reward_models=self.reward_models,
            ) from None  # fmt: skip

    def _train(self, step: int, rollout: Rollout, clock: Clock) -> None:
        """What a step does with its rollout."""
        guard.check_rollout(step, rollout)
        stats = statistics(rollout)
        if not rollout.behind:  # with ppo.overlap, vLLM and the actor differ by updates too
            guard.check_mismatch(step, stats["mismatch_mean_abs"])
        if self.spacing.measured(step - 1, stats["kl_nats_per_response"]):
            self._save_policy(self.policies.folder(step - 1))
        self.probe.before()
        clock.lap("collect")

        whereabouts.enter("train", step)
        stats |= self.learner.advantages(rollout.micros, self.kl.coef)
        guard.check_advantages(step, rollout.micros)
        for engine in self.offloaded:
            engine.reload_states()
        stats |= self.learner.update(rollout.minibatches, step, self.kl.coef)
        guard.check_weights(step, self.actor, self.critic)
        for engine in self.offloaded:
            engine.offload_states()
        clock.lap("train")

        whereabouts.enter("sync", step)
        if self.average:
            self.actor.settle()
            self.average.update()
        self.generator.wake("weights")
        self._sync(step)
        guard.check_merged(step, self.probe.merged)
        self.generator.wake("kv_cache")  # not before, so that it is not there while whole weights are gathered
        clock.lap("sync")
        stats |= self.probe.after(step)
        self.generator.sleep()
        clock.lap("probe")
        guard.check_metrics(step, stats)

        whereabouts.enter("save", step)
        self._record(step, rollout, stats | {"kl_coef": self.kl.coef} | self._lost(), clock)
        self.kl.update(stats["kl_nats_per_response"], self.cfg.ppo.rollouts)
        self._evaluate(step)

    def _lost(self) -> dict[str, float]:
        """By options that are set: updates that `skip_above` has left out so far, and servers that are left out."""
        found: dict[str, float] = {}
        if isinstance(self.generator, ServerGenerator) and self.cfg.ppo.server_retries:
            found["servers_lost"] = len(self.generator.lost)
        if self.cfg.ppo.actor.skip_above:
            found["actor_updates_skipped"] = self.actor.skipped
        if self.cfg.ppo.critic.skip_above and self.critic:
            found["critic_updates_skipped"] = self.critic.skipped
        return found

    def _evaluate(self, step: int) -> None:
        """Measure the policy after `step` on held-out prompts, if it is its turn."""
        if self.held_out and self.cfg.ppo.eval_every and step % self.cfg.ppo.eval_every == 0:
            self.collector.ahead.drain()
            self.generator.wake()
            stats = self.held_out.evaluate(step)
            if self.log:
                self.log.held_out(step, stats)

    def _record(self, step: int, rollout: Rollout, stats: dict[str, float], clock: Clock) -> None:
        """Write the step's metrics and responses, and the score of the policy that sampled them."""
        seconds = rollout.seconds | {k: clock.seconds[k] for k in ("train", "sync", "probe")}
        stats |= {f"seconds_{phase}": s for phase, s in seconds.items()}
        stats["seconds_total"] = sum(clock.seconds.values())
        stats["tokens_per_second"] = stats.pop("tokens") / stats["seconds_total"]
        rows = distributed.gather_rows(completed(rollout) if self.cfg.ppo.keep_rollouts_mib else rollout.samples[:4])
        if self.log:
            self.log.step(step, stats, rows)
            penalty = stats["kl_coef"] * stats["kl_nats_per_response"]
            if rollout.of_one_policy:
                self.policies.scored(rollout.policy, stats["reward_mean"] - penalty)

    def _sync(self, step: int) -> None:
        """Give vLLM the weights after `step`, as `ppo.sync` says: whole weights, or the adapter."""
        with self.collector.ahead.renewed(step):
            lm = self.actor.module.lm
            if self.cfg.ppo.sync == "weights":
                return self.generator.sync(self.actor.named_weights(lm, watch=self.probe.watch))
            folder = self.out / "sync"
            self.actor.settle()
            save_adapter(folder, lm)
            torch.distributed.barrier()
            assert isinstance(self.generator, Generator), "the configuration refuses ppo.sync=adapter with servers"
            self.generator.load_adapter(folder)
            torch.distributed.barrier()  # until then the files must not be overwritten

    def _checkpoint(self, step: int) -> None:
        ppo, last = self.cfg.ppo, step == self.cfg.ppo.steps
        policy = self.spacing.after(step) or last
        state = ppo.keep_state if last else step % ppo.save_every == 0
        if policy or state:
            guard.check_weights(step, self.actor, self.critic)
        if policy:
            self._save_policy(self.policies.folder(step))
        if state:
            self.save_state(step)

    def save_state(self, step: int) -> None:
        """What `resume` needs. Draws are named by step, so there are no random states; the mark is written last."""
        folder = self.out / RESUME / f"{step:06d}"
        self.actor.save(folder / "actor")
        if self.critic:
            self.critic.save(folder / "critic")
        if self.average:
            self.average.save(folder)
        torch.distributed.barrier()
        if distributed.rank() == 0:
            state: dict = {"kl": self.kl.state_dict(), "scale": self.scale.state_dict()}
            state |= {"ranks": distributed.world_size(), "spacing": self.spacing.state_dict()}
            state |= {"average": self.average.digest(folder)} if self.average else {}
            state |= {"scores": self.policies.scores(), "written": self.saved.record(folder)}
            mark_state(self.out, {"step": step, **state})
            for old in (self.out / RESUME).glob("[0-9]*"):
                if old != folder:
                    shutil.rmtree(old)

    def _save_policy(self, folder: Path) -> None:
        lm = self.actor.module.lm
        if self.cfg.ppo.lora:
            self.actor.settle()
            save_adapter(folder, lm)
        else:
            self._save_merged(folder)
        if distributed.rank() == 0:
            self.saved.add_policy(folder)

    def _save_merged(self, folder: Path, **options) -> None:
        lm = self.actor.module.lm
        weights = self.actor.named_weights(lm, **options)
        if distributed.rank() == 0:
            save_lm(folder, lm.config, weights, self.tokenizer, shard_bytes=self.cfg.engine_of("ppo").shard_bytes)
        else:
            weights.take_part()

    def resume(self) -> int:
        """The first step to run: 1, or the one after the last saved state.

        Raises:
            ArtefactError: the state was written by another number of ranks, or is damaged.
        """
        state = saved_state(self.out, distributed.world_size())
        if state["step"]:
            folder = self.out / RESUME / f"{state['step']:06d}"
            self.actor.load(folder / "actor")
            if self.critic:
                self.critic.load(folder / "critic")
            if self.average:
                self.average.load(folder, state.get("average"))
            self.kl.load_state_dict(state["kl"])
            self.scale.load_state_dict(state["scale"])
            self.spacing.load_state_dict(state.get("spacing", self.spacing.state_dict()))  # earlier versions: none
        for engine in self.offloaded:
            engine.offload_states()
        if state["step"] or self.cfg.ppo.vllm_servers:  # servers may have the weights of another run
            self.generator.wake()
            self._sync(state["step"])
            self.generator.sleep()
        if distributed.rank() == 0:
            (self.out / MARK).unlink(missing_ok=True)
            self.policies.forget_after(state["step"], state.get("scores"))
            if "written" in state:
                self.saved.go_on(state["written"])
            self.log = RunLog(self.cfg, self.out, state["step"] + 1)
        return state["step"] + 1

    def finish(self) -> None:
        """The result: a merged policy that transformers and vLLM load as it is."""
        whereabouts.enter("finish")
        self._save_merged(self.out / "policy")
        if self.average:
            self._save_merged(self.out / "policy-ema", values=self.average.values)
        if distributed.rank() == 0:
            write_card(self.out / "policy" / "README.md", self.cfg, summary(self.out / "metrics.jsonl"))
            shutil.rmtree(self.out / "sync", ignore_errors=True)
            if self.log:
                self.log.close()
