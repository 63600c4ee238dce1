"""Each reward model of a study: what it is, how far it agrees with gold, and what optimising it did."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from bon.scores import write_scores
from core.artefacts import MANIFEST
from core.config import Config
from core.data.rows import ResponseRow, SampleRow
from core.files import read_json, read_table, write_json
from rm.checkpoints.folder import locate, shapes
from rm.evaluation.metrics import expected_calibration_error, negative_log_likelihood
from rm.gold import load_gold, score_samples
from study.analysis import conditions as analysis
from study.analysis.agreement import within_prompt_correlation
from study.analysis.bootstrap import cross_fitted_peak
from study.analysis.conditions import Curve, Plan
from study.records import Results

OUTCOMES = ("gold", "gold_at_peak", "drop")
"""Of a reward model's best-of-n: gold at its end, and at and since its cross-fitted peak."""


def rows(
    condition: str, names: Sequence[str], gold: Curve, agreed: Mapping[str, Mapping], facts: Mapping[str, Mapping]
) -> list[dict]:
    """One row a reward model of `condition`, in the order of the seeds of `gold`."""
    found = []
    for name, values in zip(names, gold.values, strict=True):
        peak = float(cross_fitted_peak(values[None], gold.seed)[0].mean())
        end = float(values[:, -1].mean())
        found.append(
            {"rm": name, "condition": condition, **facts.get(name, {}), **agreed[name], "n": int(gold.x[-1]),
             "gold": end, "gold_at_peak": peak, "drop": peak - end}
        )  # fmt: skip
    return found


def facts(cfg: Config, realised: Mapping[str, float]) -> dict[str, dict]:
    """Reward model -> its base, size, data and held-out measures, of the finished stage `rm`.

    Args:
        realised: share of its training labels that were flipped.
    """
    folder, found = cfg.run_dir / "rm", {}
    trained = read_json(folder / MANIFEST)["metrics"]["variants"]
    for name, variant in cfg.rm.variants.items():
        measured, layers = trained[name], read_json(folder / name / "config.json")["num_hidden_layers"]
        pairs = read_table(folder / name / "val.parquet")
        delta = np.array([r["reward_chosen"] - r["reward_rejected"] for r in pairs])
        found[name] = {
            "base": cfg.rm.base.path,
            "layers": layers,
            "params": parameters(folder / name, cfg.rm.base.path, layers),
            "text_regulariser": variant.text_regulariser,
            "head": variant.head,
            "pairs": measured["pairs"],
            "seed": variant.seed,
            "label_noise_asked": variant.label_noise,
            "label_noise_realised": realised[name],
            "accuracy_gold": measured["accuracy_gold"]["mean"],
            "accuracy_label": measured["accuracy_label"]["mean"],
            "val_loss_nats": negative_log_likelihood(delta),
            "val_ece": expected_calibration_error(delta),
            "train_seconds": measured["seconds"],
        }
    return found


def about(cfg: Config) -> dict[str, str | int | None]:
    """The policy with its number of parameters, and the gold; of a policy that is not here, None."""
    here = Path(cfg.policy.path).is_dir()
    size = sum(math.prod(shape) for shape in shapes(Path(cfg.policy.path)).values()) if here else None
    return {"policy": cfg.policy.path, "policy_params": size, "gold": cfg.gold.kind}


def parameters(folder: Path, base: str, layers: int) -> int:
    """Of the causal LM in `folder`; where it holds an adapter, of the first `layers` layers of its base."""
    whole = locate(base) if (folder / "adapter_config.json").is_file() else folder
    number = lambda name: int(found[1]) if (found := re.search(r"\.layers\.(\d+)\.", name)) else -1  # noqa: E731
    return sum(math.prod(shape) for name, shape in shapes(whole).items() if number(name) < layers)


def score_second_gold(cfg: Config) -> None:
    """`study/gold2.parquet`: the pools by `study.second_gold`, scored again only when it or they have changed."""
    out = cfg.run_dir / "study"
    file, mark = out / "gold2.parquet", out / "gold2.json"
    if cfg.study.second_gold is None:
        file.unlink(missing_ok=True)
        return
    outputs = {o["path"]: o["sha256"] for o in read_json(cfg.run_dir / "bon" / MANIFEST)["outputs"]}
    wanted = {"gold": cfg.study.second_gold.model_dump(mode="json"), "pools": outputs["samples.parquet"]}
    if file.is_file() and mark.is_file() and read_json(mark) == wanted:
        return
    samples = read_table(cfg.run_dir / "bon" / "samples.parquet", SampleRow)
    out.mkdir(parents=True, exist_ok=True)
    gold = score_samples(load_gold(cfg.study.second_gold), cast(list[ResponseRow], samples))
    write_scores(file, samples, gold.tolist())
    write_json(mark, wanted)


def second_gold(results: Results, plan: Plan) -> list[dict]:
    """Verdict and gain of each condition and ensemble by both golds; empty without a second one.

    `agreement` is the correlation of the golds within prompts: no proxy can be expected to agree better with either.
    """
    pools = results.pools
    if pools.second_gold is None:
        return []
    other = replace(pools, gold=pools.second_gold, second_gold=None)
    ceiling, best, table = within_prompt_correlation(pools.gold, other.gold), analysis.baselines(other, plan)[0], []
    for name, proxies in results.proxies.items():
        first, second = results.findings[name], analysis.findings(analysis.bon_curves(other, name, proxies, plan), best)
        table.append({
            "rm": name, "n": first["n"],
            **{f"gold{at}": getattr(first["gold"], end) for at, end in (("", "mean"), ("_lo", "lo"), ("_hi", "hi"))},
            "verdict": first["verdict"].kind,
            **{f"second{at}": getattr(second["gold"], end) for at, end in (("", "mean"), ("_lo", "lo"), ("_hi", "hi"))},
            "second_verdict": second["verdict"].kind,
            "agreement": ceiling.mean, "agreement_lo": ceiling.lo, "agreement_hi": ceiling.hi,
        })  # fmt: skip
    return table
