"""PPO with three seeds against one reward model: does the proxy rise in every one? Learning curves and a table.

    make ppo-seeds        # configs/offline.yaml; its stages prompts, preferences and rm are run if they are not there

Each seed has another order of prompts, other samples and another adapter (`ppo.seed`). The runs are
`runs/<name>/seeds/<k>`, and a killed one resumes. Written: docs/images/ppo-seeds.png and docs/ppo-seeds.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from core.config import Config
from core.config.load import load
from pipelines import launch
from pipelines.runs import settle
from pipelines.stages import SFT
from ppo.log import read_rows

SHARED = ("prompts", "preferences", "rm")
DOCS = Path(__file__).parents[1] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--config", "-c", default="configs/offline.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_intermixed_args()
    base = load([options.config], options.overrides)
    runs = []
    for seed in range(options.seeds):
        extra = [*options.overrides, f"run.name={base.run.name}/seeds/{seed}", f"ppo.seed={seed}"]
        cfg = load([options.config], extra)
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        for stage in [*SHARED, *([SFT] if cfg.sft else [])]:
            if not (cfg.run_dir / stage).is_symlink():
                (cfg.run_dir / stage).symlink_to(Path("..", "..", stage), target_is_directory=True)
        if not settle("ppo", cfg, None):
            status = launch.run_stage_process(cfg, ["ppo", "--config", options.config, *extra])
            if status:
                return status
        runs.append(read_rows(cfg.run_dir / "ppo" / "metrics.jsonl"))
    write(base, runs, options.config)
    return 0


def write(cfg: Config, runs: list[list[dict]], config: str) -> None:
    figure(cfg, runs)
    lines = [
        f"# PPO with {len(runs)} seeds",
        "",
        f"PPO ({cfg.ppo.estimator}, lambda {cfg.ppo.lam:g}, KL coefficient {cfg.ppo.kl.coef:g}) against the reward "
        f"model `{cfg.ppo.proxy}` with `{config}`: {cfg.ppo.steps} steps of {cfg.ppo.rollouts} responses. Below "
        "are the mean raw reward of the rollouts in the first and in the last two steps, and the change in standard "
        "errors.",
        "",
        "| seed | first two steps | last two steps | change / SE | KL, nats per response | seconds per step |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for seed, rows in enumerate(runs):
        first, last = (np.mean([r["proxy_mean"] for r in part]) for part in (rows[:2], rows[-2:]))
        error = np.sqrt(sum(r["proxy_se"] ** 2 for r in rows[:2] + rows[-2:])) / 2
        kl, seconds = rows[-1]["kl_nats_per_response"], np.mean([r["seconds_total"] for r in rows])
        lines.append(
            f"| {seed} | {first:+.3f} | {last:+.3f} | {(last - first) / error:.1f} | {kl:.2f} | {seconds:.0f} |"
        )
    lines += [
        "",
        f"`make ppo-seeds CONFIG={config}` makes this page.",
        "",
        "![learning curves](images/ppo-seeds.png)",
        "",
    ]
    (DOCS / "ppo-seeds.md").write_text("\n".join(lines))
    print("\n".join(lines), file=sys.stderr)


def figure(cfg: Config, runs: list[list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "proxy_mean": "proxy reward of the rollouts", "kl_nats_per_response": "KL, nats per response",
        "eos_rate": "share of responses that end", "explained_variance": "explained variance of the critic",
    }  # fmt: skip
    shown = {k: v for k, v in shown.items() if k in runs[0][0]}
    fig, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3), layout="constrained")
    for axis, (key, title) in zip(axes, shown.items(), strict=True):
        for seed, (rows, color) in enumerate(zip(runs, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False)):
            x, y = ([r[k] for r in rows] for k in ("step", key))
            axis.plot(x, y, color=color, marker=".", label=f"seed {seed}")
            if key == "proxy_mean":
                se = np.array([r["proxy_se"] for r in rows])
                axis.fill_between(x, y - 2 * se, y + 2 * se, color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="step")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    (DOCS / "images").mkdir(exist_ok=True)
    fig.savefig(DOCS / "images" / "ppo-seeds.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
