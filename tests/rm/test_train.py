"""The training pairs of an arm."""

import numpy as np
import pytest
import torch

from core.config import Model, RewardTraining, RewardVariant
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError, DataError
from rm.checkpoints.folder import files
from rm.checkpoints.layout import save_reward_model
from rm.checkpoints.lora import weights_digest
from rm.measure import held_out
from rm.model import RewardModel
from rm.pairs import tokenise
from rm.reading import Reader
from rm.train import arm_rows
from tests.builders.checkpoints import CHATS
from tests.builders.reward_models import tiny_reward_model
from tests.builders.tokenizers import of_family


def test_arms_of_one_size_share_their_wrong_labels():
    rows = [
        {"prompt_id": str(i), "chosen": "a", "rejected": "b", "flipped": i == 0, "pair_id": str(i),
         "weight": 1.0, "gold_chosen": 1.0, "gold_rejected": 0.0} for i in range(200)
    ]  # fmt: skip
    arms = [RewardVariant(pairs=100, label_noise=0.25, seed=s) for s in (0, 1)]
    first, second = (arm_rows(rows, arm, 1) for arm in arms)
    assert first == second and len(first) == 100
    changed = np.array([a["chosen"] != b["chosen"] for a, b in zip(first, rows, strict=False)])
    assert changed.sum() == 25
    assert all(a["flipped"] == (b["flipped"] != c) for a, b, c in zip(first, rows, changed, strict=False))
    assert arm_rows(rows, RewardVariant(), 1) == rows
    other = arm_rows(rows, RewardVariant(pairs=100, label_noise=0.25, data_seed=1), 1)
    ids = lambda rows: {row["pair_id"] for row in rows}  # noqa: E731
    assert len(ids(other)) == 100 and 30 < len(ids(other) & ids(first)) < 70  # another draw of 100 of 200
    more = arm_rows(rows, RewardVariant(pairs=150, data_seed=1), 1)
    assert ids(other) < ids(more) and ids(arm_rows(rows, RewardVariant(data_seed=1), 1)) == ids(rows)
    with pytest.raises(Exception, match="is 300 and there are only 200 training pairs"):
        arm_rows(rows, RewardVariant(pairs=300), 1)


def test_copies_of_a_weighted_pair_keep_one_label():
    rows = [{"pair_id": str(i), "chosen": "a", "rejected": "b", "flipped": False, "gold_chosen": None,
             "gold_rejected": None, "weight": 2.0} for i in range(100)]  # fmt: skip
    found = arm_rows(rows, RewardVariant(pairs=50, label_noise=0.2), 1)
    assert len(found) == 100 and len({r["pair_id"] for r in found}) == 50
    assert len({(r["pair_id"], r["flipped"]) for r in found}) == 50 and sum(r["flipped"] for r in found) == 20


def test_the_authors_mask_reads_everything_after_the_first_turn(tokenizer_path):
    """Later user turns included, as the labels of their code for Unified-Feedback; a chat of one turn has none."""
    tokenizer = ChatTokenizer(Model(path=str(tokenizer_path)))
    turns = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Apple."},
        {"role": "user", "content": "Another."},
    ]
    rows = [{"prompt": turns[:k], "chosen": "Pear.", "rejected": "A chair.", "prompt_id": str(k)} for k in (3, 1)]
    variant = RewardVariant(text_regulariser="sft", regularise="after_first_turn")
    (several, one), _ = tokenise(rows, tokenizer, RewardTraining(), variant)
    [(start, stop)] = several.turns
    assert stop == len(several.prompt) and several.prompt[:start] == tokenizer.prompt_ids(turns[:1])
    assert "Apple." in tokenizer.decode(several.prompt[start:]) and "Another." in tokenizer.decode(
        several.prompt[start:]
    )
    assert one.turns == ()


def test_dropout_of_the_head_is_for_training_alone(tokenizer_path):
    model = tiny_reward_model(tokenizer_path, "mlp")
    model.head_dropout = 0.1
    ids = torch.arange(5, 25)[None]
    rewards = lambda: float(model(ids, torch.ones_like(ids))[0])  # noqa: E731
    assert rewards() == rewards()
    model.train()
    assert len({rewards() for _ in range(5)}) > 1
    model.head_dropout = 0.0
    assert rewards() == rewards()


def test_pairs_with_a_system_turn_on_a_template_that_has_none(tokenizer_path, tmp_path):
    marks = ["<pad>", "<start_of_turn>", "<end_of_turn>"]
    of_family(tokenizer_path, tmp_path, "gemma", marks, bos_token="<filename>", pad_token="<pad>")
    tokenizer = ChatTokenizer(Model(path=str(tmp_path)))
    question, system = {"role": "user", "content": "Hi?"}, {"role": "system", "content": "You are a pirate."}
    rows = [{"prompt": p, "chosen": "Arr.", "rejected": "No <end_of_turn>"} for p in ([system, question], [question])]
    (with_system, without), counts = tokenise(rows, tokenizer, RewardTraining(), RewardVariant())
    assert counts == {"dropped": 0, "truncated": 0, "system_moved": 1}
    assert "pirate.\n\nHi?" in tokenizer.hf.decode(with_system.prompt) and len(with_system.prompt) > len(without.prompt)
    assert without.rejected.count(tokenizer.eot_id) == 1  # the typed one is text


def test_a_long_validation_pair_does_not_cost_a_trained_model(tokenizer_path):
    """It is left out and counted; only where every pair is too long is there nothing to measure."""
    reader = Reader(ChatTokenizer(Model(path=str(tokenizer_path))))
    short, long = (
        {"prompt": [{"role": "user", "content": "Hello"}], "chosen": text, "rejected": "No."}
        for text in ("Yes.", "Yes. " * 200)
    )
    rows, tokens, too_long = held_out(reader, [long, short], positions=100)
    assert (rows, len(tokens), too_long) == ([short], 2, 1)
    assert tokens[1][1] == tuple(reader.tokenizer.response_ids("No."))
    with pytest.raises(DataError, match="all 1 validation pairs have more tokens than the 100 positions"):
        held_out(reader, [long], positions=100)


def test_a_model_that_is_saved_in_several_files_is_the_same(tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "mlp")
    head = {name: weight.detach().clone() for name, weight in model.head.state_dict().items()}
    one, several = tmp_path / "one", tmp_path / "several"
    save_reward_model(one, model, model.lm.named_parameters(), head)
    save_reward_model(several, model, model.lm.named_parameters(), head, shard_bytes=20_000)
    assert len(files(one)) == 1 and len(files(several)) > 3
    assert weights_digest(one) == weights_digest(several)
    read = [RewardModel.from_pretrained(folder, dtype="float32") for folder in (one, several)]
    assert torch.equal(read[0].score(CHATS), read[1].score(CHATS))
    files(several)[1].unlink()
    with pytest.raises(ArtefactError, match="several"):
        RewardModel.from_pretrained(several)
