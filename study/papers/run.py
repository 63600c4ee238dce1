"""`grm figure`: a figure or table of a paper, from what a study has written, imported scores included."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from core import plotting
from core.errors import ArtefactError, ConfigError
from core.files import read_json
from study.papers import coste, gao, grm
from study.papers.read import Record, read

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Paper:
    where: str
    """In its paper."""
    shows: str
    draw: Callable[[Sequence[Record]], Figure]


GAO, COSTE, GRM = "Gao et al. 2210.10760", "Coste et al. 2310.02743", "Yang et al. 2406.10216"
FIGURES = {
    "gao-bon": Paper(f"{GAO}, figure 1, best-of-n", "best-of-n: gold and proxy, one curve a reward-model size",
                     partial(gao.by_size, method="bon")),
    "gao-ppo": Paper(f"{GAO}, figure 1, RL", "PPO: gold and proxy, one curve a reward-model size",
                     partial(gao.by_size, method="ppo")),
    "gao-parameters": Paper(f"{GAO}, figure 3", "alpha and beta against parameters, best-of-n and PPO",
                            partial(gao.coefficients, axis_name="parameters")),
    "gao-pairs": Paper(f"{GAO}, data size", "alpha and beta against training pairs, best-of-n and PPO",
                       partial(gao.coefficients, axis_name="pairs")),
    "gao-policy-size": Paper(f"{GAO}, policy size", "policies of several sizes; takes several runs", gao.policy_size),
    "gao-loss": Paper(f"{GAO}, validation loss", "gold at the end and at the peak against validation loss", gao.loss),
    "gao-peak": Paper(f"{GAO}, figure 12", "gold at the peak, predicted from other sizes against seen", gao.peak),
    "coste-bon": Paper(f"{COSTE}, best-of-n", "mean, WCO and UWO ensembles beside single reward models",
                       partial(coste.ensembles, method="bon")),
    "coste-ppo": Paper(f"{COSTE}, PPO", "policies against ensembles beside policies against single ones",
                       partial(coste.ensembles, method="ppo")),
    "coste-members": Paper(f"{COSTE}, number of members", "gold of best-of-n by the number of members", coste.members),
    "grm-bon": Paper(f"{GRM}, figure 3", "best-of-n: gold and proxy by method, seeds pooled", grm.best_of_n),
    "grm-ppo": Paper(f"{GRM}, figure 4", "PPO: gold and proxy by method, seeds pooled", grm.ppo),
}  # fmt: skip
TABLES = {"grm-tables": (f"{GRM}, tables 1 and 2", "accuracy by method and data size, Markdown; --eval adds sets")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="grm figure", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="of the figure; --list shows them")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's name or folder, or the folder of "
                        "`grm study --scores`; gao-policy-size takes several")  # fmt: skip
    parser.add_argument("--out", type=Path, help=f"file, {', '.join(FORMATS)} (default: NAME.png; tables: printed)")
    parser.add_argument("--design", type=Path, help="CSV of rm (a condition) and layers, params, pairs, label_noise, "
                        "val_loss_nats, accuracy_gold, where a study of other tools has no sizes")  # fmt: skip
    parser.add_argument("--eval", type=Path, action="append", default=[], metavar="FOLDER",
                        help="what `grm rm-eval --out` wrote; may be repeated")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the figures")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(listed()))
        return 0
    if options.name is None or not options.runs:
        parser.error("which figure, and of which run? `grm figure --list` shows the figures")
    if options.name not in {**FIGURES, **TABLES}:
        raise ConfigError(f"no figure {options.name!r}: there are {', '.join([*FIGURES, *TABLES])}")
    records = [read(run, options.design) for run in options.runs]
    if options.name in TABLES:
        text = grm.tables(records, accuracies(options.eval))
        if options.out:
            options.out.write_text(text, encoding="utf-8")
        print(f"{options.name} -> {options.out}" if options.out else text)
        return 0
    out = options.out or Path(f"{options.name}.png")
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out {out}: figures are written as {', '.join(FORMATS)}")
    figure = FIGURES[options.name].draw(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plotting.plt.close(figure)
    print(f"{options.name} -> {out}")
    return 0


def listed() -> list[str]:
    """A line a figure: its name, what it shows, and where the paper has it."""
    rows = {**{n: (p.where, p.shows) for n, p in FIGURES.items()}, **TABLES}
    return [f"{name:<16} {shows} ({where})" for name, (where, shows) in rows.items()]


def accuracies(folders: Sequence[Path]) -> Mapping[str, Mapping[str, float]]:
    """Reward model -> set -> accuracy, from reports of `grm rm-eval`."""
    found: dict[str, dict[str, float]] = {}
    for folder in folders:
        file = folder / "metrics.json" if folder.is_dir() else folder
        if not file.is_file():
            raise ArtefactError(f"--eval {folder}: no metrics.json: run `grm rm-eval MODEL... --out {folder}` first")
        for model, measured in read_json(file)["models"].items():
            of = {name: m["accuracy"]["mean"] for name, m in measured["sets"].items()}
            found.setdefault(model, {}).update(of)
    return found
