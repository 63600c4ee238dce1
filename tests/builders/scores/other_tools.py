"""Small files in the layouts of other tools, with planted scores."""

from __future__ import annotations

import csv
import json

import numpy as np

P, N = 12, 16
RNG = np.random.default_rng(0)
GOLD = RNG.normal(size=(P, N))
PROXY = {"bt-seed0": GOLD + RNG.normal(size=(P, N)), "bt-seed1": GOLD + RNG.normal(size=(P, N))}


def table():
    return [
        {"prompt_id": f"p{p:02d}", "sample_id": k, "gold": GOLD[p, k], "prompt": f"q{p}", "response": "a" * (k + 1),
         **{name: v[p, k] for name, v in PROXY.items()}}
        for p in range(P) for k in range(N)
    ]  # fmt: skip


def gens():
    return [
        {"instruction": f"q{p}", "input": "more" if p else "", "answers": [f"a{k}" for k in range(N)],
         "gold_scores": GOLD[p].tolist(), "proxy_scores": PROXY["bt-seed0"][p].tolist(),
         "proxy_scores_other": PROXY["bt-seed1"][p].tolist()}
        for p in range(P)
    ]  # fmt: skip


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def grm_rows(values):
    return [{"id": p, "response": f"{p} {k}", "reward": values[p, k]} for p in range(P) for k in range(N)]


def seed_folder(folder, ensemble=True, texts=None):
    """What `run_bon_pipeline.py` leaves: a file a seed, each sorted by its own proxy, and files of ensembles whose
    gold is in the wrong order."""
    proxies = {s: GOLD + np.random.default_rng(s).normal(size=(P, N)) for s in (1, 2, 3)}
    for seed, proxy in proxies.items():
        rows = gens()
        for p, row in enumerate(rows):
            row.pop("proxy_scores_other")
            order = proxy[p].argsort()
            row |= {"answers": [(texts or "a{k}").format(k=k) for k in order], "gold_scores": GOLD[p][order].tolist(),
                    "proxy_scores": proxy[p][order].tolist()}  # fmt: skip
        names = [f"seed{seed}"] + (["ensemble_mean"] if ensemble and seed == 1 else [])
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "proxy_labelled_sorted.json").write_text(json.dumps(rows[::-1] if seed == 2 else rows))
            (folder / name / "bon_sampled_results.json").write_text('[{"n": 1, "proxy_score": 0, "gold_score": 0}]')
    return proxies


def repository(folder, methods, chosen=True, seed=0):
    """The files of steps 3 and 5 of the GRM repository, with its columns: gold of what the proxy chooses among the
    first n, rendered by another template."""
    rng = np.random.default_rng(seed)
    answers = [[f"The answer {k} to question {p} is {rng.integers(1e9)}." for k in range(N)] for p in range(P)]
    for name, proxy in methods.items():
        (folder / "step3" / name).mkdir(parents=True)
        (folder / "step5" / name).mkdir(parents=True)
        order = rng.permutation([(p, k) for p in range(P) for k in range(N)])
        place = {p: [k for q, k in order.tolist() if q == p] for p in range(P)}  # the order in the file is theirs
        gemma = "<bos><bos><start_of_turn>user\nquestion {p}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n"
        write_csv(folder / "step3" / name / "proxy_score.csv", [
            {"prompts": gemma.format(p=p, a=answers[p][k]), "rewards": proxy[p, k], "source_ids": "all",
             "id_ids": p + 100}
            for p, k in order.tolist()
        ])  # fmt: skip
        rows = []
        for p, drawn in place.items():
            best = {max(range(n), key=lambda i, p=p, drawn=drawn: proxy[p, drawn[i]]) for n in range(1, N + 1)}
            rows += [
                {"prompts": f"<s><s> [INST] question {p} [/INST]{answers[p][drawn[i]]}</s>",
                 "gold_rewards": GOLD[p, drawn[i]], "source_ids": "all", "id_ids": p + 100, "order_ids": i + 1}
                for i in (sorted(best) if chosen else range(N))
            ]  # fmt: skip
        rng.shuffle(rows)
        write_csv(folder / "step5" / name / "gold_score.csv", rows)
        methods[name] = (proxy, place)
    return methods


def series_rows():
    return [
        {"run": "a", "step": s, "prompt_id": f"p{p:02d}", "proxy": s + 0.1 * p, "gold": s - 0.2 * s * s,
         "kl_k1": 0.5 * s}
        for s in range(6) for p in range(P)
    ]  # fmt: skip
