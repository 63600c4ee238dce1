"""Our side of best-of-n: `bon.estimators.best_of_n` for every n."""

from __future__ import annotations

import numpy as np

from benchmarks.peers.channel import Channel, versions
from bon.estimators import best_of_n


def main() -> None:
    channel = Channel()
    job = channel.job
    scores = np.load(job["scores"], allow_pickle=False)  # [2, prompts, samples]: proxy, gold
    proxy, gold = scores
    ns = np.arange(1, proxy.shape[1] + 1)
    results = np.empty(0)

    def run() -> int:
        nonlocal results
        results = best_of_n(proxy, gold, ns)
        return len(ns)

    def check() -> dict:
        wanted = results[:, np.array(job["ns"]) - 1]
        return {"mean": wanted.mean(0).tolist()}

    channel.serve(run, check, versions=versions("numpy"), settings={"estimator": "mean over all subsets of n samples"})


if __name__ == "__main__":
    main()
