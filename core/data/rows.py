"""The rows of the tables that pass between stages: which columns a table has, and what they mean.

`write_table` and `read_table` of `core.files` check tables against them. A column that may be absent is `NotRequired`.
"""

# No `from __future__ import annotations` here: with it, TypedDict does not see NotRequired (Python 3.11).
from typing import NotRequired, TypedDict

from core.data.chat import Message


class PromptRow(TypedDict):
    """`prompts/prompts.parquet`: a prompt and its split."""

    prompt_id: str
    """16 hex digits of the roles and contents of its messages (`core.data.splits.prompt_id`)."""
    prompt: list[Message]
    """Its last message is the user's."""
    num_tokens: int
    """In tokens of the policy, with the header of the response."""
    split: str
    """rm_train, rm_val, rl_train, calibration or eval."""
    order: float
    """In [0, 1), a hash of the id and the run's seed: the table is sorted by it."""
    metadata: NotRequired[str]
    """JSON of the columns of `data.metadata`, where there are any: their types may differ from row to row."""


class DemonstrationRow(TypedDict):
    """`sft/demonstrations.parquet`: a prompt and the answer that the policy is fine-tuned on."""

    prompt_id: str
    split: str
    """train or val."""
    source: str
    prompt: list[Message]
    response: str
    n_tokens: int
    """Of prompt and response, in tokens of the policy."""


class PairRow(TypedDict):
    """`preferences/pairs.parquet`: two responses to one prompt, labelled."""

    prompt_id: str
    pair_id: str
    """16 hex digits of the prompt and both responses, whichever is chosen."""
    split: str
    """rm_train or rm_val."""
    source: str
    """policy for sampled pairs, else the data set."""
    prompt: list[Message]
    chosen: str
    """The response that the label prefers; the worse one where the label is flipped."""
    rejected: str
    flipped: bool
    """Whether label noise has swapped chosen and rejected."""
    margin: float | None
    """Rating of the better response minus that of the worse, in units of the source; None without ratings."""
    weight: float
    """How often the pair is seen in an epoch of training."""
    gold_chosen: float | None
    """Gold of the chosen response; None for imported pairs."""
    gold_rejected: float | None
    chosen_ids: NotRequired[list[int] | None]
    """The chosen response as it was sampled (`SampleRow.token_ids`); None for imported pairs."""
    rejected_ids: NotRequired[list[int] | None]
    tokenizer: NotRequired[str | None]
    """Fingerprint of the tokenizer that these ids are of."""


class SampleRow(TypedDict):
    """`samples.parquet` of a pool: one response of the policy to a prompt."""

    prompt_id: str
    sample_id: int
    """From 0, within the prompt."""
    split: str
    prompt: list[Message]
    response: str
    token_ids: list[int]
    """Of the response as it was sampled, with its end of turn where it is finished."""
    n_tokens: int
    finished: bool
    """Whether the response ended by itself; False if it was cut off at `generation.max_new_tokens`."""
    logp_sampler: float
    """Log-probability of the response under the sampler, at the sampling temperature, in nats."""
    tokenizer: NotRequired[str]
    """Fingerprint of the tokenizer that `token_ids` are of (`ChatTokenizer.fingerprint`)."""


class ResponseRow(TypedDict):
    """What scoring reads of a row; own rewards read its last two columns."""

    prompt: list[Message]
    response: str
    token_ids: NotRequired[list[int] | None]
    """As in `SampleRow`: reward models with this tokenizer read them, all others the text."""
    tokenizer: NotRequired[str | None]
    """As in `SampleRow`."""
    prompt_id: NotRequired[str]
    metadata: NotRequired[str]
    """As in `PromptRow`."""


class CalibrationRow(TypedDict):
    """`preferences/calibration.parquet`: samples of the reference that rewards are standardised by; without gold."""

    prompt_id: str
    sample_id: int
    prompt: list[Message]
    response: str
    token_ids: NotRequired[list[int]]
    """As in `SampleRow`."""
    tokenizer: NotRequired[str | None]
    """As in `SampleRow`."""


class ScoreRow(TypedDict):
    """`scores/NAME.parquet`: what the reward model NAME, or gold, gives a sample."""

    prompt_id: str
    sample_id: int
    text_sha: NotRequired[str]
    """16 hex digits of the response, so that scores of other samples do not join."""
    score: float
    """In the units of the reward model."""


class HeldOutRow(TypedDict):
    """`rm/NAME/val.parquet`: the rewards that a reward model gives a pair that it was not trained on."""

    prompt_id: str
    pair_id: str
    reward_chosen: float
    reward_rejected: float
    flipped: bool
    """As in `PairRow`."""


class RolloutRow(TypedDict):
    """`ppo/rollouts/step-*.parquet`: a response that PPO trained on in a step, with what it knew of it."""

    step: int
    policy: int
    """The step whose weights sampled it, or its first token with `ppo.partial_rollouts`; 0 is the reference."""
    prompt_id: str
    prompt: list[Message]
    response: str
    token_ids: list[int]
    """As in `SampleRow`. Lists of log-probs below have a number for each of these tokens, in nats."""
    n_tokens: int
    finished: bool
    """As in `SampleRow`."""
    sampler_logprobs: list[float]
    """By vLLM."""
    logprobs: list[float]
    """By the actor before the step's updates."""
    ref_logprobs: list[float]
    """By the reference."""
    proxy: float
    """Raw reward of what is optimised."""
    reward: float
    """The same after scale, shape, clip and penalties, without the KL penalty."""
    advantage_mean: float
    """Over the tokens of the response, as the policy loss used them."""
    advantage_min: float
    advantage_max: float
    reward_model: NotRequired[float]
    """With own rewards, the parts of `proxy` before their weights: the reward models', in standard deviations."""
    reward_function: NotRequired[float]
    """As in `EvaluationRow`."""
    reward_url: NotRequired[float]
    """As in `EvaluationRow`."""


class EvaluationRow(TypedDict):
    """`eval/rl_eval.parquet`: a response of one checkpoint of PPO, with its rewards and its KL from the reference."""

    run: str
    step: int
    """PPO steps of the checkpoint; 0 is the reference."""
    prompt_id: str
    sample_id: int
    prompt: list[Message]
    response: str
    n_tokens: int
    finished: bool
    """As in `SampleRow`."""
    logp_sampler: float
    """As in `SampleRow`."""
    logp: float
    """Log-probability of the response under the checkpoint, at the sampling temperature, in nats."""
    kl_k1: float
    """Estimate of the KL from the reference in nats per response: log-ratio of the sampled tokens."""
    kl_k3: float
    """The same by the estimator that is never negative."""
    kl_rb: float
    """The same, summed over the exact KL of each next-token distribution."""
    proxy: float
    """Raw reward of the reward models that PPO optimised, without own rewards."""
    gold: float
    """Gold of the response."""
    reward_function: NotRequired[float]
    """Of `ppo.reward.function`, where it is set, without its weight."""
    reward_url: NotRequired[float]
    """Of `ppo.reward.url`, where it is set, without its weight."""
