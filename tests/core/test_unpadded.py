"""Passes that leave padding out compute what passes with padding compute, and do less."""

import pytest
import torch

from core.batching import attended, evenly, evenly_on_ranks, pack, pad_right
from core.config import Model
from core.models.architecture import layers_of, trunk_of
from core.models.layers import SKIPS_PADDING, FrozenLayers, hidden_states, skips_padding
from core.models.loading import load_causal_lm
from core.models.unpadded import Joined, Segment, _SegmentAttention
from tests.builders.policies import FAMILIES, tiny_policy

WITH_WINDOWS_OR_CAPS = ("mistral", "gemma2", "gemma3", "gemma3_text")
GROUPS = [
    ([5, 9, 13, 21], [[8, 34, 55, 89, 7], [11], [3, 1, 4]]),
    ([6, 6, 7, 8, 9, 10, 11], [[40, 41]]),
    ([2], [[30, 31, 32], [33]]),
]


def set_skipping(lm, skips: bool) -> None:
    setattr(trunk_of(lm), SKIPS_PADDING, skips)


@pytest.fixture(scope="module")
def lm_of(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")

    def load(family: str):
        if not (folder / family).is_dir():
            tiny_policy(family, tokenizer_path, folder / family)
        return load_causal_lm(Model(path=str(folder / family)), dtype="float32")

    return load


def assert_gradients(found: dict, expected: dict) -> None:
    """Equal to a hundred-thousandth of the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        limit = 1e-5 * max(float(expected[name].abs().max()), 1e-2)
        torch.testing.assert_close(gradient, expected[name], atol=limit, rtol=1e-3)


def states_and_gradients(lm, batch, frozen=None):
    lm.zero_grad()
    where = batch.input_ids, batch.attention_mask
    mask, known = where[1], frozen(*where, batch.positions) if frozen else None
    states = hidden_states(lm, *where, positions=batch.positions, frozen=known)
    weights = torch.linspace(-1, 1, states[mask > 0].numel()).view_as(states[mask > 0])
    (states[mask > 0] * weights).sum().backward()
    return states[mask > 0].detach(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_with_padding(family, lm_of):
    lm = lm_of(family)
    assert skips_padding(lm) == (family not in WITH_WINDOWS_OR_CAPS)
    if not skips_padding(lm):
        return
    for groups in (GROUPS, [(prompt, responses[:1]) for prompt, responses in GROUPS]):
        batch = pack(groups, 0)
        found, gradients = states_and_gradients(lm, batch)
        set_skipping(lm, False)
        expected, with_padding = states_and_gradients(lm, batch)
        set_skipping(lm, True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert_gradients(gradients, with_padding)


def test_left_padding_is_left_out_too(lm_of):
    lm = lm_of("llama")
    rows = [prompt for prompt, _ in GROUPS]
    ids, mask = pad_right(rows, 0)
    left = torch.stack([row.roll(ids.shape[1] - len(r)) for row, r in zip(ids, rows, strict=True)])
    with torch.no_grad():
        found, expected = hidden_states(lm, left, mask.flip(1)), hidden_states(lm, ids, mask)
    torch.testing.assert_close(found[mask.flip(1) > 0], expected[mask > 0])


def test_frozen_layers_continue_without_padding(lm_of):
    lm, batch = lm_of("llama"), pack(GROUPS, 0)
    layers = FrozenLayers(lm, 1)
    found, gradients = states_and_gradients(lm, batch, layers)
    whole, _ = states_and_gradients(lm, batch)
    set_skipping(lm, False)
    expected, with_padding = states_and_gradients(lm, batch, layers)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert_gradients(gradients, with_padding)


def test_layers_see_real_tokens_only(lm_of):
    """And as before where gradient checkpointing would run a layer again after the pass."""
    lm, batch, seen = lm_of("llama"), pack(GROUPS, 0), []
    hook = layers_of(lm)[0].mlp.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:-1])))
    hidden_states(lm, batch.input_ids, batch.attention_mask, positions=batch.positions)
    lm.train().gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, gradients = states_and_gradients(lm, batch)
    lm.gradient_checkpointing_disable()
    hook.remove()
    assert seen[:2] == [(1, sum(batch.lengths)), tuple(batch.input_ids.shape)]
    states, without = states_and_gradients(lm, batch)
    torch.testing.assert_close(checkpointed, states, atol=1e-5, rtol=1e-4)
    assert_gradients(gradients, without)


def test_gradients_of_the_attention_are_those_of_finite_differences():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, 9, 3, dtype=torch.float64, generator=draw).requires_grad_() for h in (4, 2, 2))
    segments = [Segment(0, 3, (0, 0)), Segment(3, 5, (0, 3)), Segment(5, 6, (0, 3)), Segment(6, 9, (6, 6))]
    attend = lambda q, k, v: _SegmentAttention.apply(q, k, v, 0.3, segments)  # noqa: E731
    # The shares are float32, so that differences are taken over a step that they can resolve.
    assert torch.autograd.gradcheck(attend, (q, k, v), eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=1e-6)


def test_segments_attend_what_the_dense_mask_says():
    batch = pack(GROUPS, 0)
    joined = Joined.of(batch.attention_mask)
    dense = attended(batch.attention_mask)[:, 0]
    length, real = batch.input_ids.shape[1], joined.real.tolist()
    for segment in joined.segments:
        for t in range(segment.start, segment.stop):
            seen = {real[s] for s in [*range(*segment.prompt), *range(segment.start, t + 1)]}
            row, column = divmod(real[t], length)
            assert seen == {row * length + c for c in dense[row, column].nonzero().flatten().tolist()}
    assert [s for segment in joined.segments for s in range(segment.start, segment.stop)] == list(range(len(real)))


def test_groups_of_equally_many_tokens():
    lengths = [90, 10, 10, 30, 40, 20]
    parts = evenly(lengths, 2)
    assert sorted(i for part in parts for i in part) == list(range(6))
    assert sorted(sum(lengths[i] for i in part) for part in parts) == [100, 100]
    assert sorted(map(len, evenly([7, 1, 1], 3))) == [1, 1, 1]
    with pytest.raises(ValueError, match="cannot fill 3"):
        evenly([1, 2], 3)
    assert len(evenly_on_ranks(lengths, 70, 1)) == 3 and len(evenly_on_ranks(lengths, 70, 2)) == 4
    assert evenly_on_ranks([5], 70, 2) == [[0], [0]] and evenly_on_ranks([], 70, 2) == []
