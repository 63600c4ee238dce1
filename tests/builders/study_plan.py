"""The plan of a study of 24 reward models and 8 policies."""

from core.config.load import load
from study import matrix

ASKED = [
    "study.variants=[bt, grm]", "study.seeds=3", "study.pairs=[100, 200]", "study.label_noise=[0, 0.25]",
    "study.ppo_variants=[grm]", "study.kl_coefs=[0.0, 0.1]",
]  # fmt: skip


def planned(tmp_path, *more):
    cfg = load([], [f"run.dir={tmp_path}", "run.name=s", *ASKED, *more])
    arms, policies = matrix.plan(cfg)
    return matrix.expanded(cfg, arms), arms, policies
