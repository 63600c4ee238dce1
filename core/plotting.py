"""Colours, settings and saving of every figure. Colours are those of Okabe and Ito, safe for the colour-blind."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
plt.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "grm-rlhf",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "figure.constrained_layout.use": True,
    }
)


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write `name`.svg and .png; the SVG element for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    (folder / f"{name}.svg").write_text(text)
    return text[text.index("<svg") :]
