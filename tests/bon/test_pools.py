"""Pools of the samples and scores of a run."""

import numpy as np
import pytest

from bon.pools import from_tables
from core.errors import ArtefactError


def tables(P=3, M=4):
    samples = [{"prompt_id": f"p{p}", "sample_id": k, "n_tokens": 5 + k, "response": f"{p}{k}",
                "prompt": [{"role": "user", "content": f"q{p}"}]} for p in range(P) for k in range(M)]  # fmt: skip
    score = lambda f: [{"prompt_id": r["prompt_id"], "sample_id": r["sample_id"], "score": f(r)} for r in samples]  # noqa: E731
    return samples, score(lambda r: float(r["sample_id"])), score(lambda r: 37.0 * int(r["response"]) % 97)


def test_tables_are_joined_by_id():
    samples, gold, proxy = tables()
    pools = from_tables(samples[::-1], gold[5:] + gold[:5], {"rm": proxy[::-1]})
    np.testing.assert_array_equal(pools.gold, np.tile(np.arange(4.0), (3, 1)))
    assert pools.prompts == ("q0", "q1", "q2") and pools.responses[1][2] == "12"
    by_id = {(r["prompt_id"], r["sample_id"]): r["score"] for r in proxy}
    assert pools.proxies["rm"][2, 1] == by_id["p2", 1]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s, g, p: (s, g[1:], p), "scores of gold: .* 1 rows without a partner"),
        (lambda s, g, p: (s, g, [*p, p[0]]), "scores of rm: .* 1 duplicate ids"),
        (lambda s, g, p: (s[1:], g[1:], p[1:]), "pools are ragged: 3 to 4 samples a prompt, fewest at prompt p0"),
        (lambda s, g, p: (s, [g[0] | {"score": float("nan")}, *g[1:]], p), "1 of 12 scores of gold are NaN"),
        (lambda s, g, p: (s, [r | {"response": "other"} for r in g], p), "12 ids name different texts"),
        (lambda s, g, p: (s, g, g), "rm scores exactly as gold does"),
    ],
)
def test_scores_that_do_not_fit_are_named(break_it, message):
    samples, gold, proxy = break_it(*tables())
    with pytest.raises(ArtefactError, match=message):
        from_tables(samples, gold, {"rm": proxy})
