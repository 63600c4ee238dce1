"""Curves of the evaluation: units, matching by id, intervals."""

import math

import numpy as np
import pytest

from bon.curves import COLUMNS, curve, matrix, read_curves, write_curves
from bon.run import analyse, within_prompt_correlation
from bon.scores import write_scores
from core.config import BestOfN, Config, Evaluation
from core.errors import ArtefactError
from core.files import join

P, N = 6, 4


def pool(rng) -> list[dict]:
    return [
        {"prompt_id": f"p{p}", "sample_id": s, "n_tokens": int(rng.integers(1, 9)), "response": f"{p} {s}"}
        for p in range(P)
        for s in range(N)
    ]


def test_matrix_is_placed_by_id_not_by_order():
    rows = [{**row, "x": 10 * p + s} for p in range(P) for s, row in enumerate(pool(np.random.default_rng(0))[:N])]
    rows = [{**row, "prompt_id": f"p{row['x'] // 10}"} for row in rows]
    expected = [[10 * p + s for s in range(N)] for p in range(P)]
    np.testing.assert_array_equal(matrix(rows, "x"), expected)
    np.testing.assert_array_equal(matrix(rows[::-1], "x"), expected)


@pytest.mark.parametrize("damage", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: [*r[:-1], r[0]]])
def test_tables_that_do_not_match_by_id_are_errors(damage):
    rows = pool(np.random.default_rng(0))
    with pytest.raises(ValueError, match="ragged"):
        matrix(damage(rows), "n_tokens")
    with pytest.raises(ArtefactError, match="do not join"):
        join(rows, damage([{"prompt_id": r["prompt_id"], "sample_id": r["sample_id"], "score": 0.0} for r in rows]))


@pytest.fixture
def analysed(tmp_path):
    """Best-of-n of a proxy 3 gold + 5, its scores stored in another order than the samples."""
    rng = np.random.default_rng(1)
    samples, gold = pool(rng), rng.normal(7.0, 2.0, P * N)
    write_scores(tmp_path / "scores" / "gold.parquet", samples, gold.tolist())
    write_scores(tmp_path / "scores" / "rm.parquet", samples[::-1], (3 * gold + 5)[::-1].tolist())
    cfg = Config(bon=BestOfN(samples=N), eval=Evaluation(bootstrap=200))
    metrics = analyse(cfg, tmp_path, samples, {"rm": (5.0, 3.0)})
    return gold.reshape(P, N), metrics, read_curves(tmp_path / "curves.csv")


def test_best_of_n_curves_are_normalised_and_joined_by_id(analysed):
    gold, metrics, rows = analysed
    assert metrics["gold_mean"] == pytest.approx(gold.mean()) and metrics["gold_std"] == pytest.approx(gold.std(ddof=1))
    found = {(r["rm"], r["metric"], r["x"]): r["mean"] for r in rows}
    assert found["rm", "gold", 1] == pytest.approx(0, abs=1e-12)
    assert found["rm", "proxy", N] == pytest.approx(gold.max(axis=1).mean())  # (3 gold + 5 - 5) / 3
    unit = (gold.max(axis=1).mean() - gold.mean()) / gold.std(ddof=1)
    assert found["rm", "gold", N] == pytest.approx(unit) == found["oracle", "gold", N]
    assert metrics["variants"]["rm"]["within_prompt_correlation"] == pytest.approx(1)


def test_best_of_n_rows_carry_the_bound_and_their_size(analysed):
    for row in analysed[2]:
        assert set(row) == set(COLUMNS) and row["method"] == "bon" and row["kl_kind"] == "bound"
        assert row["kl"] == pytest.approx(math.log(row["x"]) - (row["x"] - 1) / row["x"])
        assert row["d"] == pytest.approx(math.sqrt(row["kl"]))
        assert row["lo"] <= row["mean"] <= row["hi"] and (row["prompts"], row["pool"]) == (P, N)


def test_ppo_rows_survive_the_file(tmp_path):
    values = np.random.default_rng(2).normal(size=(P, 3))
    rows = curve(
        values, rm="rm", method="ppo", metric="gold", xs=[0, 5, 10], kl=[-1e-9, 0.5, 2.0], kl_kind="rb", pool=1,
        draws=200, seed=3,
    )  # fmt: skip
    write_curves(tmp_path / "curves.csv", rows)
    assert read_curves(tmp_path / "curves.csv") == rows
    assert [r["x"] for r in rows] == [0, 5, 10] and rows[0]["d"] == 0 and rows[2]["d"] == math.sqrt(2)
    np.testing.assert_allclose([r["mean"] for r in rows], values.mean(axis=0))


def test_within_prompt_correlation_ignores_prompt_means():
    within = np.tile([-1.0, 0.0, 1.0], (4, 1))
    shift = np.arange(4.0)[:, None]
    assert within_prompt_correlation(within + 100 * shift, -within + 100 * shift) == pytest.approx(-1)
    assert within_prompt_correlation(within, np.ones_like(within)) is None
