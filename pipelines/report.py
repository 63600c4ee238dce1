"""Stage `report`: one page, `report.html`, and the same figures and tables as `report.md`."""

from __future__ import annotations

import random
from pathlib import Path

import jinja2
import yaml

from bon.curves import read_curves
from core import plotting
from core.config import Config
from core.data.streams import stream_seed
from core.files import read_json, read_rows, read_table
from pipelines import report_figures as figures
from ppo.card import write_card

NUM_SAMPLES = 20


def run(cfg: Config, inputs: dict[str, Path], out: Path) -> dict:
    manifests = {name: read_json(folder / "manifest.json") for name, folder in inputs.items()}
    facts = {name: m["metrics"] for name, m in manifests.items()}
    variants = facts["rm"]["variants"]
    drawn = {
        "overoptimisation": figures.overoptimisation(read_curves(inputs["eval"] / "curves.csv")),
        "accuracy": figures.accuracy(variants, facts["rm"]["judge"], facts["rm"].get("longest_answer_accuracy")),
        "reward_training": figures.reward_training({n: read_rows(inputs["rm"] / n / "train.jsonl") for n in variants}),
        "ppo_training": figures.ppo_training(read_rows(inputs["ppo"] / "metrics.jsonl")),
    }
    svg = {name: plotting.save(figure, out / "figures", name) for name, figure in drawn.items()}
    checks = facts["eval"]["checks"]
    page = {
        "run": cfg.run.name,
        "asked": asked(cfg, facts),
        "figures": svg,
        "verdicts": facts["eval"]["verdicts"],
        "failed": [c for c in checks if not c["ok"]],
        "num_checks": len(checks),
        "all_checks": checks,
        "table": checkpoint_table(facts["eval"]["table"]),
        "rm_table": reward_table(variants, facts["rm"]["judge"]),
        "samples": sample_pairs(cfg, inputs, facts),
        "stages": [
            {"stage": n, "seconds": round(m["seconds"]), "headline": facts[n]["headline"]} for n, m in manifests.items()
        ],
        "config": yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False),
        "packages": yaml.safe_dump({**manifests["eval"]["code"], **manifests["eval"]["packages"]}, sort_keys=False),
    }
    (out / "report.html").write_text(render(page), encoding="utf-8")
    (out / "report.md").write_text(markdown(page), encoding="utf-8")
    measured = facts["eval"]["headline"]
    write_card(out / "policy-card.md", cfg, facts["ppo"], gold=f"{cfg.gold.kind}: {measured}")
    return {
        "headline": f"{out.with_name('report') / 'report.html'}: {len(page['failed'])} of {len(checks)} checks failed"
    }


def render(page: dict) -> str:
    """The page as HTML; everything but our own figures is escaped, since responses may hold any text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.j2").render(page)


def asked(cfg: Config, facts: dict) -> str:
    """What was run, in one line."""
    pairs = facts["preferences"]["pairs"]
    parts = [
        f"Policy {Path(cfg.policy.path).name}",
        f"gold: {cfg.gold.kind}",
        f"proxies: {', '.join(cfg.rm.variants)}, trained on {pairs.get('rm_train', '?')} pairs with "
        f"{cfg.preferences.label_noise:.0%} label noise",
        f"best-of-{cfg.bon.samples}",
        f"PPO of {cfg.ppo.steps} steps of {cfg.ppo.rollouts} rollouts against {cfg.ppo.label}, KL coefficient "
        f"{cfg.ppo.kl.coef}",
        f"seed {cfg.run.seed}.",
    ]
    return "; ".join(parts)


def checkpoint_table(rows: list[dict]) -> list[list[str]]:
    """Header and one line a checkpoint."""
    ranged = lambda r, m: f"{r[m]:+.2f} [{r[m + '_lo']:+.2f}, {r[m + '_hi']:+.2f}]"  # noqa: E731
    head = ["PPO step", "KL, nats", "proxy, SD", "gold, SD", "tokens", "EOS", "prompts"]
    return [head] + [
        [
            f"{r['step']}" if r["step"] else "0 (reference)", f"{r['kl']:.2f} ± {r['kl_se']:.2f}", ranged(r, "proxy"),
            ranged(r, "gold"), f"{r['tokens']:.0f}", f"{r['eos_rate']:.0%}", f"{r['prompts']}",
        ]
        for r in rows
    ]  # fmt: skip


def reward_table(variants: dict, judge: str) -> list[list[str]]:
    ranged = lambda a: f"{a['mean']:.3f} [{a['lo']:.3f}, {a['hi']:.3f}]"  # noqa: E731
    head = ["reward model", f"accuracy, {judge}", "accuracy, training labels", "pairs", "length correlation", "seconds"]
    return [head] + [
        [
            name, ranged(m["accuracy_gold"]), ranged(m["accuracy_label"]), str(m["accuracy_gold"]["n"]),
            f"{m['length_correlation']:+.2f}", f"{m['seconds']:.0f}",
        ]
        for name, m in variants.items()
    ]  # fmt: skip


def sample_pairs(cfg: Config, inputs: dict[str, Path], facts: dict) -> list[dict]:
    """Responses of the reference and of the last checkpoint to the same prompts, with their scores."""
    rows = [r for r in read_table(inputs["eval"] / "rl_eval.parquet") if r["sample_id"] == 0]
    last = max(r["step"] for r in rows)
    before, after = ({r["prompt_id"]: r for r in rows if r["step"] == s} for s in (0, last))
    (mean, std), bon = facts["eval"]["proxy_units"], facts["bon"]
    proxy = lambda r: (r["proxy"] - mean) / std  # noqa: E731
    gold = lambda r: (r["gold"] - bon["gold_mean"]) / bon["gold_std"]  # noqa: E731
    gap = {p: proxy(after[p]) - proxy(b) - (gold(after[p]) - gold(b)) for p, b in before.items()}
    chosen = sorted(gap, key=gap.get, reverse=True)
    worst, rest = chosen[: NUM_SAMPLES // 2], chosen[NUM_SAMPLES // 2 :]
    rng = random.Random(stream_seed(cfg.run.seed, "report"))
    worst += rng.sample(rest, min(len(rest), NUM_SAMPLES - len(worst)))

    def side(r: dict, label: str) -> dict:
        scores = {"proxy": f"{proxy(r):+.2f}", "gold": f"{gold(r):+.2f}", "kl": f"{r['kl_rb']:.1f}"}
        return {"label": label, **scores, "response": r["response"]}

    return [
        {
            "prompt": before[p]["prompt"][-1]["content"],
            "before": side(before[p], "reference"),
            "after": side(after[p], f"step {last}"),
        }
        for p in worst
    ]


def markdown(page: dict) -> str:
    """The page without its samples, for a terminal or a repository."""
    lines = [
        f"# {page['run']}",
        "",
        page["asked"],
        "",
        "![gold and proxy against KL](figures/overoptimisation.png)",
        "",
    ]
    lines += [f"- {v}" for v in page["verdicts"]] + [""]
    lines += [f"- check failed: {c['name']} ({c['detail']})" for c in page["failed"]] + [""]
    for name, table in (("Checkpoints", page["table"]), ("Reward models", page["rm_table"])):
        head, *body = table
        lines += [f"## {name}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
    lines += [f"![{name}](figures/{name}.png)" for name in page["figures"] if name != "overoptimisation"]
    return "\n".join(lines) + "\n"
