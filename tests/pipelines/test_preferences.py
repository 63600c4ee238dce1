"""Pairs of samples keep the tokens of their responses, whichever is chosen."""

import numpy as np

from core.data.labels import flip_labels
from pipelines.preferences import clean_pairs


def test_a_pair_has_the_tokens_of_its_responses():
    samples = [
        {"prompt_id": "p", "split": "rm_train", "prompt": [], "response": text, "token_ids": ids, "tokenizer": "abc"}
        for text, ids in (("worse", [5]), ("better", [6, 7]))
    ]
    (found,), _ = clean_pairs(samples, np.array([0.0, 1.0]), "rm_train")
    assert (found["chosen"], found["chosen_ids"], found["rejected_ids"]) == ("better", [6, 7], [5])
    assert found["tokenizer"] == "abc"
    (flipped,) = flip_labels([found], 1.0, np.random.default_rng(0))
    assert (flipped["chosen"], flipped["chosen_ids"], flipped["rejected_ids"]) == ("worse", [5], [6, 7])
