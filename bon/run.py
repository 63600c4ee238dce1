"""Stage `bon`: pools of samples of the reference policy, scored by every proxy and by gold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from bon.estimators import best_of_n, oracle
from bon.gains import correlation, gains, scale
from bon.scores import put_together, read_pools, score_gold, score_proxies
from core.config import BestOfN, Config
from core.data.chat import ChatTokenizer
from core.data.rows import ResponseRow, SampleRow
from core.data.splits import read_split
from core.generation.local import Generator
from core.generation.pool import SampledPool, sample_pool
from core.shares import Share
from rm.gold import with_reading


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    """Run the stage on this process; the metrics of the stage on the first one, nothing on the others."""
    share, tokenizer = Share.of_this_process(), ChatTokenizer(cfg.policy)
    pool = _sample(cfg, tokenizer, inputs["prompts"], out, share)
    names, table = score_proxies(inputs["rm"], pool, out), out / "scores" / "gold.parquet"
    gold = score_gold(cfg.gold, table, pool)
    if gold is None or not share.is_first:
        return {}
    put_together([table, *(out / "scores" / f"{name}.parquet" for name in names)], pool, title="bon")
    samples = pool.whole()
    return with_reading(summary(cfg.bon, out, samples, names), gold, tokenizer, cast(list[ResponseRow], samples))


def _sample(cfg: Config, tokenizer: ChatTokenizer, prompts: Path, out: Path, share: Share) -> SampledPool:
    rows = read_split(prompts, "eval", cfg.bon.prompts)
    return sample_pool(
        lambda: Generator(cfg.policy, cfg.generation, tokenizer), tokenizer, rows, cfg.bon.samples,
        out=out, shard_prompts=cfg.bon.shard_prompts, seed=cfg.run.seed, name="bon",
        temperature=cfg.bon.temperature, top_p=cfg.bon.top_p, share=share,
    )  # fmt: skip


def summary(cfg: BestOfN, out: Path, samples: list[SampleRow], names: Sequence[str]) -> dict:
    """Gold at the largest n by each reward model, from the scores on disk, joined by id; curves are the report's."""
    pools, n = read_pools(out, names), cfg.n_max or cfg.samples
    duplicates = 1 - len({(s["prompt_id"], s["response"]) for s in samples}) / len(samples)
    if not scale(pools.gold) > 0:  # the pools are kept, although nothing can be selected by this gold
        text = f"gold does not vary within any of {len(pools.gold)} prompts, so nothing can be selected by it"
        return {"headline": text, "duplicates": duplicates}
    gold = gains(pools.gold)
    at_n = {name: float(best_of_n(proxy, gold, [n]).mean()) for name, proxy in pools.proxies.items()}
    best = float(oracle(gold, [n]).mean())
    parts = [f"{name} {value:+.2f}" for name, value in at_n.items()]
    return {
        "headline": f"gold gain at best of {n} on {len(gold)} prompts, in SD within prompts: {', '.join(parts)}, "
        f"oracle {best:+.2f}",
        "variants": {
            name: {"gold_at_n_max": at_n[name], "within_prompt_correlation": correlation(proxy, pools.gold)}
            for name, proxy in pools.proxies.items()
        },
        "oracle_at_n_max": best,
        "duplicates": duplicates,
    }
