"""The rows of `make bench`, in the order of the table."""

from __future__ import annotations

from functools import partial

from benchmarks import agreement, tasks
from benchmarks.environments import TRL_PPO
from benchmarks.runner import Row
from benchmarks.workers import Program
from core.config.load import load

SAME_TRAINING = (
    "weights, linear head, batches in their order, optimiser (AdamW, constant learning rate, clipping at 1), number "
    "type, attention kernel, threads, allocator"
)
TRAINING_DIFFERS = (
    "ours keeps float32 master weights and a float32 head, which is more work; TRL updates bfloat16 weights. Ours "
    "computes the prompt of a pair once for both responses and no padding, TRL pads two rows"
)


def rows() -> dict[str, Row]:
    """By name. Read when they are needed, since the number of ranks is in a configuration."""
    trl_reward = Program("benchmarks/peers/trl_reward.py")
    ours_reward = Program("benchmarks.ours.reward_training")
    ours_sampling, generate = Program("benchmarks.ours.sampling"), Program("benchmarks/peers/transformers_generate.py")
    sampling_same = "weights, prompts, temperature, whole vocabulary, number type, threads, allocator, end of turn"
    sampling_differs = "the random draws, so the numbers of tokens; what is compared is tokens per second"
    found = (
        Row(
            "rm-full", "Reward model training, BT, all weights, 8 pairs a step", "pairs", 3.0, ours_reward, trl_reward,
            "TRL RewardTrainer", partial(tasks.reward_training, None), agreement.training_losses, SAME_TRAINING,
            TRAINING_DIFFERS,
        ),
        Row(
            "rm-lora", "Reward model training, BT, LoRA r32 on attention, 8 pairs a step", "pairs", 3.5, ours_reward,
            trl_reward, "TRL RewardTrainer", partial(tasks.reward_training, tasks.LORA), agreement.training_losses,
            SAME_TRAINING, TRAINING_DIFFERS,
        ),
        Row(
            "rm-grm", "GRM `sft`: its step time over that of BT", "pairs", 1.03, ours_reward, ours_reward,
            "grm-rlhf BT", tasks.regulariser, agreement.finite_losses,
            "everything but the loss: MLP head, weights, batches, optimiser",
            "GRM also computes log-probs of the chosen responses", "cost", "grm-rlhf GRM sft",
        ),
        Row(
            "ppo", "PPO iteration, 64 rollouts of up to 48 tokens", "rollouts", 4.0,
            Program("benchmarks.ours.ppo", ranks=_ranks()), Program("benchmarks/peers/trl_ppo.py", TRL_PPO.python),
            "TRL 0.24 PPOTrainer", tasks.ppo, agreement.ppo_training,
            "weights, prompts, rollouts, longest response, adapters, trained parameters, epochs, minibatches and "
            "optimiser steps, gamma, lambda, KL coefficient, number type, cores, allocator",
            "ours also syncs an engine and proves each sync, clips gradients, keeps float32 master weights, trains the "
            "critic with a learning rate of its own and logs to disk; TRL samples with `generate` and keeps its logits "
            "as old log-probs",
        ),
        Row(
            "sample", "Sampling, 128 prompts x 64 tokens", "tokens", 3.0, ours_sampling, generate,
            "transformers generate", partial(tasks.sampling, 128, 1), agreement.greedy_tokens, sampling_same,
            sampling_differs,
        ),
        Row(
            "sample-n64", "Sampling 64 responses to a prompt", "tokens", 5.0, ours_sampling, generate,
            "transformers generate", partial(tasks.sampling, 1, 64), agreement.greedy_tokens, sampling_same,
            sampling_differs,
        ),
        Row(
            "score", "Scoring 64 responses to a prompt", "tokens", 4.0, Program("benchmarks.ours.scoring"),
            Program("benchmarks/peers/transformers_score.py"), "transformers, padded batches of 16", tasks.scoring,
            agreement.rewards, "weights, linear head, conversations, number type, attention kernel, threads, allocator",
            "ours computes a prompt once for its responses and no padding; theirs sorts by length and pads. Tokens are "
            "counted as if each conversation was read alone, on both sides",
        ),
        Row(
            "best-of-n", "Best-of-n for all n, 1,000 prompts x 405", "n", 500.0, Program("benchmarks.ours.best_of_n"),
            Program("benchmarks/peers/pandas_best_of_n.py"), "pandas, as the GRM authors' scripts", tasks.best_of_n,
            agreement.best_of_n, "scores", "ours is the mean over all subsets of n samples, theirs the first n samples",
        ),
    )  # fmt: skip
    return {row.name: row for row in found}


def _ranks() -> int:
    import torch

    from pipelines.launch import num_processes

    return 1 if torch.cuda.is_available() else num_processes("ppo", load([tasks.CONFIG]))
