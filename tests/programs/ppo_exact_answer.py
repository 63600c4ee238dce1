"""PPO on one rank with a reward of the user's own alone: exact answers to sums, by a tiny policy that knows digits.

It is evaluated on other sums every four steps, gold included. After step 9 it is resumed from the state of step 6, and
what steps 7 to 9 gave before and after is written down.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from core import config
from core.data.chat import ChatTokenizer
from core.data.splits import prompt_id
from core.files import read_rows, write_table
from core.training import distributed
from examples.exact_answer import is_right
from ppo.train import Trainer
from rm.gold import load_gold
from tests.builders.policies import tiny_policy

SUMS = {
    "rl_train": [(1, 1), (2, 1), (3, 1), (2, 3), (4, 2), (3, 4), (5, 3), (6, 3)],
    "rm_val": [(1, 2), (2, 2), (4, 1), (5, 1), (4, 4), (7, 1)],
}
STEPS, EVERY, SAVED, LOST = 16, 4, 6, 9


def question(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a} plus {b}?"}]


def make_inputs(folder: Path) -> None:
    """The stage `prompts`, with the answers as metadata. No reward model: its weight is 0."""
    rows = [
        {"prompt_id": prompt_id(question(a, b)), "prompt": question(a, b), "num_tokens": 9, "split": split,
         "order": (a + b) / 100, "metadata": json.dumps({"answer": a + b})}
        for split, sums in SUMS.items() for a, b in sums
    ]  # fmt: skip
    (folder / "prompts").mkdir()
    write_table(folder / "prompts" / "prompts.parquet", rows)


def teach(folder: Path, tokenizer: ChatTokenizer) -> None:
    """Train the policy in `folder` on answers of one digit, three in ten of them right. What it learns is that answers
    are digits, and hardly which."""
    lm, rng = AutoModelForCausalLM.from_pretrained(folder), random.Random(1)
    optimizer = torch.optim.Adam(lm.parameters(), lr=2e-3)
    every = [of for sums in SUMS.values() for of in sums]
    for _ in range(250):
        drawn = [rng.choice(every) for _ in range(64)]
        answers = [a + b if rng.random() < 0.3 else rng.randrange(10) for a, b in drawn]
        prompts = torch.tensor([tokenizer.prompt_ids(question(*of)) for of in drawn])  # all are equally long
        responses = torch.tensor([tokenizer.response_ids(str(answer)) for answer in answers])
        logits = lm(torch.cat([prompts, responses], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), responses.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lm.save_pretrained(folder)


def remember_samples(trainer: Trainer) -> list:
    """The (prompts, completions) of each call of vLLM from now on."""
    calls, generate = [], trainer.generator.generate

    def recorded(prompts, **options):
        found = generate(prompts, **options)
        calls.append((prompts, [c for (c, *_) in found]))
        return found

    trainer.generator.generate = recorded
    return calls


@torch.no_grad()
def measured(cfg: config.Config, policy: Path, prompts: list, completions: list) -> dict[str, Any]:
    """An evaluation by plain transformers, row by row."""
    now, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, cfg.policy.path))
    gold, kls, golds, right = load_gold(cfg.gold), [], [], []
    for ids, c, (a, b) in zip(prompts, completions, SUMS["rm_val"], strict=True):
        whole, answer = torch.tensor([ids + c.token_ids]), torch.tensor(c.token_ids)[:, None]
        logps = [
            lm(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1).gather(-1, answer).sum() for lm in (now, before)
        ]
        kls.append(float(logps[0] - logps[1]))
        golds.append(float(gold.score([[*question(a, b), {"role": "assistant", "content": c.text}]])[0]))
        right.append(float(is_right(c.text, a + b)))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "kl_nats_per_response": mean(kls), "gold_mean_not_used_for_training": mean(golds), "proxy_mean": mean(right),
        "response_tokens": mean([len(c.token_ids) for c in completions]),
        "eos_rate": mean([c.finished for c in completions]),
    }  # fmt: skip


def left(out: Path) -> dict[str, list[dict]]:
    """What of the steps that will be lost is written down, without what depends on the clock."""
    metrics = [{k: v for k, v in row.items() if "second" not in k} for row in read_rows(out / "metrics.jsonl")]
    held_out = read_rows(out / "held_out.jsonl")
    return {"metrics": metrics[SAVED:LOST], "held_out": [row for row in held_out if SAVED < row["step"] <= LOST]}


def main(tokenizer: str, folder: str) -> None:
    where = Path(folder)
    distributed.init_distributed()
    make_inputs(where)
    policy = config.Model(path=str(tiny_policy("llama", Path(tokenizer), where / "policy")), attention="eager")
    teach(where / "policy", ChatTokenizer(policy))
    cfg = config.Config(
        policy=policy, data=config.Data(max_prompt_tokens=64, metadata=("answer",)),
        engine=config.Engine(dtype="float32", zero_stage=1),
        generation=config.Generation(max_new_tokens=4, vllm=config.Vllm(max_model_len=128, dtype="float32")),
        ppo=config.Ppo(
            reward=config.Reward(function="examples.exact_answer:reward", model_weight=0.0, normalise="none"),
            estimator="rloo", samples_per_prompt=16, rollouts=128, micro_batch=32, minibatches=2, steps=STEPS,
            lora=None, kl=config.Kl(coef=0.0), actor=config.Optim(lr=1e-3, schedule="constant", warmup=0.0, eps=1e-5),
            eval_every=EVERY, watch_gold=True, save_every=SAVED, checkpoint_every=EVERY,
        ),
    )  # fmt: skip
    trainer = Trainer(cfg, {name: where / name for name in ("prompts", "rm")}, where / "ppo")
    found: dict[str, Any] = {}
    for step in range(trainer.resume(), LOST + 1):
        trainer.step(step)
    found["before"] = left(where / "ppo")
    found["again"] = trainer.resume()
    calls = remember_samples(trainer)
    for step in range(found["again"], STEPS + 1):
        trainer.step(step)
        if step == LOST:
            found["after"] = left(where / "ppo")
    found["measured"] = measured(cfg, where / "ppo" / "checkpoints" / f"step-{STEPS:04d}", *calls[-1])
    trainer.log.close()
    (where / "found.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
