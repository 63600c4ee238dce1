"""Time of the study's estimators at the size of a real one: `python -m benchmarks.bon_curves` (no model).

1,000 prompts x 405 samples, every n from 1 to 405: gold, proxy and win rate of one reward model, each with pointwise
intervals and simultaneous bands from 1,000 bootstrap draws.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from bon.gains import gains
from bon.pools import Pools
from study.analysis.conditions import Plan, bon_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=405)
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(options.prompts, options.samples))
    proxy = gold + rng.normal(size=gold.shape)
    pools = Pools(tuple(f"p{i}" for i in range(options.prompts)), gold, {"rm": proxy})
    plan = Plan(np.arange(1, options.samples + 1), draws=options.draws)
    started = time.perf_counter()
    curves = bon_curves(pools, "rm", gains(proxy)[None], plan)
    estimated = time.perf_counter() - started
    for metric in ("gold", "proxy", "win_rate"):
        curves[metric].rows()
    whole = time.perf_counter() - started
    print(f"{options.prompts} prompts x {options.samples} samples, all n, {options.draws} draws")
    print(f"curves {estimated:.1f} s, with intervals and bands {whole:.1f} s in all")


if __name__ == "__main__":
    main()
