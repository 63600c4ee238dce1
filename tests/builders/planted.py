"""Pools of best-of-n and series of policies with a planted over-optimisation."""

import numpy as np

from bon.pools import Pools
from study.analysis.conditions import Plan

EVIL = "</script><script>document.title='hacked'</script>"
PLAN = Plan(np.arange(1, 33), draws=200, ensembles=("mean",), temperatures=(0.5,))


def pools(P=40, N=32):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(P, N))
    names = [f"{m}-seed{s}" for m in ("bt", "grm") for s in range(3)]
    return Pools(
        tuple(f"p{i:03d}" for i in range(P)),
        z - 0.8 * np.maximum(z - 1, 0) ** 2 + 0.3 * rng.normal(size=(P, N)),
        {n: z + 0.4 * rng.normal(size=(P, N)) for n in names},
        length=rng.integers(5, 50, size=(P, N)).astype(float),
        logp=-rng.uniform(5, 40, size=(P, N)),
        prompts=tuple(f"question {i} {EVIL}" for i in range(P)),
        responses=tuple(
            tuple(f"answer {i}.{k} {'needle' if i == 7 else ''}{EVIL}" for k in range(N)) for i in range(P)
        ),
    )


def series(bend, P=150, start=0):
    rng, rows = np.random.default_rng(start), []
    base = rng.normal(size=P)
    for step in range(0, 12):
        kl = 0.4 * step
        d = np.sqrt(kl)
        for p in range(P):
            rows.append({"step": step, "prompt_id": f"p{p:03d}", "proxy": base[p] + d + 0.3 * rng.normal(), "kl": kl,
                         "gold": 2 * base[p] + d * (1 - bend * d) + 0.5 * rng.normal()})  # fmt: skip
    return rows
