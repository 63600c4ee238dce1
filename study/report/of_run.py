"""Stage `report`: the over-optimisation study of one run, with how its models were trained and what each stage made."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bon.gains import scale
from bon.pools import Pools
from bon.scores import optimised_rewards, read_pools
from core.config import Config
from core.data.streams import stream_seed
from core.files import read_json, read_rows, read_table, write_json
from ppo.card import write_card
from study import files, reward_models
from study.design import Condition
from study.records import Results, Series
from study.report import page, training
from study.report.build import realised_noise, remarks, run_checks
from study.report.words import as_shown
from study.results import plan_of, results

NUM_SAMPLES = 20


def run(cfg: Config, inputs: Mapping[str, Path], out: Path) -> dict:
    manifests = {name: read_json(folder / "manifest.json") for name, folder in inputs.items()}
    metrics = {name: m["metrics"] for name, m in manifests.items()}
    trained = metrics["rm"]["variants"]
    pools = run_pools(cfg, inputs)
    series = {f"PPO against {cfg.ppo.label}": run_series(cfg, inputs["eval"])}
    realised = realised_noise(cfg, list(trained))
    found = analyse(cfg, pools, series, reward_models.facts(cfg, realised))
    found.about = reward_models.about(cfg)
    files.write(out, found)
    checks = run_checks(
        cfg, found, series, {"rm": manifests["rm"], "ppo": manifests["ppo"]}, realised, policy_seeds=1
    )  # fmt: skip
    write_json(out / "checks.json", files.plain(list(checks)))
    (one,) = series.values()
    shown = {name: trained[name] for name in found.conditions if name in trained}  # the order that decides colours
    extras = page.RunExtras(
        checkpoints=checkpoint_table(found, one),
        reward_models=reward_table(shown, metrics["rm"]["judge"]),
        stages=[["stage", "seconds", "of them to start", "made"], *map(stage_row, manifests, manifests.values())],
        samples=before_and_after(one, pools, cfg.ppo.label, stream_seed(cfg.run.seed, "report")),
        packages=yaml.safe_dump({**manifests["eval"]["code"], **manifests["eval"]["packages"]}, sort_keys=False),
        figures={
            "accuracy": training.accuracy(shown, metrics["rm"]["judge"], metrics["rm"].get("longest_answer_accuracy")),
            "reward_training": training.reward_training(
                {n: read_rows(inputs["rm"] / n / "train.jsonl") for n in shown}
            ),
            "ppo_training": training.ppo_training(read_rows(inputs["ppo"] / "metrics.jsonl")),
        },
    )
    page.write(
        out, cfg.run.name, description(cfg, metrics), found, checks, file="report", run=extras,
        accuracy={name: m["accuracy_gold"]["mean"] for name, m in trained.items()},
        config=yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False),
    )  # fmt: skip
    write_card(out / "policy-card.md", cfg, metrics["ppo"], gold=f"{cfg.gold.kind}: {outcome(found)}")
    failed = sum(not c.ok for c in checks)
    return {
        "headline": f"{out.with_name('report') / 'report.html'}: {'; '.join(page.summary(found))}; {failed} of "
        f"{len(checks)} checks failed"
    }


def stage_row(name: str, manifest: Mapping[str, Any]) -> list[str]:
    """Name, seconds, how many of them the stage took to start (empty in runs of earlier versions), and its headline."""
    start = f"{manifest['seconds_start']:.0f}" if "seconds_start" in manifest else ""
    return [name, f"{manifest['seconds']:.0f}", start, manifest["metrics"]["headline"]]


def outcome(found: Results) -> str:
    """What became of the run's policy, in a line with the numbers of the report."""
    (facts,) = found.policies.values()
    return (
        f"{facts['verdict'].kind}; step {facts['step']} gained {facts['gold']} SD of gold and {facts['proxy']} SD of "
        f"proxy, SD within prompts of the reference's samples, at a KL of {facts['kl']:.2f} nats a response"
    )


def run_pools(cfg: Config, inputs: Mapping[str, Path]) -> Pools:
    """The pools with the rewards of every reward model, and of what PPO optimised where that is an ensemble."""
    names = list(read_json(inputs["rm"] / "manifest.json")["metrics"]["variants"])
    pools = read_pools(inputs["bon"], names)
    pools = replace(pools, of_reference=cfg.one_reference)
    if cfg.ppo.ensemble is None:
        return pools
    combined = optimised_rewards(inputs["rm"], pools, cfg.ppo.members, cfg.ppo.combine)
    return replace(pools, proxies={**pools.proxies, cfg.ppo.label: combined})


def run_series(cfg: Config, folder: Path) -> Series:
    """The policies along PPO, as stage `eval` measured them."""
    return Series(
        read_table(folder / "rl_eval.parquet"), cfg.ppo.label, Condition(cfg.ppo.label), cfg.ppo.kl.coef,
        cfg.ppo.seed,
    )  # fmt: skip


def analyse(
    cfg: Config, pools: Pools, series: Mapping[str, Series], facts: Mapping[str, Mapping] | None = None
) -> Results:
    """A study in which each reward model of the run is a condition, compared with Bradley-Terry where there is one."""
    plain = next((n for n, v in cfg.rm.variants.items() if v.text_regulariser == "none" and n in pools.proxies), None)
    names = sorted(pools.proxies, key=lambda name: name != plain)  # the baseline is needed first
    conditions = {Condition(name): [name] for name in names}
    baseline = {condition: Condition(plain) for condition in conditions} if plain else {}
    return results(pools, conditions, series, plan_of(cfg, cfg.bon.n_max or pools.size), baseline, facts=facts)


def description(cfg: Config, metrics: Mapping[str, Mapping]) -> str:
    """What was run, in a sentence or two."""
    pairs = metrics["preferences"]["pairs"].get("rm_train", "?")
    first = cfg.preferences.label_noise
    # A label that is flipped twice is right again.
    wrong = sorted({first + v.label_noise - 2 * first * v.label_noise for v in cfg.rm.variants.values()})
    return (
        f"Policy {Path(cfg.policy.path).name}{', fine-tuned' if cfg.sft else ''}, gold: {cfg.gold.kind}. "
        f"Reward models {', '.join(cfg.rm.variants)}, "
        f"trained on {pairs} pairs with {' or '.join(f'{share:.0%}' for share in wrong)} of the labels wrong. "
        f"Best-of-n from pools of {cfg.bon.samples}; PPO of {cfg.ppo.steps} steps of {cfg.ppo.rollouts} rollouts "
        f"against {cfg.ppo.label}, KL coefficient {cfg.ppo.kl.coef:g}. Seed {cfg.run.seed}."
        f"{more_of_ppo(cfg, metrics)}{remarks(cfg)}"
    )


def more_of_ppo(cfg: Config, metrics: Mapping[str, Mapping]) -> str:
    """What PPO did besides optimising reward models, and the average of its weights, in sentences."""
    parts = []
    if cfg.ppo.reward.is_own:
        parts.append(
            f"What PPO optimised was {cfg.ppo.reward.in_words}; the proxy shown here is the reward model alone."
        )
    if cfg.ppo.watch_gold:
        parts.append("Gold was watched while PPO ran, and not used for training.")
    if average := metrics.get("eval", {}).get("average"):
        parts.append(
            f"The moving average of its weights (policy-ema) gained {average['proxy_change']:+.2f} SD of proxy and "
            f"{average['gold_change']:+.2f} SD of gold over the reference at a KL of {average['kl']:.2f} nats."
        )
    return "".join(f" {part}" for part in parts)


def checkpoint_table(found: Results, series: Series) -> list[list[str]]:
    """A line for the reference and each policy along training, with the intervals of the figure."""
    proxy, gold = (
        next(c for c in found.curves if c.method == "ppo" and c.metric == metric) for metric in ("proxy", "gold")
    )
    table = [["PPO step", "KL, nats", "proxy", "gold", "tokens", "ended", "prompts"]]
    for k, step in enumerate(gold.x.tolist()):
        rows = [r for r in series.rows if r["step"] == step]
        table.append(
            [
                str(step) if step else "0 (reference)", f"{gold.kl[k]:.2f}", str(proxy.at(k)), str(gold.at(k)),
                f"{np.mean([r['n_tokens'] for r in rows]):.0f}", f"{np.mean([r['finished'] for r in rows]):.0%}",
                str(gold.values.shape[1]),
            ]
        )  # fmt: skip
    return table


def reward_table(trained: Mapping[str, Mapping], judge: str) -> list[list[str]]:
    """Held-out accuracy of each reward model with its interval."""
    ranged = lambda a: f"{a['mean']:.3f} [{a['lo']:.3f}, {a['hi']:.3f}]"  # noqa: E731
    head = ["reward model", f"accuracy, {judge}", "accuracy, training labels", "pairs", "length correlation", "seconds"]
    return [head] + [
        [
            name, ranged(m["accuracy_gold"]), ranged(m["accuracy_label"]), str(m["accuracy_gold"]["n"]),
            f"{m['length_correlation']:+.2f}", f"{m['seconds']:.0f}",
        ]
        for name, m in trained.items()
    ]  # fmt: skip


def before_and_after(series: Series, pools: Pools, proxy: str, seed: int) -> list[dict]:
    """Responses of the reference and of the last policy to the same prompts, most proxy gained beyond gold first.

    Values are gains as in the tables: over the pool of the same prompt, and for a prompt without one, or with one of
    another distribution, over the response of the reference.
    """
    first = [r for r in series.rows if r["sample_id"] == 0]
    last = max(r["step"] for r in first)
    before, after = ({r["prompt_id"]: r for r in first if r["step"] == step} for step in (0, last))
    tables = {"proxy": pools.proxies[proxy], "gold": pools.gold}
    units = {metric: scale(table) for metric, table in tables.items()}
    origins = {metric: {p: b[metric] for p, b in before.items()} for metric in tables}
    for metric, table in tables.items() if pools.of_reference else ():
        origins[metric] |= dict(zip(pools.prompt_ids, table.mean(axis=1).tolist(), strict=True))
    value = lambda row, metric: float((row[metric] - origins[metric][row["prompt_id"]]) / units[metric])  # noqa: E731
    gap = {
        p: value(after[p], "proxy") - value(b, "proxy") - (value(after[p], "gold") - value(b, "gold"))
        for p, b in before.items()
    }
    ordered = sorted(gap, key=gap.__getitem__, reverse=True)
    shown, rest = ordered[: NUM_SAMPLES // 2], ordered[NUM_SAMPLES // 2 :]
    shown += random.Random(seed).sample(rest, min(len(rest), NUM_SAMPLES - len(shown)))

    def side(row: dict, label: str) -> dict:
        numbers = {metric: f"{value(row, metric):+.2f}" for metric in units}
        return {"label": label, **numbers, "kl": f"{row['kl_rb']:.1f}", "response": as_shown(row["response"])}

    return [
        {
            "prompt": as_shown(before[p]["prompt"][-1]["content"]),
            "before": side(before[p], "reference"),
            "after": side(after[p], f"step {last}"),
        }
        for p in shown
    ]
