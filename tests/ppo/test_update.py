"""Three PPO steps of two minibatches: plain PyTorch, one rank, two ranks, ZeRO 0 to 3, one micro-batch or many."""

import json

import pytest
import torch

from tests.builders.ppo_problem import PPO, STEPS, minibatch_of, models, order, rollouts
from tests.builders.processes import run_program
from tests.builders.tiny_lm import OPTIM

pytestmark = pytest.mark.slow
LAYOUTS = {
    1: ("3x8", "3x2", "2x2+compile"),
    2: ("3x4", "3x1", "2x2", "1x4", "0x4", "3x2+offload", "2x4+offload", "3x4+gradient_checkpointing"),
}
CASES = [(ranks, layout) for ranks, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = {}
    for ranks, layouts in LAYOUTS.items():
        out = tmp_path_factory.mktemp("update") / "out.json"
        run_program("tests/programs/ppo_update.py", out, *layouts, ranks=ranks)
        found |= {(ranks, layout): run for layout, run in json.loads(out.read_text()).items()}
    return found


def row_outputs(policy, critic, row):
    """Log-probs, entropies and values of one response, run alone and without a mask; in normalised units."""
    ids = torch.tensor([row["ids"]])
    start = row["prompt"]
    logits = policy.lm(ids).logits[0, start - 1 : -1] / policy.temperature
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, ids[0, start:, None]).squeeze(-1)
    hidden = critic.lm.model(ids).last_hidden_state[0, start - 1 : -1]
    return chosen, -(logp.exp() * logp).sum(-1), (critic.head(hidden).squeeze(-1) - critic.mean) / critic.std


def advantages_of(row, old, values) -> torch.Tensor:
    """The double sum of GAE, over rewards written out."""
    rewards = [0.1 * float(s) for s in row["ref_shift"]]  # -coef * (logp - ref), and ref = logp + shift
    rewards[-1] += (row["proxy"] - 0.5) / 2.0
    v = [*values.tolist(), 0.0]
    n = len(rewards)
    deltas = [rewards[t] + v[t + 1] - v[t] for t in range(n)]
    return torch.tensor([sum(PPO.lam ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)])


@pytest.fixture(scope="module")
def plain():
    """Row by row, the losses of the papers, one backward pass for a minibatch."""
    policy, critic = models()
    options = {"lr": OPTIM.lr, "betas": OPTIM.betas, "eps": OPTIM.eps, "weight_decay": OPTIM.weight_decay}
    optimizers = [torch.optim.AdamW(m.parameters(), **options) for m in (policy, critic)]
    for step in range(1, STEPS + 1):
        rows = rollouts(step)
        with torch.no_grad():
            before = [row_outputs(policy, critic, r) for r in rows]
        advantages = [advantages_of(r, b[0], b[2]) for r, b in zip(rows, before, strict=True)]
        flat = torch.cat(advantages)
        white = [(a - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt() for a in advantages]
        every = list(zip(rows, before, advantages, white, strict=True))
        for number in (n for epoch in range(PPO.epochs) for n in order(step, epoch)):
            policy_terms, value_terms = [], []
            for row, (old, _, old_v), adv, w in (of for i, of in enumerate(every) if minibatch_of(i) == number):
                logp, entropy, values = row_outputs(policy, critic, row)
                ratio = (logp - old).exp()
                gain = torch.minimum(ratio * w, ratio.clamp(0.8, 1.2) * w) * row["weight"]
                policy_terms.append(-gain - PPO.entropy_coef * entropy)
                near = torch.clamp(values, old_v - 0.2, old_v + 0.2)
                target = adv + old_v
                value_terms.append(0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2))
            for model, optimizer, terms in zip((policy, critic), optimizers, (policy_terms, value_terms), strict=True):
                optimizer.zero_grad()
                torch.cat(terms).mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
                optimizer.step()
    return {f"{n}.{k}": w.detach() for n, m in (("actor", policy), ("critic", critic)) for k, w in m.named_parameters()}


@pytest.mark.parametrize(("ranks", "layout"), CASES)
def test_weights_after_three_steps_are_those_of_plain_pytorch(runs, plain, ranks, layout):
    found = runs[ranks, layout]["weights"]
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(torch.tensor(found[name]), weight, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("ranks", "layout"), CASES[1:])
def test_losses_do_not_depend_on_the_layout(runs, ranks, layout):
    for found, expected in zip(runs[ranks, layout]["metrics"], runs[1, "3x8"]["metrics"], strict=True):
        for key in ("policy_loss", "value_loss", "reward_mean", "actor_grad_norm", "critic_grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def test_it_moved_and_clipped(runs, plain):
    """Equality would be easy if nothing happened."""
    policy, _ = models()
    moved = max(float((plain[f"actor.{k}"] - w).detach().abs().max()) for k, w in policy.named_parameters())
    assert moved > 1e-2
    assert any(m["clipfrac"] > 0 for m in runs[1, "3x8"]["metrics"])


def test_layers_were_compiled_where_asked_alone(runs):
    """Torch runs a layer as it is, without a word, where it gives up compiling it."""
    assert runs[1, "3x2"]["graphs"] == 0 < runs[1, "2x2+compile"]["graphs"]
