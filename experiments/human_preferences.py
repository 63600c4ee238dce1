"""Reward models on real human preferences: BT, every GRM and an ensemble, by data size, label noise and seed.

    make human-preferences        # prompts, then: python -m experiments.human_preferences train, table

`train` makes the models of a grid one after the other and keeps their rewards on the evaluation sets, a Parquet file
each; existing files are not made again, and `--part 0/2`, `--part 1/2` divide the grid over two processes or
machines. `table` reads them and writes Markdown. All arms of a size and noise see the same pairs with the same wrong
labels; a seed is another head and another order of the pairs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from core.config import Config, PreferenceSource
from core.config.load import load
from core.data.chat import ChatTokenizer, conversation
from core.data.labels import flip_labels
from core.data.rows import PairRow
from core.data.sources import read_pairs
from core.data.streams import stream_seed, unit_interval
from core.data.tables import Malformed
from core.environment import STARTED, variables
from core.errors import ArtefactError
from core.files import read_table, write_table
from core.training import distributed
from pipelines.import_pairs import as_row, import_pairs
from rm import combine
from rm.evaluation.intervals import cluster_bootstrap
from rm.evaluation.metrics import Units, pair_accuracy, paired_difference

TRAIN = ("hh_harmless_base_test", "hh_helpful_base_test", "oasst_en100", "pandalm_testset_v1")
ELSEWHERE = ("hhh_alignment", "ukp_convarg1_strict", "gsm8k_model_solutions")
SIZES, NOISES, SEEDS = (300, 900), (0.0, 0.25), (0, 1, 2)
EVALUATED = 250
"""Pairs of each evaluation set at most, by hash."""
DRAWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("--config", default="configs/human.yaml")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("RLHF_DATA", "../shared/data")))
    parser.add_argument("--part", default="0/1", help="K/N: every N-th reward model, from the K-th")
    parser.add_argument("--out", type=Path, default=Path("docs/human-preferences-table.md"), help="of `table`")
    options = parser.parse_args()
    files = {name: options.data / "unified" / f"{name}.jsonl" for name in (*TRAIN, *ELSEWHERE)}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        sys.exit(f"no {', '.join(missing)}: set RLHF_DATA or --data to the folder that holds unified/")
    part, parts = map(int, options.part.split("/"))
    if options.what == "train" and STARTED not in os.environ:  # threads and allocator are set before Python starts
        sys.exit(subprocess.run([sys.executable, "-m", "experiments.human_preferences", *sys.argv[1:]],
                                env={**os.environ, **variables(parts)}).returncode)  # fmt: skip
    cfg = load([options.config], [
        *(f"preferences.sources.{name}.path={files[name]}" for name in TRAIN),
        f"preferences.decontaminate=[{files['hhh_alignment']}]",
    ])  # fmt: skip
    if options.what == "train":
        train(cfg, files, part, parts)
    else:
        options.out.write_text(table(cfg, files))
        print(options.out)


def train(cfg: Config, files: dict[str, Path], part: int, parts: int) -> None:
    from rm.reading import Reader
    from rm.score import score_tokens
    from rm.train import fit
    from rm.variants import frozen_state_cache

    distributed.init_distributed()
    tokenizer = ChatTokenizer(cfg.rm.base)
    pairs, sets = data(cfg, files, tokenizer)
    rows = [row for found in sets.values() for row in found]
    reader = Reader(tokenizer)
    tokens = [reader.conversation(conversation(r["prompt"], r[k])) for k in ("chosen", "rejected") for r in rows]
    # Methods innermost: a grid that is cut short compares all methods on what it has.
    grid = list(product(SEEDS, NOISES, SIZES, cfg.rm.variants))[part::parts]
    cache = frozen_state_cache(cfg.rm, cfg.engine_of("rm"))
    for number, (seed, noise, size, method) in enumerate(grid, start=1):
        file = path(cfg, seed, noise, size, method)
        if file.is_file():
            continue
        started = time.time()
        variant = cfg.rm.variants[method].model_copy(update={"seed": seed})
        labelled = flip_labels(pairs[:size], noise, np.random.default_rng(stream_seed(cfg.run.seed, "noise", size)))
        file.with_suffix("").mkdir(parents=True, exist_ok=True)
        settings, folder = cfg.engine_of("rm"), file.with_suffix("")
        engine, model, _ = fit(
            cfg.rm, settings, variant, labelled, folder, name=file.stem, seed=cfg.run.seed, cache=cache
        )
        trained = time.time() - started
        rewards = score_tokens(
            engine,
            tokenizer,
            tokens,
            limits=model.limits,
            frozen=cache,
            device=distributed.device(),
            progress="rewards",
        ).tolist()
        n = len(rows)
        write_table(file, [
            {"pair_id": r["pair_id"], "chosen": c, "rejected": j}
            for r, c, j in zip(rows, rewards[:n], rewards[n:], strict=True)
        ])  # fmt: skip
        print(f"{number}/{len(grid)} {file.stem}: trained in {trained:.0f} s, scored in "
              f"{time.time() - started - trained:.0f} s", flush=True)  # fmt: skip
        del model
        engine.close()


def data(
    cfg: Config, files: dict[str, Path], tokenizer: ChatTokenizer
) -> tuple[list[PairRow], dict[str, list[PairRow]]]:
    """Training pairs in their order, and the evaluation sets; all of them within `rm.max_tokens`."""
    prompts = cfg.run_dir / "prompts"
    if not prompts.is_dir():
        raise ArtefactError(f"no {prompts}: run `grm prompts --config configs/human.yaml` first")
    splits, dropped, _ = import_pairs(cfg.preferences, cfg.data, prompts=prompts, seed=cfg.run.seed)
    print(f"left out of training: {dropped}", flush=True)
    fits = lambda rows: [r for r in rows if longest(r, tokenizer) <= cfg.rm.max_tokens]  # noqa: E731
    sets = {"in distribution": fits(splits["rm_val"])[:EVALUATED]}
    for name in ELSEWHERE:
        found = {r["pair_id"]: r for r in map(as_row, read_pairs(PreferenceSource(path=files[name]), Malformed()))}
        ordered = sorted(found.values(), key=lambda r: unit_interval(r["pair_id"], salt=f"order/{cfg.run.seed}"))
        sets[name] = fits(ordered)[:EVALUATED]
    return fits(splits["rm_train"])[: max(SIZES)], sets


def longest(row: PairRow, tokenizer: ChatTokenizer) -> int:
    return len(tokenizer.prompt_ids(row["prompt"])) + max(
        len(tokenizer.response_ids(text)) for text in (row["chosen"], row["rejected"])
    )


def path(cfg: Config, seed: int, noise: float, size: int, method: str) -> Path:
    return cfg.run_dir / "grid" / f"size{size}-noise{noise:g}" / f"{method}-seed{seed}.parquet"


def table(cfg: Config, files: dict[str, Path]) -> str:
    """Accuracy with its interval, and the difference to BT, by condition, method and set."""
    pairs, sets = data(cfg, files, ChatTokenizer(cfg.rm.base))
    baselines = {name: hits_of(rows, *words(rows)).hits.mean() for name, rows in sets.items()}
    lines = [
        "# Accuracy on human preferences",
        "",
        f"In per cent: the mean of {len(SEEDS)} seeds with its 95% interval over prompts, and ± the SD over seeds. Δ "
        "is the difference to BT on the same pairs with its interval, bold where that excludes 0.",
        "",
        f"Evaluation pairs (prompts): {'; '.join(f'{k} {len(v)} ({prompts_in(v)})' for k, v in sets.items())}. The "
        f"longest answer scores {', '.join(f'{100 * v:.1f}' for v in baselines.values())}.",
    ]
    for noise, size in product(NOISES, SIZES):
        found = {m: [rewards(cfg, sets, s, noise, size, m) for s in SEEDS] for m in cfg.rm.variants}
        lines += ["", f"**{size} pairs, {noise:.0%} of the labels wrong**", ""]
        lines += ["| reward model | " + " | ".join(sets) + " |", "| --- |" + " ---: |" * len(sets)]
        arms = {m: [hits(seed, sets) for seed in seeds] for m, seeds in found.items()}
        arms |= {f"BT x {len(SEEDS)}, {name}": [hits(ensemble(found["bt"], name), sets)] for name in ("mean", "min")}
        for method, seeds in arms.items():
            cells = [cell(sets[k], [s[k] for s in seeds], [s[k] for s in arms["bt"]], method != "bt") for k in sets]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rewards(cfg: Config, sets: dict, seed: int, noise: float, size: int, method: str) -> dict[str, np.ndarray]:
    """Set -> [2, n] rewards of chosen and rejected, joined by pair."""
    file = path(cfg, seed, noise, size, method)
    if not file.is_file():
        raise ArtefactError(f"no {file}: run `python -m experiments.human_preferences train` to its end first")
    by_id = {row["pair_id"]: (row["chosen"], row["rejected"]) for row in read_table(file)}
    return {name: np.array([by_id[r["pair_id"]] for r in rows]).T for name, rows in sets.items()}


def ensemble(members: Sequence[dict], name: str) -> dict[str, np.ndarray]:
    """Set -> [2, n]: the members' rewards in units of their own spread on responses of the distribution, combined."""
    inside = [m["in distribution"] for m in members]
    means, stds = [float(x.mean()) for x in inside], [float(x.std(ddof=1)) for x in inside]
    found = {}
    for key in members[0]:
        flat = torch.tensor(np.stack([m[key].ravel() for m in members]))
        found[key] = combine.combiner(name)(combine.standardise(flat, means, stds)).numpy().reshape(2, -1)
    return found


def hits(scored: dict[str, np.ndarray], sets: dict) -> dict[str, Units]:
    return {name: hits_of(sets[name], *both) for name, both in scored.items()}


def hits_of(rows: list[PairRow], chosen: np.ndarray, rejected: np.ndarray) -> Units:
    ids, prompts = [r["pair_id"] for r in rows], [r["prompt_id"] for r in rows]
    return Units(ids, [r["source"] for r in rows], prompts, pair_accuracy(chosen, rejected))


def words(rows: list[PairRow]) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = (np.array([len(r[k].split()) for r in rows], dtype=float) for k in ("chosen", "rejected"))
    return chosen, rejected


def prompts_in(rows: list[PairRow]) -> int:
    return len({r["prompt_id"] for r in rows})


def cell(rows: list[PairRow], seeds: list[Units], baseline: list[Units], compared: bool) -> str:
    """`62.1 [58.0, 66.2] ± 0.9, Δ +1.2 [-0.4, +2.8]`."""
    first = seeds[0]
    mean = Units(first.names, first.subset, first.prompt, np.mean([s.hits for s in seeds], axis=0))
    lo, hi = cluster_bootstrap(mean.hits, mean.prompt, draws=DRAWS, seed=0)
    assert lo is not None and hi is not None, "a set has several prompts"
    text = f"{100 * mean.hits.mean():.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"
    if len(seeds) > 1:
        text += f" ± {100 * np.std([s.hits.mean() for s in seeds], ddof=1):.1f}"
    if not compared:
        return text
    other = Units(first.names, first.subset, first.prompt, np.mean([s.hits for s in baseline], axis=0))
    d = paired_difference(mean, other, draws=DRAWS, seed=0)
    delta = f"Δ {100 * d['mean']:+.1f} [{100 * d['lo']:+.1f}, {100 * d['hi']:+.1f}]"
    return f"{text}, {f'**{delta}**' if d['lo'] * d['hi'] > 0 else delta}"


if __name__ == "__main__":
    main()
