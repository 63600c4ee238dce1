"""PPO's models on one backbone and on backbones of their own: steps, states, policies and bytes, on one or two ranks.

A case is STAGE|PROXY|START[|OPTION...], START being that of the critic.
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import torch

from core.batching import balanced, pad_right
from core.config import Config
from core.data.chat import ChatTokenizer
from core.files import read_tensors
from core.models.layers import states_at
from core.models.loading import load_causal_lm
from core.models.shared_weights import SharedWeights
from core.training import distributed
from core.training.engine import Engine
from core.training.sharding import gathered
from core.training.weights import save_adapter
from ppo.models import Engines, make_critic, make_engines, make_policy
from ppo.policy import PolicyModule
from ppo.records import Micro
from ppo.rewards import RewardScale
from ppo.update import Learner
from tests.builders.plain_engine import PlainEngine
from tests.builders.ppo_problem import minibatch_of
from tests.programs.training.critic_problem import SEED, STEPS, configuration

ROWS = 8


def rollout(step: int) -> list[dict]:
    """Eight responses with a shift of the reference's log-probs and a reward each."""
    g = torch.Generator().manual_seed(50 + step)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    sizes = [(draw(2, 6), draw(3, 10)) for _ in range(ROWS)]
    return [
        {"ids": torch.randint(5, 200, (p + r,), generator=g).tolist(), "prompt": p,
         "proxy": float(torch.randn(1, generator=g))} for p, r in sizes
    ]  # fmt: skip


def micro_of(rows: list[dict]) -> Micro:
    ids, mask = pad_right([r["ids"] for r in rows], 0)
    is_response = torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
    for b, r in enumerate(rows):
        is_response[b, r["prompt"] - 1 : len(r["ids"]) - 1] = True
    numbers = torch.arange(len(rows))
    m = Micro(ids, mask, is_response, None, torch.ones(len(rows), dtype=torch.bool), numbers, numbers)
    m.proxy = torch.tensor([r["proxy"] for r in rows])
    return m


def steps(cfg: Config, actor, critic, reference, *, first: int, layers=None, world: int = 1, rank: int = 0) -> None:
    """PPO steps from `first` on; reference passes between those of actor and critic, as in a run."""
    learner = Learner(cfg.ppo, actor, critic, RewardScale(cfg.ppo.reward, 0.1, 0.7), seed=SEED)
    switched = {"reference": True} if reference is actor else {}
    for step in range(first, STEPS + 1):
        mine = list(enumerate(rollout(step)))[rank * ROWS // world :][: ROWS // world]
        minibatches = []
        for number in range(cfg.ppo.minibatches):
            rows = [row for i, row in mine if minibatch_of(i) == number]
            parts = balanced([len(row["ids"]) for row in rows], actor.accumulation)
            minibatches.append([micro_of([rows[i] for i in part]) for part in parts])
        micros = [m for minibatch in minibatches for m in minibatch]
        with torch.no_grad():
            for m in micros:
                if layers:
                    m.frozen = layers(m.input_ids, m.attention_mask)
                read = m.input_ids, m.attention_mask, m.is_response
                m.logprobs = actor(*read, frozen=states_at(m.frozen, actor.continues))[0]
                m.ref_logprobs = reference(*read, frozen=states_at(m.frozen, reference.continues), **switched)[0]
                m.critic_outputs = learner.critic_outputs(m)
        learner.advantages(micros, 0.1)
        learner.update(minibatches, step, 0.1)


def trained(*engines) -> dict[str, torch.Tensor]:
    found = {}
    for which, engine in zip(("actor", "critic"), engines, strict=True):
        if isinstance(engine, Engine):
            engine.settle()
        for name, weight in engine.module.named_parameters():
            if weight.requires_grad:
                with gathered([weight]):
                    found[f"{which}.{name}"] = weight.detach().cpu().clone()
    return found


def backbone_bytes(engines: Engines) -> int:
    """Of the frozen weights of all language models, each storage once."""
    modules = [engines.actor.module, engines.reference.module]
    modules += [e.module for e in (engines.critic, engines.frozen_layers) if e]
    modules += [member.module for member in engines.proxy._members] if engines.proxy else []
    parameters = {p for module in modules for name, p in module.named_parameters() if not name.startswith("head")}
    weights = [getattr(p, "ds_tensor", p) for p in parameters if not p.requires_grad]
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}
    return sum(storages.values())


@contextlib.contextmanager
def backbones_of_their_own():
    take, SharedWeights.take = SharedWeights.take, lambda *_: 0
    try:
        yield
    finally:
        SharedWeights.take = take


def made(cfg: Config, models: Path) -> Engines:
    return make_engines(
        cfg.ppo, cfg.policy, cfg.engine_of("ppo"), temperature=0.8, reward_models=models,
        tokenizer=ChatTokenizer(cfg.policy), seed=SEED,
    )  # fmt: skip


def plain(cfg: Config, models: Path) -> dict[str, torch.Tensor]:
    """Two separate models in plain PyTorch, on one process."""
    settings = cfg.engine_of("ppo").model_copy(update={"zero_stage": 0})
    actor = PolicyModule(make_policy(cfg.ppo, cfg.policy, settings, SEED), 0.8)
    critic = make_critic(cfg.ppo, cfg.policy, settings, models, ChatTokenizer(cfg.policy), SEED)
    engines = []
    for module, optim in ((actor, cfg.ppo.actor), (critic, cfg.ppo.critic)):
        module.float().train()
        weights = [p for p in module.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(weights, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
        engines.append(PlainEngine(module, adamw, 2, optim.max_grad_norm))
    reference = engines[0]
    if not cfg.ppo.lora:
        base = PolicyModule(load_causal_lm(cfg.policy, dtype="float32"), 0.8)
        reference = PlainEngine(base, adamw)
    steps(cfg, *engines, reference, first=1)
    return trained(*engines)


def run(case: str, base: str, models: Path, out: Path) -> dict:
    stage, proxy, start, *options = case.split("|")
    cfg = configuration(base, int(stage), f"ppo.proxy={proxy}", f"ppo.critic_init={start}", *options)
    world = {"world": distributed.world_size(), "rank": distributed.rank()}
    found, weights = {}, {}
    for name, block in (("shared", contextlib.nullcontext()), ("separate", backbones_of_their_own())):
        with block:
            engines = made(cfg, models)
        row = found[name] = {"bytes": backbone_bytes(engines)}
        before = trained(engines.actor, engines.critic)
        of = (engines.actor, engines.critic, engines.reference)
        row["proxy"] = proxy_scores(engines)
        steps(cfg, *of, first=1, layers=engines.frozen_layers, **world)
        weights[name] = trained(*of[:2])
        row["moved"] = sum(not torch.equal(w, before[k]) for k, w in weights[name].items())
        row["trained"] = len(before)
        row["proxy after"] = proxy_scores(engines)
        if name == "shared":
            found["resumed"] = resumed(cfg, models, engines, out, world)
            found["policy"] = policy_files(engines, out)
        del engines, of
        gc.collect()
    found["equal"] = all(torch.equal(w, weights["separate"][k]) for k, w in weights["shared"].items())
    if cfg.engine_of("ppo").dtype == "float32":
        expected = plain(cfg, models)
        assert weights["shared"].keys() == expected.keys()
        found["from plain"] = max(float((w - expected[k]).abs().max()) for k, w in weights["shared"].items())
    return found


def proxy_scores(engines: Engines) -> list[float]:
    if not engines.proxy:
        return []
    rows = [{"prompt": [{"role": "user", "content": f"Question {i}?"}], "response": f"Answer {i}."} for i in range(2)]
    return engines.proxy.score(rows).tolist()


def resumed(cfg: Config, models: Path, engines: Engines, out: Path, world: dict) -> bool:
    """Whether fresh engines that read the state do a step more as these do."""
    engines.actor.save(out / "actor")
    engines.critic.save(out / "critic")
    torch.distributed.barrier()
    fresh = made(cfg, models)
    fresh.actor.load(out / "actor")
    fresh.critic.load(out / "critic")
    ends = []
    for of in (engines, fresh):
        steps(cfg, of.actor, of.critic, of.reference, first=STEPS, layers=of.frozen_layers, **world)
        ends.append(trained(of.actor, of.critic))
    return all(torch.equal(w, ends[1][k]) for k, w in ends[0].items())


def policy_files(engines: Engines, out: Path) -> dict:
    """Names in a saved policy's adapter, and whether its whole weights are those of the base but for its own."""
    whole = [name for name, _ in engines.actor.named_weights(engines.actor.module.lm)]
    if not hasattr(engines.actor.module.lm, "peft_config"):
        return {"adapter": True, "names": whole}
    save_adapter(out / "policy", engines.actor.module.lm)
    torch.distributed.barrier()
    adapter = read_tensors(out / "policy" / "adapter_model.safetensors")
    own = {n.replace(".default.", "."): p for n, p in engines.actor.module.lm.named_parameters() if "lora_" in n}
    equal = adapter.keys() == own.keys()
    for name, weight in own.items():
        with gathered([weight]):
            equal = equal and torch.equal(weight.detach().cpu(), adapter[name])
    return {"adapter": equal, "names": whole}


def main(base: str, models: str, out: str, *cases: str) -> None:
    distributed.init_distributed()
    found = {}
    for number, case in enumerate(cases):
        found[case] = run(case, base, Path(models), Path(out) / str(number))
    if distributed.rank() == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
