"""What a soak takes for growth, on planted rows."""

import numpy as np
import pytest

from experiments.soak.serving import Question, _fault, questions
from experiments.soak.watch import Held, faults, growths


def rows(memory=lambda share: 500.0, **counts) -> list[Held]:
    """A hundred looks; each argument is a function of the share of the work that is done."""
    found = []
    for k in range(1, 101):
        of = {name: counts.get(name, lambda share: 40)(k / 100) for name in Held._fields[3:]}
        found.append(Held(seconds=2.0 * k, done=k, memory_mib=memory(k / 100), **of))
    return found


def test_what_fills_in_the_beginning_and_what_is_noise_is_no_growth():
    noise = np.random.default_rng(0).normal(0, 5, size=101)
    assert faults(rows(lambda share: 500 * min(1, 4 * share) + noise[round(100 * share)]), 0.05) == []
    assert faults(rows(handles=lambda share: 40 + round(100 * share) % 2), 0.05) == []


@pytest.mark.parametrize("name", Held._fields[3:])
def test_a_slow_leak_is_named(name):
    assert faults(rows(**{name: lambda share: 40 + int(24 * share)}), 0.05) == [
        f"{name.replace('_', ' ')} grows from 49 to 61"
    ]


def test_memory_that_grows_by_a_tenth_in_half_of_the_work_is_named():
    assert faults(rows(lambda share: 500 + 100 * share), 0.05) == ["memory mib grows from 538 to 588"]
    assert growths(rows(lambda share: 500 + 100 * share))["memory_mib"].share == pytest.approx(50 / 538, rel=0.02)


def test_too_few_looks_prove_nothing():
    with pytest.raises(ValueError, match="7 looks are too few"):
        growths(rows()[:7])


def test_wrong_answers_are_told_from_right_ones():
    asked = Question("/score", {}, [1.0, 2.0])
    assert _fault(asked, 200, {"rewards": [1.0, 2.0 + 1e-5]}) == ""
    assert _fault(asked, 200, {"rewards": [1.0, 2.1]}) == "a reward is off by 0.1"
    assert _fault(asked, 500, {"error": "x"}).startswith("status 500")
    refused = asked._replace(rewards=[])
    assert _fault(refused, 400, {"error": "x"}) == "" and "with 200" in _fault(refused, 200, {"rewards": [1.0]})


def test_questions_are_the_same_for_the_same_seed():
    texts = [f"What is {i}?" for i in range(60)]
    assert questions(texts, 0) == questions(texts, 0) != questions(texts, 1)
