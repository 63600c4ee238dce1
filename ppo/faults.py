"""Bundles of PPO steps whose numbers were NaN or infinite, and what `grm replay` computes from them.

Every phase of a step has its own: a pass without gradients of one model (`rollout`), advantages, passes with gradients
of one model (`loss`), those of a whole minibatch (`gradient`), trained weights (`weights`), and metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import Config, Ppo
from core.data.chat import ChatTokenizer
from core.models.loading import load_causal_lm
from core.models.tracing import Trace, gradients, traced
from core.training import distributed
from core.training.bundles import Bundle, faults_folder, put_weights, save_bundle
from core.training.distributed import NotFinite
from core.training.weights import named_weights
from ppo.guard import METRIC, OF_ADVANTAGES, OF_ROLLOUT, WEIGHTS_OF
from ppo.methods.correction import importance_weights
from ppo.models import make_critic, make_policy
from ppo.policy import PolicyModule
from ppo.records import Micro, Rollout
from ppo.rewards import RewardScale
from ppo.update import Learner
from rm.model import RewardModel
from rm.score import score_tokens

FIELDS = ("input_ids", "attention_mask", "is_response", "sampler_logprobs", "finished", "group", "rows", "proxy",
          "logprobs", "ref_logprobs", "critic_outputs", "values", "advantages", "returns", "is_weight")  # fmt: skip
"""Of a micro-batch: what a bundle keeps, the arguments of `Micro` first."""
ARGUMENTS = 7


def phase_of(name: str) -> tuple[str, str]:
    """The phase that a tensor belongs to, and the model that it comes from: "" for none, "proxy" for the reward models.

    Args:
        name: in the words of `ppo.guard`.
    """
    of_critic = any(word in name for word in ("critic", "value_"))
    if name in OF_ROLLOUT.values():
        return "rollout", "proxy" if name == OF_ROLLOUT["proxy"] else "critic" if of_critic else "actor"
    if name in OF_ADVANTAGES.values():
        return "advantages", ""
    if name.startswith(WEIGHTS_OF):
        return "weights", name.removeprefix(WEIGHTS_OF).split(",")[0].strip()
    if name.startswith(METRIC):
        return "metrics", ""
    return "gradient" if name.endswith("grad_norm") else "loss", "critic" if of_critic else "actor"


def bundled(
    fault: NotFinite, cfg: Config, out: Path, *, step: int, rollout: Rollout, learner: Learner, kl_coef: float,
    reward_models: Path,
) -> NotFinite:  # fmt: skip
    """Write the bundle of a fault into the run's folder; the fault with a message that names it.

    Every rank must call it.

    Args:
        out: the folder of the stage.
        reward_models: the folder of stage `rm`.
    """
    phase, model = phase_of(fault.name)
    here = fault.rank == distributed.rank()
    mine: list[Micro] = []
    if phase in ("rollout", "loss") and here:
        of_phase = rollout.micros if phase == "rollout" else learner.minibatch
        mine = [of_phase[k] for k in fault.parts]
    elif phase == "advantages":
        mine = rollout.micros
    elif phase == "gradient":
        mine = learner.minibatch
    numbers = [i for m in mine for i in m.rows.tolist()] if model == "proxy" else []
    read = [rollout.responses[i] for i in numbers]
    minibatch = learner.minibatch
    tokens, sequences = distributed.global_sum(
        float(sum(int(m.is_response.sum()) for m in minibatch)), float(sum(len(m.rows) for m in minibatch))
    )
    rows = [({f: getattr(m, f).cpu() for f in FIELDS if getattr(m, f, None) is not None}, m.prompt_ids) for m in mine]
    kept = distributed.gather_rows([(distributed.rank(), *row) for row in rows])
    about: dict[str, Any] = {
        "stage": "ppo", "phase": phase, "model": model, "step": step, "config": cfg.model_dump(mode="json"),
        "seed": learner.seed, "kl_coef": kl_coef, "scale": learner.scale_before, "tokens": tokens,
        "sequences": sequences,
        "reward_models": str(reward_models), "responses": distributed.gather_rows(read),
        "fixed_scale": [learner.scale.mean, learner.scale.std],
        "micros": [{"rank": rank, "prompts": list(prompts)} for rank, _, prompts in kept],
    }  # fmt: skip
    inputs = {f"{i}.{name}": tensor for i, (_, fields, _) in enumerate(kept) for name, tensor in fields.items()}
    engine = {"actor": learner.actor, "critic": learner.critic}.get(model)
    folder = faults_folder(out) / f"ppo-step-{step:04d}"
    return save_bundle(fault, folder, about, inputs, engine.module if engine else None)


def replay(bundle: Bundle) -> tuple[bool, list[str]]:
    """Run the computation of a bundle again, in this process; whether the fault was seen again, and lines about it."""
    return _Again(bundle).run()


class _Alone:
    """A module in the place of its engine: one process, gradients as they come."""

    accumulation, continues = 1, 0

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class _Again:
    def __init__(self, bundle: Bundle):
        self.bundle, self.about = bundle, bundle.about
        self.cfg = Config.model_validate(self.about["config"])
        self.name, self.model = self.about["name"], self.about["model"]
        self.micros = [self._micro(i) for i in range(len(self.about["micros"]))]

    def run(self) -> tuple[bool, list[str]]:
        return getattr(self, f"_{self.about['phase']}")()

    def _micro(self, i: int) -> Micro:
        tensors, where = self.bundle.inputs, distributed.device()
        given = {name: tensors[f"{i}.{name}"].to(where) for name in FIELDS if f"{i}.{name}" in tensors}
        made = Micro(**{name: given.pop(name) for name in FIELDS[:ARGUMENTS]})  # type: ignore[arg-type]
        for name, tensor in given.items():
            setattr(made, name, tensor)
        return made

    @property
    def _ppo(self) -> Ppo:
        return self.cfg.ppo

    def _module(self, *, train: bool = False) -> nn.Module:
        """The model of the bundle, with its weights."""
        settings, tokenizer = self.cfg.engine_of("ppo"), ChatTokenizer(self.cfg.policy)
        folder = Path(self.about["reward_models"])
        module: nn.Module
        if self.model == "critic":
            module = make_critic(self._ppo, self.cfg.policy, settings, folder, tokenizer, self.about["seed"])
        else:
            lm = make_policy(self._ppo, self.cfg.policy, settings, self.about["seed"])
            module = PolicyModule(lm, self.cfg.generation.temperature)
        put_weights(module, self.bundle.weights)
        return module.to(distributed.device()).train(train)

    def _learner(self, module: nn.Module | None) -> Learner:
        alone: Any = _Alone(module) if module else None
        scale = RewardScale(self._ppo.reward, *self.about["fixed_scale"])
        scale.load_state_dict(self.about["scale"])
        # Only whether there is a critic counts where the actor is run, and the other way round.
        critic, longest = alone if self._ppo.estimator == "gae" else None, self.cfg.generation.max_new_tokens
        return Learner(self._ppo, alone, critic, scale, self.about["seed"], longest)

    def _rollout(self) -> tuple[bool, list[str]]:
        if self.model == "proxy":
            return self._proxy()
        field = next(f for f, name in OF_ROLLOUT.items() if name == self.name)
        lines = []
        if field == "sampler_logprobs":
            lines = ["vLLM's own arithmetic is not repeated: these are log-probs by the actor, whose weights it had. "
                     "Where they are finite, the fault is vLLM's"]  # fmt: skip
        if field == "ref_logprobs" and not self._ppo.lora:
            base = load_causal_lm(self.cfg.policy, dtype=self.cfg.engine_of("ppo").dtype)
            module: nn.Module = PolicyModule(base, self.cfg.generation.temperature).to(distributed.device())
        else:
            module = self._module()
        learner, bad, size = self._learner(module), 0, 0
        with torch.no_grad(), traced(module) as trace:
            for m in self.micros:
                if self.model == "critic":
                    found = learner.critic_outputs(m)
                else:
                    reference = {"reference": True} if field == "ref_logprobs" and self._ppo.lora else {}
                    found = module(m.input_ids, m.attention_mask, m.is_response, **reference)[0]
                if field == "is_weight":
                    corrected = importance_weights(self._ppo.clip, found, m.sampler_logprobs, m.is_response)
                    found = corrected.weights if corrected else found
                bad, size = bad + int((~found.isfinite()).sum()), size + found.numel()
        return bad > 0, [*lines, f"{bad} of {size} {self.name} are NaN or infinite", *_where(trace, bad > 0)]

    def _proxy(self) -> tuple[bool, list[str]]:
        seen, lines = False, []
        for name in self._ppo.members:
            model = RewardModel.from_pretrained(
                Path(self.about["reward_models"]) / name, dtype=self.cfg.engine_of("ppo").dtype,
                attention=self.cfg.policy.attention, lm_head=False,
            )  # fmt: skip
            rows = [model.reader.row(row) for row in self.about["responses"]]
            with traced(model) as trace:
                rewards = score_tokens(model, model.tokenizer, rows, limits=model.limits, finite=False,
                                       device=distributed.device())  # fmt: skip
            bad = int((~rewards.isfinite()).sum())
            seen = seen or bad > 0
            lines += [f"{name}: {bad} of {len(rewards)} rewards are NaN or infinite", *_where(trace, bad > 0)]
        return seen, lines

    def _advantages(self) -> tuple[bool, list[str]]:
        self._learner(nn.Identity()).advantages(self.micros, self.about["kl_coef"])
        lines, seen = [], False
        for field, name in (OF_ROLLOUT | OF_ADVANTAGES).items():
            tensors = [getattr(m, field) for m in self.micros if getattr(m, field, None) is not None]
            bad = sum(int((~t.isfinite()).sum()) for t in tensors)
            seen = seen or (field in OF_ADVANTAGES and bad > 0)
            lines += [f"{bad} of {sum(t.numel() for t in tensors)} {name} are NaN or infinite"] if tensors else []
        return seen, lines

    def _passes(self, *, trace: bool) -> tuple[nn.Module, Trace, dict[str, list[float]]]:
        module = self._module(train=True)
        learner, found = self._learner(module), dict[str, list[float]]()
        with _traced(module, trace) as seen:
            for m in self.micros:
                if self.model == "critic":
                    stats = learner.critic_pass(m, self.about["tokens"])
                else:
                    stats = learner.policy_pass(m, self.about["tokens"], self.about["sequences"], self.about["kl_coef"])
                for name, value in stats.items():
                    found.setdefault(name, []).append(float(value.detach()))
        return module, seen, found

    def _loss(self) -> tuple[bool, list[str]]:
        _, trace, found = self._passes(trace=True)
        bad = {name: [x for x in values if not torch.tensor(x).isfinite()] for name, values in found.items()}
        seen = any(bad.values())
        lines = [f"{len(bad[name])} of {len(values)} values of {name} are NaN or infinite"
                 for name, values in found.items()]  # fmt: skip
        return seen, [*lines, *_where(trace, seen)]

    def _gradient(self) -> tuple[bool, list[str]]:
        module, *_ = self._passes(trace=False)
        return gradients(module)

    def _weights(self) -> tuple[bool, list[str]]:
        """Trained weights, and of adapters what they are merged into: what vLLM was given."""
        bad = _bad(self.bundle.weights)
        lines = [f"{len(bad)} of {len(self.bundle.weights)} trained weights are not finite", *bad]
        if self.model == "actor":
            module = self._module()
            assert isinstance(module, PolicyModule)
            merged = _bad(dict(named_weights(module.lm)))
            lines += [f"{len(merged)} weights of the whole policy are not finite", *merged]
            bad = bad or merged
        return bool(bad), lines

    def _metrics(self) -> tuple[bool, list[str]]:
        return False, ["A metric alone was not finite, and all that it is made from was: nothing is computed again"]


@contextmanager
def _traced(module: nn.Module, wanted: bool) -> Iterator[Trace]:
    with traced(module) if wanted else nullcontext(Trace()) as trace:
        yield trace


def _where(trace: Trace, seen: bool) -> list[str]:
    if trace.first:
        return [f"first in {trace.first}"]
    return ["every layer's output is finite, so it happens after the last one"] if seen else []


def _bad(weights: dict[str, Tensor]) -> list[str]:
    return [f"{name}: {int((~w.isfinite()).sum())} of {w.numel()}" for name, w in weights.items()
            if not w.isfinite().all()]  # fmt: skip
