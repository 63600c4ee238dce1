"""Figures of how the models of one run were trained."""

from __future__ import annotations

from matplotlib.figure import Figure

from core.plotting import COLOURS, plt


def accuracy(variants: dict, judge: str, longest: float | None) -> Figure:
    """Held-out pairwise accuracy against `judge` with 95% intervals, beside a coin and the longest-answer rule."""
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.45 * len(variants)))
    for y, m in enumerate(variants.values()):
        a = m["accuracy_gold"]
        span = [[a["mean"] - a["lo"]], [a["hi"] - a["mean"]]]
        axis.errorbar(a["mean"], y, xerr=span, fmt="o", color=COLOURS[y % 7], capsize=3)
    axis.set_yticks(range(len(variants)), list(variants))
    axis.axvline(0.5, color="0.4", linewidth=1, label="coin")
    if longest is not None:
        axis.axvline(longest, color="0.4", linestyle=":", label="longest answer")
    axis.set(xlim=(0.4, 1.0), ylim=(-0.6, len(variants) - 0.4), xlabel=f"held-out accuracy against {judge}")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def reward_training(logs: dict[str, list[dict]]) -> Figure:
    """Loss and training accuracy of each reward model."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3))
    for colour, (name, rows) in zip(COLOURS, logs.items(), strict=False):
        for axis, key in zip(axes, ("reward_loss", "accuracy"), strict=True):
            axis.plot([r["step"] for r in rows], [r[key] for r in rows], color=colour, label=name)
    axes[0].set(xlabel="optimiser step", ylabel="Bradley-Terry loss, nats")
    axes[1].set(xlabel="optimiser step", ylabel="accuracy of the batch")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


PPO_PANELS = (
    ("proxy reward (raw)", ("proxy_mean",)),
    ("KL, nats a response", ("kl_nats_per_response",)),
    ("response tokens", ("response_tokens",)),
    ("share ended by EOS", ("eos_rate",)),
    ("value loss", ("value_loss",)),
    ("explained variance", ("explained_variance",)),
    ("entropy, nats a token", ("entropy_nats",)),
    ("clipped share", ("clipfrac",)),
    ("vLLM / trainer log-prob gap", ("mismatch_mean_abs",)),
)


def ppo_training(rows: list[dict]) -> Figure:
    figure, axes = plt.subplots(2, 5, figsize=(14, 5.2))
    steps = [r["step"] for r in rows]
    for axis, (title, keys) in zip(axes.flat, PPO_PANELS, strict=False):
        for key in keys:
            axis.plot(steps, [r.get(key, float("nan")) for r in rows], color=COLOURS[0])
        if title.startswith("proxy"):
            lo, hi = ([r["proxy_mean"] + s * 1.96 * r["proxy_se"] for r in rows] for s in (-1, 1))
            axis.fill_between(steps, lo, hi, color=COLOURS[0], alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=9)
    axis, bottom = axes.flat[-1], [0.0] * len(rows)
    for colour, phase in zip(COLOURS, ("generate", "score", "logprobs", "train", "sync"), strict=False):
        heights = [r.get(f"seconds_{phase}", 0.0) for r in rows]
        axis.bar(steps, heights, bottom=bottom, color=colour, label=phase)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axis.set_title("seconds per phase", fontsize=9)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure
