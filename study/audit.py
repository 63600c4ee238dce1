"""`grm audit MODEL...`: how soon a reward model is over-optimised, without training anything.

A policy samples a pool of responses to each prompt, once. Reward models and gold score it, and best-of-n by each of
them shows how gold rises and falls as the reward model is optimised. Reward models are compared prompt by prompt.

    grm audit MODEL [MODEL...]                   folders or hub ids, as for `grm rm-eval`
    grm audit MODEL --out F                      adds a model to the finished audit in F: only that one is scored
    grm audit MODEL --pools runs/offline/bon     on the pool of a run
    grm audit --scores FILE --out F              columns of scores of F/samples.parquet, of models that cannot be loaded
    grm audit --scores FILE                      scores with their own gold (layouts: docs/study.md): no model is run
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import yaml

from bon.estimators import kl_bound
from bon.pools import Pools
from bon.scores import pools_of_files
from core import environment
from core.artefacts import code_version, package_versions
from core.column_files import first_row
from core.config import NATIVE_DTYPE, Config, Dtype, Gold
from core.config.load import load
from core.data.rows import SampleRow
from core.errors import ConfigError
from core.files import read_json, read_table, write_json
from rm.reading import Reads
from study import checks as check
from study import files
from study.analysis.bootstrap import Interval
from study.design import Condition
from study.imported import grid
from study.other_tools import read_scores
from study.records import Results
from study.report import page as study_page
from study.results import plan_of, results

KEPT = (
    "verdict", "gold", "proxy", "rise", "drop", "gold_at_peak", "efficiency", "regret", "extremal_gap", "harmed",
    "win_rate", "length", "gold_beyond_length", "difference", "difference_p", "difference_p_holm", "fit",
)  # fmt: skip
"""Numbers of a reward model in audit.json, beside its agreement with gold."""
MADE_WITH = "audit.yaml"
"""The configuration of an audit, with which models are added to it."""


def main(argv: list[str]) -> int:
    options = _parser().parse_intermixed_args(argv)
    overrides = [word for word in options.models if _is_override(word)]
    options.models = [word for word in options.models if word not in overrides]
    if not options.models and options.scores is None:
        raise ConfigError("give a reward model (a folder or hub id), or --scores FILE")
    alone = options.scores is not None and not options.models and "gold" in _columns(options.scores)
    options.out = options.out or Path("runs", options.scores.stem if alone else "audit")
    made_with = options.out / MADE_WITH
    asked = ("config", "policy", "prompts", "samples", "pools", "gold")
    options.continues = (
        not (alone or overrides or any(getattr(options, name) for name in asked)) and made_with.is_file()
    )
    cfg = load([made_with] if options.continues else options.config or ["configs/offline.yaml"], overrides)
    cfg = configured(cfg.after_sft(), options)
    if not alone and not environment.is_started():
        from pipelines import launch

        launch.restart(["audit", *argv])  # with the threads and the allocator of a stage
    print(scored(cfg, options) if alone else audit(cfg, options))
    return 0


def configured(cfg: Config, options: argparse.Namespace) -> Config:
    """The configuration with what the options say."""
    if options.policy:
        cfg = _updated(cfg, "policy", path=options.policy)
    if options.gold:
        kind = "judge" if options.gold == "judge" else "checkpoint" if Path(options.gold).is_dir() else "hub"
        default = cfg.gold if cfg.gold.kind == "judge" else Gold()
        cfg = _updated(cfg, "gold", kind=kind, path=default.path if kind == "judge" else options.gold)
    if options.samples:
        if options.samples < 2:
            raise ConfigError("--samples: a pool needs at least 2")
        cfg = _updated(cfg, "bon", samples=options.samples, n_max=None)
    return cfg


def _updated(cfg: Config, section: str, **values: Any) -> Config:
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})


def audit(cfg: Config, options: argparse.Namespace) -> str:
    """Sample, score and report; the lines to print."""
    from study import audit_pools as kept

    out = options.out
    keys = {kept.model_key(path, options.dtype, options.reads): path for path in options.models}
    if options.continues:
        samples, source = read_table(out / "samples.parquet", SampleRow), read_json(out / "audit.json")["source"]
    elif options.scores and not options.models and not (out / "samples.parquet").is_file():
        raise ConfigError(f"--scores {options.scores} has no gold, and {out} no samples that it could be scores of")
    elif options.pools:
        samples, source = kept.taken(options.pools, out), f"the pools {options.pools}"
    else:
        samples = kept.sampled(cfg, kept.audit_prompts(cfg, options.prompts), out)
        source = f"the policy {Path(cfg.policy.path).name}"
    columns = kept.given_scores(options.scores, samples, out) if options.scores else {}
    entries = kept.register(out, keys, columns)
    if options.pools:
        plain = options.dtype == NATIVE_DTYPE and options.reads is None
        kept.reuse(options.pools, out, cfg, entries, plain=plain)
    kept.score(out, entries, samples, options.dtype, options.reads)
    gold = kept.gold_scores(cfg, samples, out)
    pools = pools_of_files(
        out / "samples.parquet", gold, {entry["name"]: kept.score_file(out, key) for key, entry in entries.items()}
    )
    about = {
        "source": source, "gold": cfg.gold.kind, "gold_path": cfg.gold.path,
        "models": {entry["name"]: {"key": key, **entry} for key, entry in entries.items()},
    }  # fmt: skip
    gold_name = cfg.gold.kind if cfg.gold.kind == "judge" else cfg.gold.path
    text = f"of {source}; gold: {gold_name}"
    said = report(cfg, pools, out, about, text, baseline=options.baseline, more=check.degenerate(samples, "pool"))
    # Last, since an audit that has it is finished.
    (out / MADE_WITH).write_text(yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return said


def scored(cfg: Config, options: argparse.Namespace) -> str:
    """The audit of scores that have their own gold."""
    pools = read_scores(options.scores)
    if not isinstance(pools, Pools):
        raise ConfigError(
            f"--scores {options.scores}: gold covers only chosen responses; `grm study --scores` reads it"
        )
    about = {"scores": options.scores, "models": {name: {} for name in pools.proxies}}
    return report(cfg, pools, options.out, about, f"scores of {options.scores}", baseline=options.baseline)


def report(
    cfg: Config, pools: Pools, out: Path, about: Mapping[str, Any], text: str, *, baseline: str | None = None,
    more: Sequence[check.Check] = (),
) -> str:  # fmt: skip
    """Curves, verdicts and comparisons of the proxies of pools: tables, audit.json, audit.html; the lines to print."""
    names = list(about["models"])
    if baseline is not None and baseline not in names:
        raise ConfigError(f"--baseline {baseline}: no such reward model; there are {', '.join(names)}")
    base = baseline or names[0]
    ordered = sorted(names, key=lambda name: name != base)
    conditions = {Condition(name): [name] for name in ordered}
    n_max = min(cfg.bon.n_max or pools.size, pools.size)
    plan = replace(plan_of(cfg, 1), ns=grid(n_max))
    found = results(pools, conditions, {}, plan, dict.fromkeys(conditions, Condition(base)))
    checks = [check.aligned(found), check.length_confound(pools, found), check.bound_is_close(found),
              check.enough(found, {}, 0)[1], *more]  # fmt: skip
    files.write(out, found)
    described = f"{len(pools.prompt_ids)} prompts, pools of {pools.size} {text}"
    write_json(out / "audit.json", files.plain({
        **{k: v if isinstance(v, dict) else v and str(v) for k, v in about.items()},
        "prompts": len(pools.prompt_ids), "samples": pools.size, "n": n_max, "kl": float(kl_bound(n_max)),
        "baseline": base, "checks": checks,
        "models": {name: about["models"][name] | facts(found, name) for name in ordered},
        "code": code_version(), "packages": package_versions(),
    }))  # fmt: skip
    title = f"Audit of {', '.join(ordered)}"
    question = f"How soon is {'each of these' if len(names) > 1 else 'this'} over-optimised? {described}."
    study_page.write(out, title, question, found, checks, file="audit")
    return "\n".join([*lines(found, base), f"audit: {out / 'audit.html'}"])


def facts(found: Results, name: str) -> dict[str, Any]:
    """What audit.json says of a reward model: verdict, peak, and the numbers of the report."""
    one, row = found.findings[name], next(r for r in found.rms if r["rm"] == name)
    agreed = {k: row[k] for k in ("accuracy", "pearson", "spearman", "tail_spearman", "ece", "sd_within")}
    return {
        **{key: one.get(key) for key in KEPT},
        "peak_n": one["peak_n"], "peak_kl": _squared(one["peak_d"]), "agreement": agreed,
    }  # fmt: skip


def _squared(d: Interval) -> Interval:
    return Interval(d.mean**2, d.lo**2, d.hi**2)


def lines(found: Results, base: str) -> list[str]:
    """A line for each reward model, and one for each comparison."""
    said = [f"{name}: {f['verdict'].kind}: {f['verdict'].why}" for name, f in found.findings.items()]
    return said + [
        f"{name} less {base}, gold at best of {f['n']}: {f['difference']} SD, p {f['difference_p_holm']:.2g}"
        for name, f in found.findings.items() if f["difference"] is not None
    ]  # fmt: skip


def _columns(scores: Path) -> set[str]:
    """Of a file; a folder is of a layout with a gold of its own."""
    return {"gold"} if scores.is_dir() else {*first_row(scores)} | ({"gold"} if _has_gold(scores) else set())


def _has_gold(scores: Path) -> bool:
    return bool({"gold_scores", "num_correct", "scores_chosen"} & first_row(scores).keys())


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grm audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL",
        help="folder or hub id of a reward model; a.b=value is laid over the configuration")  # fmt: skip
    add("--config", "-c", action="append", metavar="FILE",
        help="YAML file; repeat to lay files over each other (default: configs/offline.yaml)")  # fmt: skip
    add("--policy", metavar="PATH", help="folder or hub id of what responses are sampled from (default: policy.path)")
    add("--prompts", type=Path, metavar="FILE", help="prompts of your own, all of which are used (default: the split "
        "eval of data.prompts); bon.prompts=N takes N of them")  # fmt: skip
    add("--samples", type=int, metavar="N", help="responses to a prompt (default: bon.samples)")
    add("--gold", metavar="GOLD", help="judge, a folder or a hub id (default: gold of the configuration)")
    add("--pools", type=Path, metavar="FOLDER", help="take the pool of a finished stage bon instead of sampling")
    add("--scores", type=Path, metavar="FILE", help="scores by models that cannot be loaded, a column each")
    add("--baseline", metavar="NAME", help="what the others are compared with (default: the first model)")
    add("--dtype", choices=get_args(Dtype), default=NATIVE_DTYPE, help="of the models' weights (%(default)s)")
    add("--reads", choices=get_args(Reads), help="tokens that the models read (default: what each records, or what the "
        "makers of its layout do; docs/reward-models.md)")  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="what is kept and shown (default: runs/audit)")
    return parser
