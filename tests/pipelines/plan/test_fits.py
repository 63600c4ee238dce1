"""Coefficients are found again from seconds that follow them."""

import pytest

from pipelines.plan.fits import fit_passes, non_negative, pass_features, predicted

TRUE = [0.01, 2e-3, 3e-5, 4e-8]


def points(*layers: int) -> list[dict]:
    return [
        {
            "rows": rows,
            "length": length,
            "layers": n,
            "seconds": predicted(TRUE, pass_features(rows * length, length, n)),
        }
        for rows, length in ((2, 96), (8, 96), (8, 384), (32, 96))
        for n in layers
    ]


def test_a_planted_pass_is_found():
    assert fit_passes(points(2, 8)) == pytest.approx(TRUE, rel=1e-6)


def test_a_call_that_something_else_slowed_down_does_not_count_much():
    """One of eight points takes three times as long; the fit stays within a tenth of the others."""
    clean = points(2, 8)
    for slow in range(len(clean)):
        disturbed = [dict(p, seconds=p["seconds"] * (3 if i == slow else 1)) for i, p in enumerate(clean)]
        found = fit_passes(disturbed)
        for i, p in enumerate(clean):
            if i != slow:
                fitted = predicted(found, pass_features(p["rows"] * p["length"], p["length"], p["layers"]))
                assert fitted == pytest.approx(p["seconds"], rel=0.1)


def test_with_one_number_of_layers_a_call_costs_per_layer():
    found = fit_passes(points(8))
    assert found[0] == 0 and found[1] == pytest.approx(TRUE[1] + TRUE[0] / 8, rel=1e-6)


def test_no_coefficient_is_negative():
    found = non_negative([[1, 1], [1, 2], [1, 3]], [3.0, 2.0, 1.0])
    assert min(found) >= 0 and max(found) > 0
