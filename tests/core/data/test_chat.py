"""Chat template, prompt ids, splits."""

import pytest

from core.config import Model, Splits
from core.data.chat import ChatTokenizer, check_prompt, conversation, response_of
from core.data.splits import prompt_id, split_of
from core.data.streams import stream_seed
from core.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(policy_path):
    return ChatTokenizer(Model(path=str(policy_path)))


CHAT = [{"role": "user", "content": "Hello, how are you?"}]


def test_no_double_bos_and_pad_is_not_eos(tokenizer):
    ids = tokenizer.prompt_ids(CHAT)
    assert ids.count(tokenizer.hf.bos_token_id) == 3  # one a turn (system, user, assistant): the template's own
    assert ids[:2] != [tokenizer.hf.bos_token_id] * 2
    assert tokenizer.pad_id not in tokenizer.stop_ids


def test_conversation_is_prompt_then_response(tokenizer):
    answered = [*CHAT, {"role": "assistant", "content": "Fine, thanks."}]
    ids = tokenizer.conversation_ids(answered)
    assert ids == tokenizer.prompt_ids(CHAT) + tokenizer.response_ids("Fine, thanks.")
    rendered = tokenizer.hf.apply_chat_template(answered, tokenize=False)
    assert tokenizer.hf.decode(ids) == rendered.rstrip()
    assert ids[-1] == tokenizer.eot_id
    with pytest.raises(DataError, match="must end with the assistant, not with 'user'"):
        tokenizer.conversation_ids(CHAT)


def test_a_response_is_put_to_its_prompt_and_taken_from_it_again():
    answered = conversation(CHAT, "Fine.")
    assert answered == [*CHAT, {"role": "assistant", "content": "Fine."}] and response_of(answered) == "Fine."
    for wrong in (CHAT, [], ["text"], [*CHAT, {"content": "x"}]):
        with pytest.raises(DataError, match="must end with the assistant"):
            response_of(wrong)
    with pytest.raises(DataError, match="needs a text"):
        response_of([*CHAT, {"role": "assistant", "content": None}])


@pytest.mark.parametrize(
    "messages, fault",
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        (["hi"], "a role and a text"),
        ([{"role": "user"}], "a role and a text"),
        ([{"content": "hi"}], "a role and a text"),
        ([{"role": "user", "content": None}], "a role and a text"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": "\ud800 <|im_end|>"}], "not valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, messages, fault):
    for ids in (tokenizer.prompt_ids, tokenizer.whole_ids):
        with pytest.raises(DataError, match=fault):
            ids(messages)


def test_what_is_no_response_is_refused(tokenizer):
    for text, fault in ((None, "must be a text, not NoneType"), ("\ud800", "not valid Unicode")):
        with pytest.raises(DataError, match=fault):
            tokenizer.response_ids(text)


def test_a_folder_without_a_tokenizer_names_what_to_set(tmp_path):
    (tmp_path / "notes.md").write_text("no model")
    with pytest.raises(DataError, match=r"from .*: set policy\.path .*\(the folder has no tokenizer's files\)"):
        ChatTokenizer(Model(path=str(tmp_path)))


def test_model_without_chat_template_is_refused(tokenizer, tmp_path):
    tokenizer.hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(Model(path=str(tmp_path)))


def test_template_that_rewrites_answers_is_refused(tokenizer, tmp_path):
    tokenizer.hf.save_pretrained(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "(message['content'] | upper)"))
    rewriting = ChatTokenizer(Model(path=str(tmp_path)))
    assert rewriting.hf.decode(rewriting.whole_ids(conversation(CHAT, "fine"))).rstrip().endswith("FINE<|im_end|>")
    for asked in (lambda: rewriting.prompt_ids(CHAT), lambda: rewriting.response_ids("Fine.")):
        with pytest.raises(DataError, match="renders a response differently"):
            asked()


@pytest.mark.parametrize(
    "messages",
    [[], "text", [{"role": "user", "content": "  "}], [{"role": "assistant", "content": "x"}], CHAT + CHAT,
     [*CHAT, {"role": "assistant", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": "half \ud83d"}]],
)  # fmt: skip
def test_bad_prompts(messages):
    with pytest.raises(DataError):
        check_prompt(messages)


def test_splits_follow_the_hash_and_the_shares():
    splits = Splits()
    names = [split_of(f"prompt {i}", splits) for i in range(20_000)]
    for name, share in splits.model_dump().items():
        assert abs(names.count(name) / len(names) - share) < 0.01
    assert split_of("prompt 3", splits) == names[3]


def test_seeds_of_named_streams_differ():
    seeds = {stream_seed(1, "a", 0), stream_seed(1, "a", 1), stream_seed(2, "a", 0), stream_seed(1, "b", 0)}
    assert len(seeds) == 4 and stream_seed(1, "a", 0) in seeds
    assert prompt_id(CHAT) != prompt_id([{"role": "system", "content": CHAT[0]["content"]}])
