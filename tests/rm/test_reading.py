"""Reward models are read where their makers read them, and on the tokens that were sampled; tiny models in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from core.config import Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError, DataError
from rm.model import RewardModel
from rm.reading import Reader, text_reading
from rm.serving.client import RemoteRewardModel
from rm.serving.server import Ensemble
from rm.tools.export import export
from tests.builders.checkpoints import CHATS, CLOSE, batch, edit_json, read, tiny_config, write_full
from tests.builders.reward_models import tiny_reward_model
from tests.builders.reward_server import serving
from tests.builders.tokenizers import chatml, gemma, rewardbench

TWO_TURNS = [*CHATS[0], {"role": "user", "content": "Another one."}, {"role": "assistant", "content": "A pear."}]
CONVERSATIONS = [*CHATS, TWO_TURNS]


@pytest.fixture(scope="module", params=[chatml, gemma], ids=["chatml", "gemma"])
def template_path(request, tokenizer_path, tmp_path_factory) -> Path:
    return request.param(tokenizer_path, tmp_path_factory.mktemp("template") / "tokenizer")


def classifier(tokenizer_path: Path, folder: Path) -> Path:
    """A classifier as transformers' trainers leave it."""
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_gives_what_rewardbench_and_transformers_give(template_path, tmp_path):
    folder = classifier(template_path, tmp_path)
    model, expected = read(folder), rewardbench(folder, CONVERSATIONS)
    assert model.reads == "whole"
    torch.testing.assert_close(model.score(CONVERSATIONS), expected, **CLOSE)
    before = read(folder, reads="end_of_turn").score(CONVERSATIONS)
    assert (before - expected).abs().max() > 0.05  # the position matters
    theirs, tokenizer = LlamaForSequenceClassification.from_pretrained(folder).eval(), model.tokenizer.hf
    for chat, reward in zip(CONVERSATIONS, read(folder, reads="whole_template").score(CONVERSATIONS), strict=True):
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(reward, theirs(ids).logits[0, 0], **CLOSE)


def test_the_authors_model_gives_what_their_code_gives(template_path, tmp_path):
    """Their code adds the tokenizer's BOS to the rendering, which has one already."""
    tokenizer = AutoTokenizer.from_pretrained(template_path)
    theirs, model = write_full(tmp_path, tokenizer), read(tmp_path)
    assert model.reads == "whole_as_text"
    ids, mask = batch(tokenizer)
    doubled = (ids[:, :2] == tokenizer.bos_token_id).all(1)
    assert doubled.all() if "<bos>" in tokenizer.get_vocab() else not doubled.any()
    with torch.no_grad():
        torch.testing.assert_close(model.score(CHATS), theirs(ids, mask), **CLOSE)


@pytest.mark.parametrize(("head", "form"), [("linear", "classifier"), ("mlp", "remote_code")])
def test_our_exports_give_our_rewards_in_rewardbench(head, form, template_path, tmp_path):
    """On the whole rendering as it is, with the special tokens that a tokenizer adds."""
    model = tiny_reward_model(template_path, head)
    assert export(model, tmp_path / "out") == form
    expected = model.score(CONVERSATIONS)
    torch.testing.assert_close(rewardbench(tmp_path / "out", CONVERSATIONS), expected, **CLOSE)
    back = read(tmp_path / "out")
    assert back.reads == "end_of_turn" and torch.equal(back.score(CONVERSATIONS), expected)
    prompt = {"conversation": TWO_TURNS[:-1], "add_generation_prompt": True, "tokenize": False}
    assert back.tokenizer.hf.apply_chat_template(**prompt) == model.tokenizer.hf.apply_chat_template(**prompt)


def test_an_export_by_version_0_1_is_read_as_it_was_written(tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "linear")
    export(model, tmp_path / "out")
    model.tokenizer.hf.save_pretrained(tmp_path / "out")  # its template went on after the end of turn
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["reward_reads"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert torch.equal(read(tmp_path / "out").score(CHATS), model.score(CHATS))


@pytest.mark.parametrize("form", ["classifier", "remote_code"])
def test_a_model_of_others_stays_theirs_when_it_is_exported(form, template_path, tmp_path):
    folder = classifier(template_path, tmp_path / "theirs")
    export(read(folder), tmp_path / "out", form)
    assert read(tmp_path / "out").reads == "whole"
    torch.testing.assert_close(read(tmp_path / "out").score(CHATS), read(folder).score(CHATS), **CLOSE)
    torch.testing.assert_close(rewardbench(tmp_path / "out", CHATS), rewardbench(folder, CHATS), **CLOSE)


def test_our_own_layout_records_what_is_read(tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "mlp")
    model.reads = "whole_template"
    export(model, tmp_path / "out", "merged")
    assert json.loads((tmp_path / "out" / "reward_model.json").read_text())["reads"] == "whole_template"
    back = read(tmp_path / "out")
    assert back.reads == "whole_template" and torch.equal(back.score(CHATS), model.score(CHATS))
    edit_json(tmp_path / "out" / "reward_model.json", reads="end_of_turn")
    assert not torch.equal(read(tmp_path / "out").score(CHATS), model.score(CHATS))


def test_a_served_model_of_others_gives_its_makers_rewards(template_path, tmp_path):
    folder = classifier(template_path, tmp_path)
    model, expected = read(folder), rewardbench(folder, CONVERSATIONS)
    rows = sampled_rows(model.tokenizer)
    with serving(Ensemble(["theirs"], [model])) as url:
        remote = RemoteRewardModel(url)
        assert remote.about["reads"] == "whole"
        torch.testing.assert_close(remote.score(CONVERSATIONS), expected, **CLOSE)
        torch.testing.assert_close(remote.score_rows(rows), model.score_rows(rows), **CLOSE)
    other = read(folder, reads="whole_template")
    model.std = other.std = 2.0
    with pytest.raises(ArtefactError, match="b reads whole_template, but a whole: serve them apart"):
        Ensemble(["a", "b"], [model, other])


def sampled_rows(tokenizer: ChatTokenizer) -> list[dict]:
    """Responses as a policy samples them: finished, cut off, with a special token, split unlike their text."""
    encode = lambda text: tokenizer.hf(text, add_special_tokens=False).input_ids  # noqa: E731
    special, end = tokenizer.hf.convert_tokens_to_ids("<|im_start|>"), tokenizer.eot_id
    unusual = [i for letter in "Often" for i in encode(letter)]
    assert unusual != encode("Often")
    sampled = [
        [*encode("An apple."), end],
        encode("An apple"),
        [*encode("Yes."), special, *encode("user\nGo on"), end],
        [*unusual, end],
    ]
    prompt, fingerprint = CHATS[0][:1], tokenizer.fingerprint
    return [
        {"prompt": prompt, "response": tokenizer.decode(ids), "token_ids": ids, "tokenizer": fingerprint}
        for ids in sampled
    ]


def test_sampled_responses_are_read_as_they_were_sampled(template_path):
    model = tiny_reward_model(template_path, "mlp")
    rows = sampled_rows(model.tokenizer)
    prompt = model.tokenizer.prompt_ids(CHATS[0][:1])
    assert [model.reader.row(row) for row in rows] == [(tuple(prompt), tuple(row["token_ids"])) for row in rows]
    rewards = model.score_rows(rows)
    for row, reward in zip(rows, rewards, strict=True):
        ids = torch.tensor([prompt + row["token_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(model(ids, torch.ones_like(ids))[0][0], reward, **CLOSE)
    texts = model.score([[*CHATS[0][:1], {"role": "assistant", "content": row["response"]}] for row in rows])
    torch.testing.assert_close(texts[0], rewards[0], **CLOSE)
    assert ((texts - rewards)[1:].abs() > 1e-3).all()  # their texts do not show what was sampled
    elsewhere = [{**row, "tokenizer": "another"} for row in rows]
    torch.testing.assert_close(model.score_rows(elsewhere), texts, **CLOSE)


def test_a_model_of_others_reads_what_its_template_writes_after_a_sampled_end_of_turn(template_path):
    tokenizer = ChatTokenizer(Model(path=str(template_path)))
    reader, newline = Reader(tokenizer, "whole_template"), tokenizer.rendered_ids("\n")
    rows = sampled_rows(tokenizer)
    assert sum(reader.row(rows[0]), ()) == tuple(
        tokenizer.whole_ids([*CHATS[0][:1], {"role": "assistant", "content": "An apple."}])
    )
    for row, end in zip(rows, (newline, [], newline, newline), strict=True):
        assert reader.row(row)[1] == (*row["token_ids"], *end)


def test_what_a_text_does_not_show_is_counted(template_path):
    tokenizer = ChatTokenizer(Model(path=str(template_path)))
    rows = sampled_rows(tokenizer)
    assert text_reading(tokenizer, rows) == {"responses": 4, "special_tokens": 1, "retokenised": 1, "cut_off": 1}
    assert text_reading(tokenizer, [{"prompt": [], "response": "imported"}])["responses"] == 0


def test_conversations_longer_than_the_model_are_refused_by_row(tokenizer_path):
    model = tiny_reward_model(tokenizer_path, "mlp", max_position_embeddings=70)
    assert model.score(CHATS[:1]).isfinite().all()
    long = [*CHATS[0][:1], {"role": "assistant", "content": "no " * 70}]
    with pytest.raises(DataError, match=r"conversation 1 has \d+ tokens, but the reward model has 70 positions"):
        model.score([CHATS[0], long])


def test_members_of_an_average_read_alike(tokenizer_path, tmp_path):
    from rm.tools.merge import merge

    model = tiny_reward_model(tokenizer_path, "mlp")
    export(model, tmp_path / "a", "merged")
    export(RewardModel.from_pretrained(tmp_path / "a", reads="whole"), tmp_path / "b", "merged")
    with pytest.raises(ArtefactError, match="reads whole, not end_of_turn"):
        merge([tmp_path / "a", tmp_path / "b"], [0.5, 0.5])
