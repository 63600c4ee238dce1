"""The probe notices a skipped sync, also where the sampler's weights are coarser than the actor's."""

import json

import pytest
import torch

from core import config
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.generation.local import Completion
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training.weights import named_weights
from ppo.guard import MAX_MISMATCH
from ppo.policy import PolicyModule
from ppo.probe import SyncProbe
from ppo.records import make_micros
from tests.builders.processes import run_program

pytestmark = pytest.mark.slow

PROMPTS = ["Name three fruits.", "Why is the sky blue?", "Write a short greeting.", "What is two plus two?"]
ANSWERS = ["Apples, pears and plums.", "Air scatters blue light more than red.", "Good morning to you all!", "Four."]


class Plain:
    """What the probe needs of an engine."""

    continues = 0

    def __init__(self, module):
        self.module = module

    def __call__(self, *args, **options):
        return self.module(*args, **options)


class Rounded:
    """A sampler whose weights are bfloat16: the real model, computed in float32."""

    def __init__(self, model: config.Model, layers: int):
        self.lm = load_causal_lm(model, dtype="float32", num_layers=layers).eval()

    def sync(self, named) -> None:
        for name, weight in named:
            if name != "lm_head.weight":
                self.lm.get_parameter(name).data = weight.bfloat16().float()

    @torch.no_grad()
    def logprobs_of(self, sequences):
        found = []
        for ids in map(torch.tensor, sequences):
            logps = self.lm(ids[None]).logits[0, :-1].log_softmax(-1)
            found.append(logps.gather(-1, ids[1:, None]).squeeze(-1).tolist())
        return found


def steps(model: config.Model, lr: float, count: int, layers: int = 4, dtype: str = "float32"):
    """`count` steps of two updates each: yields the probe, before any sync, and a function that syncs."""
    tokenizer = ChatTokenizer(model)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in PROMPTS]
    completions = [Completion(ids, [0.0] * len(ids), "", True) for ids in map(tokenizer.response_ids, ANSWERS)]
    torch.manual_seed(0)
    lm = add_lora(load_causal_lm(model, dtype=dtype, num_layers=layers), config.Lora(rank=8, top_layers=2))
    actor, sampler = Plain(PolicyModule(lm, 0.8)), Rounded(model, layers)
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=lr)
    probe = SyncProbe(actor, sampler, dtype=torch.bfloat16)
    for _ in range(count):
        probe.sampled(make_micros(prompts, completions, range(4), tokenizer.pad_id, 1), current=True)
        probe.before()
        m = probe._micro
        for _ in range(2):
            optimizer.zero_grad()
            (-actor(m.input_ids, m.attention_mask, m.is_response)[0].sum() / m.is_response.sum()).backward()
            optimizer.step()
        weights = list(named_weights(lm, watch=probe.watch))
        yield probe, lambda weights=weights: sampler.sync(weights)


@pytest.mark.parametrize(("lr", "least"), [(1e-5, 0.0), (1e-3, 0.8)])
def test_rounded_weights_are_not_taken_for_weights_that_did_not_arrive(policy_path, lr, least):
    """From updates that bfloat16 weights lose almost entirely to updates that they keep."""
    for step, (probe, sync) in enumerate(steps(config.Model(path=str(policy_path)), lr, 2)):
        with pytest.raises(DataError, match="the new weights did not arrive"):
            probe.after(step)
        sync()
        found = probe.after(step)
        # The share of the change that survives in the weights bounds the share that arrives in the log-probs.
        assert least <= found["sync_survival"] <= found["sync_slope"] + 0.05 < 1.15


def test_rounding_of_the_actor_is_not_taken_for_weights_that_did_not_arrive(policy_path):
    """In bfloat16 a small update moves the actor's log-probs by less than their rounding, so the slope falls to 0."""
    model = config.Model(path=str(policy_path))
    for probe, sync in steps(model, 1e-5, 1, dtype="bfloat16"):
        sync()
        probe._kept = probe._exact = 1.0  # as if all of the update survived, which makes the check strictest
        probe.after(1)
    for probe, _ in steps(model, 1e-3, 1, dtype="bfloat16"):
        with pytest.raises(DataError, match="the new weights did not arrive"):
            probe.after(1)


def test_at_temperature_1_the_log_probs_of_the_rollout_are_the_readings_before_the_updates(policy_path):
    """Nothing is run before the updates then, and what is found is the same."""
    model = config.Model(path=str(policy_path))
    tokenizer = ChatTokenizer(model)
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": q}]) for q in PROMPTS]
    answers = list(map(tokenizer.response_ids, ANSWERS))
    torch.manual_seed(0)
    lm = add_lora(load_causal_lm(model, dtype="float32", num_layers=4), config.Lora(rank=8, top_layers=2))
    actor, sampler = Plain(PolicyModule(lm, 1.0)), Rounded(model, 4)
    sampled = sampler.logprobs_of([p + a for p, a in zip(prompts, answers, strict=True)])
    done = [Completion(a, row[-len(a) :], "", True) for a, row in zip(answers, sampled, strict=True)]
    (m,) = micros = make_micros(prompts, done, range(4), tokenizer.pad_id, 1)
    with torch.no_grad():
        m.logprobs = actor(m.input_ids, m.attention_mask, m.is_response)[0]
    given, asked = (SyncProbe(actor, sampler, dtype=torch.bfloat16) for _ in range(2))
    asked._at_one = False  # as at any other temperature
    calls, ask = [], sampler.logprobs_of
    sampler.logprobs_of = lambda rows: calls.append(len(rows)) or ask(rows)
    for probe, readings in ((given, []), (asked, [4])):
        probe.sampled(micros, current=True)
        probe.before()
        assert calls == readings
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-3)
    (-actor(m.input_ids, m.attention_mask, m.is_response)[0].sum() / m.is_response.sum()).backward()
    optimizer.step()
    sampler.sync(named_weights(lm, watch=given.watch))
    asked._exact, asked._kept = given._exact, given._kept
    assert given.after(1) == pytest.approx(asked.after(1), rel=1e-3)
    given.sampled(micros, current=False)  # with ppo.overlap: by weights that the sampler no longer has
    assert calls == [4] * 4


def test_a_skipped_sync_of_vllm_is_caught_and_a_real_one_passes(small_policy):
    for found in json.loads(run_program("tests/programs/probe.py", small_policy).splitlines()[-1]):
        assert "the new weights did not arrive" in found["skipped"]
        assert found["moved"] < MAX_MISMATCH  # so small that a bound on the difference would not notice it
        assert found["synced"]["sync_slope"] < 1.15
        if config.NATIVE_DTYPE == "float32":  # nothing is rounded
            assert found["synced"]["sync_slope"] == pytest.approx(1, abs=1e-3)
