"""A reward for exact answers: 1 where the last number of a response is the right one, else 0.

    ppo:
      reward: {function: "examples.exact_answer:reward"}
    data:
      metadata: [answer]

configs/exact-answer.yaml uses it, and docs/own-reward.md explains it.
"""

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reward(prompts: list[list[dict]], responses: list[str], metadata: list[dict]) -> list[float]:
    """One number for each response; all three lists are equally long.

    Args:
        prompts: messages with `role` and `content`.
        responses: texts without control tokens.
        metadata: the columns of `data.metadata` of each prompt; here `answer`.
    """
    return [
        float(is_right(response, about["answer"])) for response, about in zip(responses, metadata, strict=True)
    ]  # a response without a number is wrong


def is_right(response: str, answer: float | str) -> bool:
    numbers = NUMBER.findall(response.replace(",", ""))  # 1,000 is one number
    return bool(numbers) and float(numbers[-1]) == float(answer)
