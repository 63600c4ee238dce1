"""Counted work of the stages that sample, score and report, in one process: prompts, preferences, bon, eval, report."""

from __future__ import annotations

from bon.scores import CACHED_STATES
from pipelines.plan.sizes import Sizes, batches
from pipelines.plan.work import Fixed, Gather, Item, Judge, Kl, Load, Pass, Sample, Start, Write
from rm.model import UNPADDED_ROW
from rm.score import Limits

Phases = dict[str, list[Item]]
"""Phase of a stage -> its work."""

SCORE_TOKENS = 8192
"""Padded tokens of a batch that a reward model scores (`rm.score.score_tokens`)."""
ROW_BYTES = 700
"""Of a sample on disk, without its response tokens: prompt, text, ids; Parquet compresses them."""
TOKEN_BYTES = 6
REPORT_SECONDS = 12.0


def prompts(sizes: Sizes) -> Phases:
    return {"start": [Start("tokenizer")], "tokenise": [Fixed(sizes.lengths.seconds, "timed while planning")]}


def preferences(sizes: Sizes) -> Phases:
    """Two samples to each prompt of rm_train, rm_val and calibration, or of calibration alone; gold for all of them."""
    cfg, lengths = sizes.cfg, sizes.lengths
    pairs = 0 if cfg.preferences.sources else sum(lengths.pairs.values())
    count = pairs + lengths.calibration
    shard = min(cfg.preferences.shard_prompts, count)
    return {
        "start": [Start("tokenizer"), Start("vllm")],
        "sample": [sample(sizes, count, 2, shard)],
        "gold": gold(sizes, 2 * count),
        "write": [Write(pool_bytes(sizes, 4 * count))],
    }


def bon(sizes: Sizes) -> Phases:
    """A pool of N samples a prompt, scored by every reward model above the layers that they share, and by gold."""
    cfg = sizes.cfg
    count, n = bon_prompts(sizes), cfg.bon.samples
    phases: Phases = {
        "start": [Start("tokenizer"), Start("vllm")],
        "sample": [sample(sizes, count, n, min(cfg.bon.shard_prompts, count))],
    }
    total, length = pool_tokens(sizes)
    models = list(cfg.rm.variants.values())
    calls, tokens = batches(total, SCORE_TOKENS)
    states = total * sizes.base.hidden * sizes.bytes_per_weight
    common = min(sizes.untouched(v) for v in models) if len(models) > 1 and states <= CACHED_STATES else 0
    work: list[Item] = [Load(len(models), sizes.base.params)]
    if common:
        work.append(Pass(sizes.base, calls, tokens, length, common))
    for variant in models:
        shape = sizes.variant_shape(variant)
        work.append(Pass(shape, calls, tokens, length, shape.layers - common))
    return phases | {
        "score": work, "gold": gold(sizes, count * n), "write": [Write(pool_bytes(sizes, count * n))],
    }  # fmt: skip


def evaluate(sizes: Sizes) -> Phases:
    """The reference and every checkpoint: sync, samples, KL; then proxies and gold on all samples."""
    cfg, shape = sizes.cfg, sizes.policy
    policies = checkpoints(sizes)
    count = eval_prompts(sizes) * cfg.eval.samples
    generate = sample(sizes, eval_prompts(sizes), cfg.eval.samples, eval_prompts(sizes))
    calls = -(-count // cfg.eval.micro_batch)
    tokens = sizes.padded(cfg.eval.micro_batch, 1)
    passes = lambda times, layers: Pass(shape, times * calls, tokens, sizes.row(), layers)  # noqa: E731
    kl: list[Item] = [passes(1, shape.layers), Kl(shape, (1 + policies) * count * sizes.lengths.response_tokens)]
    below, above = sizes.actor_part.frozen, sizes.actor_part.trained
    kl += [passes(policies, below + 2 * above)] if cfg.ppo.lora else [passes(policies, 2 * shape.layers)]
    total = (1 + policies) * count
    members = [sizes.variant_shape(cfg.rm.variants[name]) for name in cfg.ppo.members]
    scored = batches(total * sizes.row(), SCORE_TOKENS)
    return {
        "start": [Start("tokenizer"), Start("vllm"), Load(1 + policies, shape.params)],
        "sync": [Gather(shape, policies, None, to_vllm=True)],
        "sample": [generate] * (1 + policies),
        "kl": kl,
        "score": [
            item
            for member in members
            for item in (Load(1, member.params), Pass(member, *scored, sizes.row(), member.layers))
        ],
        "gold": gold(sizes, total),
        "write": [Write(pool_bytes(sizes, total))],
    }


def report(seconds: float | None) -> Phases:
    """Figures and tables.

    Args:
        seconds: of a finished report of this machine; None: assumed.
    """
    if seconds is None:
        return {"report": [Fixed(REPORT_SECONDS, "assumed")]}
    return {"report": [Fixed(seconds, "a finished report on this machine")]}


def sample(sizes: Sizes, prompts: int, n: int, shard: int) -> Sample:
    """`n` responses to each of `prompts` prompts by one process, so many prompts in one call."""
    generation, calls = sizes.cfg.generation, prompts / shard
    return Sample(
        sizes.policy, calls, shard * n, shard, sizes.lengths.prompt_tokens, sizes.lengths.response_tokens,
        generation.max_new_tokens, generation.vllm.max_num_seqs, generation.vllm.block_size or 128,
    )  # fmt: skip


def gold(sizes: Sizes, samples: int) -> list[Item]:
    if sizes.gold is None:
        return [Start("judge"), Judge(samples)]
    shape = sizes.gold
    return [Load(1, shape.params), Pass(shape, *batches(samples * sizes.row(), sizes.cfg.gold.batch_tokens),
                                        sizes.row(), shape.layers)]  # fmt: skip


def bon_prompts(sizes: Sizes) -> int:
    return min(sizes.cfg.bon.prompts or 10**9, sizes.lengths.prompts.get("eval", 0)) or 1


def eval_prompts(sizes: Sizes) -> int:
    return min(sizes.cfg.eval.prompts or 10**9, sizes.lengths.prompts.get("eval", 0)) or 1


def checkpoints(sizes: Sizes) -> int:
    """Policies that stage `eval` finds, without the reference, and without those that `ppo.checkpoint_kl` adds: how far
    KL moves is not known before."""
    ppo = sizes.cfg.ppo
    saved = len({*range(ppo.checkpoint_every, ppo.steps + 1, ppo.checkpoint_every), ppo.steps})
    return saved if ppo.keep_policies is None else min(saved, ppo.keep_policies + 1)


def pool_tokens(sizes: Sizes) -> tuple[float, float]:
    """(tokens that a reward model reads of the pools, length of what attends to each other).

    As many responses as fit share a row with their prompt (`rm.score.Limits`). Where padding is left out, attention is
    computed for each response with its prompt, else for whole rows.
    """
    n, prompt, response = sizes.cfg.bon.samples, sizes.lengths.prompt_tokens, sizes.lengths.response_tokens
    unpadded = sizes.gpu_memory is None
    most = min(UNPADDED_ROW if unpadded else Limits().row_tokens, SCORE_TOKENS)
    rows = -(-n // max(1, (most - prompt) // response))
    total = bon_prompts(sizes) * (rows * prompt + n * response)
    return total, sizes.row() if unpadded else total / (bon_prompts(sizes) * rows)


def pool_bytes(sizes: Sizes, samples: float) -> float:
    return samples * (ROW_BYTES + TOKEN_BYTES * sizes.lengths.response_tokens)
