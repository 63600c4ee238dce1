"""Ratios are taken within pairs of neighbouring runs."""

import pytest

from benchmarks.statistics import ratios, spread


def runs(*pairs):
    return [{"seconds": seconds, "work": work} for seconds, work in pairs]


def test_a_ratio_is_of_neighbours_and_not_of_medians():
    ours, theirs = runs((1, 1), (10, 1), (100, 1)), runs((400, 1), (30, 1), (25, 1))
    assert ratios(ours, theirs, "faster") == pytest.approx([400, 3, 0.25])
    assert spread(ratios(ours, theirs, "faster")) == {"median": 3, "low": 0.25, "high": 400}


def test_work_counts():
    """60 tokens in 2 s against 20 tokens in 4 s are 30 against 5 tokens a second."""
    assert ratios(runs((2, 60)), runs((4, 20)), "faster") == pytest.approx([6])


def test_a_cost_is_our_time_over_theirs_for_the_same_work():
    assert ratios(runs((3, 8)), runs((2, 8)), "cost") == pytest.approx([1.5])


def test_sides_of_different_length_are_refused():
    with pytest.raises(ValueError):
        ratios(runs((1, 1)), [], "faster")
    with pytest.raises(ValueError):
        spread([])


def test_the_median_of_an_even_number_lies_between():
    assert spread([4, 1, 2, 8])["median"] == 3
