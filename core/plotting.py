"""Colours, settings and saving of every figure. Colours are those of Okabe and Ito, safe for the colour-blind."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DARK = {
    "#0072b2": "#4aa3e0", "#d55e00": "#f58a4b", "#009e73": "#3cc79d", "#cc79a7": "#e5a3c8", "#e69f00": "#f3bb45",
    "#56b4e9": "#9ad6f7", "#000000": "#e8e6e3", "#ffffff": "#16181c", "#cccccc": "#4a4e55", "#b0b0b0": "#5c6068",
}  # fmt: skip
"""Colour of a figure -> the one of a dark page."""
GREYS = tuple(to_hex(str(k / 20)) for k in range(3, 15))
"""Of lines and marks that have no meaning by colour, as figures name them: "0.15" to "0.7"."""
ON_LIGHT, ON_DARK = "#010101", "#fefefe"
"""Of text that lies on a coloured cell: the same on a light and a dark page."""
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
        "figure.max_open_warning": 40,  # a page has some 20
    }
)


def save(figure: Figure, folder: Path, name: str, title: str = "") -> str:
    """Write `name`.svg and .png; the SVG element for the page (`for_page`)."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    text = drawn(figure)
    (folder / f"{name}.svg").write_text(text)
    return for_page(text, name, title)


def drawn(figure: Figure) -> str:
    """The figure as an SVG document; closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def for_page(svg: str, name: str, title: str) -> str:
    """The element of an SVG document, fit to stand beside others in a page: ids begin with `name`, the title is read
    aloud, and colours are variables of the page (`theme`)."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)  # rules for `*` would hold for the whole page
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r"(fill|stroke): (#[0-9a-fA-F]{6})\b", _variable, text)
    label = f'<title id="{name}-title">{html.escape(title or name)}</title>'
    head, rest = text.split(">", 1)
    return f'{head} role="img" aria-labelledby="{name}-title">{label}{rest}'


def theme() -> str:
    """CSS: the colours of figures on a light and on a dark page, and text that has no colour of its own."""
    dark = DARK | {grey: _mirrored(grey) for grey in GREYS}
    light, other = (
        "".join(f"--c{name[1:]}:{value};" for name, value in pairs) for pairs in ([(c, c) for c in dark], dark.items())
    )
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{other}}}}}"
        "svg *{stroke-linejoin:round;stroke-linecap:butt}svg text{fill:var(--c000000)}"
    )


def _mirrored(grey: str) -> str:
    """As far from the dark page as it was from the light one."""
    value = 0xE8 - int(grey[1:3], 16) * (0xE8 - 0x18) // 0xFF
    return f"#{value:02x}{value:02x}{value:02x}"


def _variable(match: re.Match) -> str:
    colour = match[2].lower()
    known = colour in DARK or colour in GREYS
    return f"{match[1]}: var(--c{colour[1:]})" if known else match[0]
