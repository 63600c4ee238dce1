"""Pairs as the tokens that the policy made, and pairs that are longer than a reward model reads."""

import pytest

from core.config import Model, RewardTraining, RewardVariant
from core.data.chat import ChatTokenizer
from core.data.labels import repeated
from rm.pairs import tokenise

PROMPT = [{"role": "user", "content": "Name a fruit."}]
SYSTEM = {"role": "system", "content": "You are a pirate."}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return ChatTokenizer(Model(path=str(tokenizer_path)))


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def row(prompt, chosen="Yes, I do.", rejected="No."):
    return {"prompt_id": "p", "prompt": prompt, "chosen": chosen, "rejected": rejected}


def tokenised(tokenizer, rows, overlong, max_tokens, regularise="every_turn"):
    rm = RewardTraining(overlong=overlong, max_tokens=max_tokens)
    return tokenise(rows, tokenizer, rm, RewardVariant(regularise=regularise))


@pytest.mark.parametrize("head", [[SYSTEM], []], ids=["system turn", "the template's own"])
def test_whole_turns_are_cut_and_the_system_turn_stays(tokenizer, head):
    prompt = [*head, *turns("A first question", "A first answer", "A second question", "Its answer", "The last one?")]
    (whole,), _ = tokenised(tokenizer, [row(prompt)], "truncate", 512)
    shorter = {cut: tokenizer.prompt_ids([*head, *prompt[len(head) + cut :]]) for cut in (2, 4)}
    for max_tokens, cut in ((whole.length - 1, 2), (len(shorter[2]) + len(whole.chosen) - 1, 4)):
        (pair,), counts = tokenised(tokenizer, [row(prompt)], "truncate", max_tokens)
        assert pair.prompt == shorter[cut]
        system, _, _ = tokenizer.hf.decode(whole.prompt).partition("<|im_start|>user")
        assert "You are" in system and tokenizer.hf.decode(pair.prompt).startswith(system + "<|im_start|>user")
        assert (pair.chosen, pair.rejected) == (whole.chosen, whole.rejected)
        assert counts == {"dropped": 0, "truncated": 1, "system_moved": 0}
        assert [pair.prompt[a:b] for a, b in pair.turns] == [whole.prompt[a:b] for a, b in whole.turns][cut // 2 :]
    alone = len(shorter[4]) + len(whole.chosen) - 1
    assert tokenised(tokenizer, [row(prompt)], "truncate", alone) == (
        [],
        {"dropped": 1, "truncated": 0, "system_moved": 0},
    )


def test_the_right_end_is_cut_as_the_grm_authors_do(tokenizer):
    """`encode_plus(..., truncation=True, max_length=n)` of the whole conversation keeps its first n tokens."""
    long = row(turns("Why?"), "Because it is so, and was so before, and will be so again.", "No. I do not know why.")
    (whole,), _ = tokenised(tokenizer, [long], "truncate_right", 512)
    limit = whole.length - 5
    (pair,), counts = tokenised(tokenizer, [long], "truncate_right", limit)
    for cut, full in ((pair.chosen, whole.chosen), (pair.rejected, whole.rejected)):
        assert pair.prompt + cut == (whole.prompt + full)[:limit]
    assert counts == {"dropped": 0, "truncated": 1, "system_moved": 0}
    same = row(turns("Why?"), "The same words at the start, then this.", "The same words at the start, then that.")
    for rows, limit in (([same], len(whole.prompt) + 4), ([long], len(whole.prompt))):
        assert tokenised(tokenizer, rows, "truncate_right", limit) == (
            [],
            {"dropped": 1, "truncated": 0, "system_moved": 0},
        )


def test_overlong_pairs_are_dropped_by_default(tokenizer):
    rows = [row(turns("Hi")), row(turns("Hi " * 60))]
    pairs, counts = tokenised(tokenizer, rows, RewardTraining().overlong, 60)
    assert len(pairs) == 1 and counts == {"dropped": 1, "truncated": 0, "system_moved": 0}


def pair(**ids) -> dict:
    return {
        "prompt_id": "p", "pair_id": "q", "split": "rm_train", "source": "policy", "prompt": PROMPT,
        "chosen": "An apple.", "rejected": "A pe", "flipped": False, "margin": None, "weight": 1.0,
        "gold_chosen": 1.0, "gold_rejected": 0.0, **ids,
    }  # fmt: skip


def test_sampled_responses_keep_their_tokens_in_training(tokenizer):
    whole = tokenizer.response_ids("An apple.")
    single = [i for letter in "An apple." for i in tokenizer.rendered_ids(letter)] + [tokenizer.eot_id]
    cut_off = tokenizer.rendered_ids("A pe")
    assert single != whole
    ids = {"chosen_ids": single, "rejected_ids": cut_off, "tokenizer": tokenizer.fingerprint}
    rows = [pair(**ids), pair(**{**ids, "tokenizer": "another"}), pair()]
    sampled, other, imported = tokenise(repeated(rows), tokenizer, RewardTraining(), RewardVariant())[0]
    assert (sampled.chosen, sampled.rejected) == (single, cut_off)
    for made_of_text in (other, imported):
        assert (made_of_text.chosen, made_of_text.rejected) == (whole, [*cut_off, tokenizer.eot_id])
    assert sampled.prompt == tokenizer.prompt_ids(PROMPT)
