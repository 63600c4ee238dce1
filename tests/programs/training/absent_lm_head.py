"""Reward models and critics with and without an LM head that nothing reads, on the ranks of torchrun.

A layout is STAGE:TYPE. Each trains a reward model without a text regulariser, and then a critic from it.
"""

import gc
import json
import os
import sys
import weakref
from pathlib import Path

import torch

import ppo.models
import rm.model
import rm.variants
from core.config import Config
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.files import file_digest
from core.models.logits import LmHead, leave_out_lm_head
from core.training import distributed
from core.training.engine import Engine
from core.training.sharding import gathered
from rm import train
from tests.builders.planted_pairs import pair_rows, settings

FREED: list[weakref.ref] = []


def watched(lm) -> None:
    """`leave_out_lm_head`, that keeps an eye on what it frees."""
    FREED.extend(weakref.ref(p) for p in LmHead.of(lm).linear.parameters())
    leave_out_lm_head(lm)


def configuration(base: str, stage: int, dtype: str, critic: str) -> Config:
    more = [
        f"engine.zero_stage={stage}", f"engine.dtype={dtype}", f"policy.path={base}", f"ppo.critic_init={critic}",
        "rm.global_batch=8", "ppo.critic.max_grad_norm=1000",  # a norm over other groups is rounded otherwise
    ]  # fmt: skip
    return load([], settings(base, micro_batch=2, common_epochs=1) + more)


def params(engine: Engine) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


def values(engine: Engine) -> dict[str, torch.Tensor]:
    engine.settle()
    found = {}
    for name, weight in engine.module.named_parameters():
        with gathered([weight]):
            found[name] = weight.detach().cpu().clone()
    return found


def reward_model(cfg: Config, folder: Path) -> dict:
    """Trained and saved; the numbers of its parameters, and digests of its files."""
    variant = cfg.rm.variants["it"]
    engine, model, _ = train.fit(cfg.rm, cfg.engine, variant, pair_rows(32, seed=1), folder / "log", name="it", seed=0)
    train.save(cfg.rm, engine, model, variant, folder / "it", seed=0, shard_bytes=200_000)
    torch.distributed.barrier()
    files = {f.name: file_digest(f) for f in sorted((folder / "it").iterdir()) if f.is_file()}
    return {"params": params(engine), "files": files}


def refused(engine: Engine, state: Path) -> str:
    """What is said of a state that another model has saved."""
    try:
        engine.load(state)
    except ArtefactError as error:
        return str(error)
    return ""


def critic(cfg: Config, folder: Path, earlier: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """After three updates, with those of another one that went on from its saved state after two."""
    tokenizer = ChatTokenizer(cfg.policy)

    def made() -> Engine:
        torch.manual_seed(3)
        module = ppo.models.make_critic(cfg.ppo, cfg.policy, cfg.engine, folder, tokenizer, 0)
        return Engine(module, cfg.engine, micro_batch=2, optim=cfg.ppo.critic, total_steps=3)

    def update(engine: Engine, step: int) -> None:
        ids = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(10 * step + distributed.rank()))
        found = engine(ids.to(distributed.device()), torch.ones_like(ids), read=torch.arange(24))[0]
        engine.backward((found - torch.linspace(-1, 1, 24)).square().mean())
        engine.step()

    engine = made()
    for step in range(3):
        if step == 2:
            engine.save(folder / "state")
            torch.distributed.barrier()
        update(engine, step)
    resumed = made()
    resumed.load(folder / "state")
    update(resumed, 2)
    one, other = values(engine), values(resumed)
    same = one.keys() == other.keys() and all(torch.equal(w, other[k]) for k, w in one.items())
    found = {"params": params(engine), "resumed": same, "grad_norm": engine.grad_norm}
    if earlier.is_dir() and earlier != folder:
        found["refused"] = refused(made(), earlier / "state")
    return found, one


def main(base: str, out: str, *layouts: str) -> None:
    distributed.init_distributed()
    found = {}
    for layout in layouts:
        stage, dtype = layout.split(":")
        row, critics = {}, []
        for kept in (True, False):
            for module in (rm.model, rm.variants, ppo.models):
                module.leave_out_lm_head = (lambda lm: None) if kept else watched
            folder = Path(out) / layout / ("kept" if kept else "left out")
            row["kept" if kept else "left out"] = of = {}
            of["rm"] = reward_model(configuration(base, int(stage), dtype, "proxy"), folder)
            for start in ("proxy", "policy"):
                # Each start overwrites the state of the one before.
                earlier = Path(out) / layout / "kept"
                of[start], weights = critic(configuration(base, int(stage), dtype, start), folder, earlier)
                critics.append(weights)
                torch.distributed.barrier()
        pairs = list(zip(critics[:2], critics[2:], strict=True))
        row["critics equal"] = all(torch.equal(w, a[name]) for a, b in pairs for name, w in b.items())
        row["left out of critics"] = [sorted(a.keys() - b.keys()) for a, b in pairs]
        gc.collect()
        row["freed"] = [reference() is None for reference in FREED]
        FREED.clear()
        found[layout] = row
    if distributed.rank() == 0:
        (Path(out) / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
