"""Stage `sft`: fine-tune the policy on demonstrations, before anything is sampled from it.

The loop is TRL's (`sft.trainer`). The tokens are those that the policy generates (`core.data.chat`), and the loss is on
the assistant's alone (`sft.examples`).
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch

from core import starting, whereabouts
from core.artefacts import RESUME
from core.batching import in_epochs
from core.config import Config
from core.data.chat import ChatTokenizer
from core.data.splits import held_out_prompts
from core.data.streams import stream_seed
from core.files import read_rows
from core.models.architecture import max_positions
from core.models.loading import load_causal_lm, save_lm
from core.models.lora import add_lora
from core.stopping import MARK, Stopped
from core.training import distributed
from sft.examples import load_examples
from sft.record import METRICS, NOT_FINITE, Record, silence
from sft.trainer import Trainer


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Run the stage on this rank, or resume it: `policy/`, `metrics.jsonl`, `demonstrations.parquet`, `rejected.jsonl`.

    Args:
        inputs: folder of the stage `prompts`, on whose evaluation prompts nothing is trained.
        out: folder of this stage.

    Returns:
        The metrics of the stage on the first rank, nothing on the others.

    Raises:
        Stopped: SIGTERM came; the state after the current step is saved.
    """
    distributed.init_distributed()
    sft, settings = cfg.sft, cfg.engine_of("sft")
    assert sft, "grm does not run the stage without its section"
    first = distributed.rank() == 0
    tokenizer = ChatTokenizer(cfg.policy)
    tokenizer.check()
    lm = load_causal_lm(cfg.policy, dtype=settings.dtype)
    about = copy.deepcopy(lm.config)  # the trainer changes its own
    found = load_examples(
        sft, tokenizer, system=cfg.data.system, held_out=held_out_prompts(inputs["prompts"]),
        positions=max_positions(lm), seed=cfg.run.seed, out=out if first else None,
    )  # fmt: skip
    if sft.lora:
        torch.manual_seed(stream_seed(cfg.run.seed, "sft", "adapter"))
        lm = add_lora(lm, sft.lora)
    seeds = [stream_seed(cfg.run.seed, "sft", "order", epoch) for epoch in range(sft.epochs)]
    batches = in_epochs(len(found.train), sft.global_batch, seeds)
    record = Record(
        out, total=len(batches), of_epoch=len(batches) // sft.epochs, val=found.val, micro_batch=sft.micro_batch
    )
    trainer = Trainer(
        lm, tokenizer, sft, settings, [found.train[i] for batch in batches for i in batch], out,
        seed=stream_seed(cfg.run.seed, "sft", "noise"), callbacks=[record],
    )  # fmt: skip
    record.trainer = trainer
    silence(trainer)
    starting.working()
    trainer.resume()
    if record.stopped:
        step = trainer.state.global_step
        if first:
            (out / MARK).write_text(f"after step {step}\n")
        torch.distributed.barrier()
        raise Stopped(f"stopped after step {step} of {len(batches)} ({record.stopped}); the same command resumes there")
    distributed.check_finite("sft, after the last step", {"trained weights": trainer.trained_values()}, NOT_FINITE)
    whereabouts.enter("save")
    weights = [(name, weight.cpu()) for name, weight in trainer.named_weights() if first]
    if not first:
        return {}
    save_lm(out / "policy", about, weights, tokenizer)
    shutil.rmtree(out / RESUME, ignore_errors=True)
    (out / MARK).unlink(missing_ok=True)
    counts = {"train": len(found.train), "val": len(found.val)}
    return summary(out / METRICS, counts) | {
        "dropped": found.dropped,
        "rejected": dict(found.malformed.counts),
        "changed": dict(found.malformed.changed),
    }


def summary(metrics: Path, demonstrations: dict[str, int]) -> dict:
    """A headline, and NLLs from metrics.jsonl.

    Returns:
        `loss`: of the first and the last step. `nll_held_out`: before training and after the last epoch, in nats per
        token; None without held-out demonstrations.
    """
    rows = read_rows(metrics)
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["nll_held_out"] for row in rows if "nll_held_out" in row]
    name, series = ("held-out NLL", held_out) if held_out else ("loss", losses)
    shown = f"{name} {series[0]:.3f} -> {series[-1]:.3f} nats per token"
    return {
        "headline": f"{shown}, {len(losses)} steps on {demonstrations['train']} demonstrations",
        "demonstrations": demonstrations,
        "steps": len(losses),
        "loss": {"first": losses[0], "last": losses[-1]},
        "nll_held_out": {"first": held_out[0], "last": held_out[-1]} if held_out else None,
    }
