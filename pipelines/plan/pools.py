"""Counted work of the stages that sample, score and report: prompts, preferences, bon, eval, report.

Where processes divide a stage, the work is that of the one with the most shards.
"""

from __future__ import annotations

from bon.scores import CACHED_STATES
from pipelines.evaluate import SCORED_PROMPTS
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
    count, shards = preferences_prompts(sizes), shards_of(sizes, "preferences")
    shard, mine = min(sizes.cfg.preferences.shard_prompts, count), share(sizes, shards)
    return {
        "start": [Start("tokenizer", ranks=sizes.ranks), vllm(sizes)],
        "sample": [sample(sizes, count, 2, shard, mine)],
        "gold": gold(sizes, 2 * count, shards),
        "write": [Write(pool_bytes(sizes, 4 * count))],
    }


def bon(sizes: Sizes) -> Phases:
    """A pool of N samples a prompt, scored by every reward model above the layers that they share, and by gold."""
    cfg, ranks = sizes.cfg, sizes.ranks
    count, n, shards = bon_prompts(sizes), cfg.bon.samples, shards_of(sizes, "bon")
    mine = share(sizes, shards)
    phases: Phases = {
        "start": [Start("tokenizer", ranks=ranks), vllm(sizes)],
        "sample": [sample(sizes, count, n, min(cfg.bon.shard_prompts, count), mine)],
    }
    total, length = pool_tokens(sizes)
    models = list(cfg.rm.variants.values())
    calls, tokens = in_shards(sizes, total, shards, SCORE_TOKENS)
    states = total * sizes.base.hidden * sizes.bytes_per_weight
    common = min(sizes.untouched(v) for v in models) if len(models) > 1 and states <= CACHED_STATES else 0
    work: list[Item] = [Load(len(models), sizes.base.params, ranks)]
    if common:
        work.append(Pass(sizes.base, calls, tokens, length, common, ranks=ranks))
    for variant in models:
        shape = sizes.variant_shape(variant)
        work.append(Pass(shape, calls, tokens, length, shape.layers - common, ranks=ranks))
    return phases | {
        "score": work, "gold": gold(sizes, count * n, shards), "write": [Write(pool_bytes(sizes, count * n))],
    }  # fmt: skip


def evaluate(sizes: Sizes) -> Phases:
    """The reference and every checkpoint: sync, samples, KL; then proxies and gold on all samples."""
    cfg, shape, ranks, prompts = sizes.cfg, sizes.policy, sizes.ranks, eval_prompts(sizes)
    shards = shards_of(sizes, "eval")
    policies, mine = checkpoints(sizes), share(sizes, shards)
    synced = min(policies, -(-shards // ranks))  # by one process
    shard = min(cfg.eval.shard_prompts or prompts, prompts)
    total = (1 + policies) * prompts * cfg.eval.samples
    calls = -(-prompts * cfg.eval.samples // cfg.eval.micro_batch) * mine * (1 + policies)
    tokens = sizes.padded(cfg.eval.micro_batch, 1)
    passes = lambda part, layers: Pass(shape, part * calls, tokens, sizes.row(), layers, ranks=ranks)  # noqa: E731
    others = policies / (1 + policies)  # of the calls: not the reference's own
    kl: list[Item] = [passes(1 - others, shape.layers), Kl(shape, total * mine * sizes.lengths.response_tokens, ranks)]
    below, above = sizes.actor_part.frozen, sizes.actor_part.trained
    kl += [passes(others, below + 2 * above)] if cfg.ppo.lora else [passes(others, 2 * shape.layers)]
    members = [sizes.variant_shape(cfg.rm.variants[name]) for name in cfg.ppo.members]
    scored_shards = -(-prompts // SCORED_PROMPTS)
    scored = in_shards(sizes, total * sizes.row(), scored_shards, SCORE_TOKENS)
    return {
        "start": [
            Start("tokenizer", ranks=ranks), vllm(sizes), Load(1 + synced, shape.params, ranks),
        ],
        "sync": [Gather(shape, synced, None, ranks, to_vllm=True)],
        "sample": [sample(sizes, prompts, cfg.eval.samples, shard, mine * (1 + policies))],
        "kl": kl,
        "score": [
            item
            for member in members
            for item in (
                Load(1, member.params, ranks), Pass(member, *scored, sizes.row(), member.layers, ranks=ranks),
            )
        ],
        "gold": gold(sizes, total, scored_shards),
        "write": [Write(pool_bytes(sizes, total))],
    }  # fmt: skip


def shards_of(sizes: Sizes, stage: str) -> int:
    """Shards of all processes that a stage samples, 0 for a stage that is not divided."""
    cfg = sizes.cfg
    if stage == "preferences":
        return -(-preferences_prompts(sizes) // cfg.preferences.shard_prompts)
    if stage == "bon":
        return -(-bon_prompts(sizes) // cfg.bon.shard_prompts)
    if stage == "eval":
        prompts = eval_prompts(sizes)
        return (1 + checkpoints(sizes)) * -(-prompts // (cfg.eval.shard_prompts or prompts))
    return 0


def share(sizes: Sizes, shards: int) -> float:
    """The largest part of so many shards that one process has."""
    return -(-shards // sizes.ranks) / shards


def idle(sizes: Sizes, stage: str) -> list[str]:
    """A line where a stage has fewer shards than processes."""
    shards, ranks = shards_of(sizes, stage), sizes.ranks
    if not 0 < shards < ranks:
        return []
    return [f"{stage}: {shards} shards for {ranks} processes, so {ranks - shards} have nothing to do: lower "
            f"{stage}.shard_prompts"]  # fmt: skip


def report(seconds: float | None) -> Phases:
    """Figures and tables.

    Args:
        seconds: of a finished report of this machine; None: assumed.
    """
    if seconds is None:
        return {"report": [Fixed(REPORT_SECONDS, "assumed")]}
    return {"report": [Fixed(seconds, "a finished report on this machine")]}


def vllm(sizes: Sizes) -> Start:
    """The start of a process's vLLM."""
    return Start("vllm", ranks=sizes.ranks, graphs=not sizes.cfg.generation.vllm.enforce_eager)


def sample(sizes: Sizes, prompts: int, n: int, shard: int, share: float) -> Sample:
    """`n` responses to each of `prompts` prompts, a shard in one call; one process makes a share of the calls."""
    generation, calls = sizes.cfg.generation, share * prompts / shard
    return Sample(
        sizes.policy, calls, shard * n, shard, sizes.lengths.prompt_tokens, sizes.lengths.response_tokens,
        generation.max_new_tokens, generation.vllm.max_num_seqs, generation.vllm.block_size or 128, sizes.ranks,
        not generation.vllm.enforce_eager,
    )  # fmt: skip


def gold(sizes: Sizes, samples: float, shards: int) -> list[Item]:
    """One process's share of scoring so many samples, of all shards."""
    ranks = sizes.ranks
    if sizes.gold is None:
        return [Start("judge", ranks=ranks), Judge(samples * share(sizes, shards), ranks)]
    shape = sizes.gold
    work = in_shards(sizes, samples * sizes.row(), shards, sizes.cfg.gold.batch_tokens)
    return [Load(1, shape.params, ranks), Pass(shape, *work, sizes.row(), shape.layers, ranks=ranks)]


def in_shards(sizes: Sizes, total: float, shards: int, budget: float) -> tuple[float, float]:
    """(calls of one process, tokens of a call) for its share of `total` tokens, which are batched shard by shard."""
    calls, tokens = batches(total / shards, budget)
    return calls * share(sizes, shards) * shards, tokens


def preferences_prompts(sizes: Sizes) -> int:
    """Those that stage `preferences` samples for."""
    pairs = 0 if sizes.cfg.preferences.sources else sum(sizes.lengths.pairs.values())
    return pairs + sizes.lengths.calibration or 1


def bon_prompts(sizes: Sizes) -> int:
    return min(sizes.cfg.bon.prompts or 10**9, sizes.lengths.prompts.get("eval", 0)) or 1


def eval_prompts(sizes: Sizes) -> int:
    return min(sizes.cfg.eval.prompts or 10**9, sizes.lengths.prompts.get("eval", 0)) or 1


def checkpoints(sizes: Sizes) -> int:
    """Policies that stage `eval` finds, without the reference, and without those that `ppo.checkpoint_kl` adds: how far
    KL moves is not known before."""
    ppo = sizes.cfg.ppo
    saved = len({*range(ppo.checkpoint_every, ppo.steps + 1, ppo.checkpoint_every), ppo.steps})
    return saved if ppo.keep_policies is None else min(saved, ppo.keep_policies + 1 + ppo.ahead)


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
