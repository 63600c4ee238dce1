"""The templates of the families that people use (TRL ships them), and the options for them."""

import json

import pytest
from pydantic import ValidationError

from core.config import Model
from core.data import templates
from core.data.chat import ChatTokenizer, conversation
from core.data.tokenizer_files import save_tokenizer
from core.errors import DataError
from tests.builders.tokenizers import LLAMA_2, of_family, spaces_as_text

CHAT = [{"role": "user", "content": "Hello, how are you?"}]
PIRATE = [{"role": "system", "content": "You are a pirate."}, *CHAT]
MARKS = {
    "qwen3": [],
    "gptoss": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
    "glm4moe": ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"],
    "deepseek_r1_distill": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "llama3_2": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}  # fmt: skip
EOS = {"qwen3": "<|im_end|>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>", "llama3_2": "<|eot_id|>"}


@pytest.fixture
def family(tokenizer_path, tmp_path):
    """(template by name or text, options of Model) -> its tokenizer."""

    def make(template: str, *, special=(), eos="<|endoftext|>", **options) -> ChatTokenizer:
        marks = MARKS.get(template, [])
        names = {"eos_token": EOS.get(template, eos), "bos_token": "<file_sep>"}
        folder = of_family(tokenizer_path, tmp_path / "model", template, ["<pad>", *marks, *special], **names)
        return ChatTokenizer(Model(path=str(folder), **options))

    return make


@pytest.mark.parametrize(
    "template, options, header, end",
    [
        ("phi3", {}, "<|assistant|>\n", "<|end|>"),
        ("gemma", {}, "<start_of_turn>model\n", "<end_of_turn>"),
        ("qwen3", {"template_kwargs": {"enable_thinking": False}}, "assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
        ("qwen3", {"generation_prompt": "answer"}, "assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
        ("qwen3", {"generation_prompt": "template"}, "<|im_start|>assistant\n", "<|im_end|>"),
        ("qwen3", {"chat_template": "llama3"}, "assistant<|end_header_id|>\n\n", None),
        ("gptoss", {"generation_prompt": "answer"}, "<|start|>assistant<|channel|>final<|message|>", "<|return|>"),
        ("gptoss", {"generation_prompt": "template"}, "<|start|>assistant", "<|return|>"),
        ("glm4moe", {"generation_prompt": "answer"}, "<|assistant|>\n<think></think>\n", "<|endoftext|>"),
        ("deepseek_r1_distill", {"generation_prompt": "answer"}, "you?<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        ("deepseek_r1_distill", {"generation_prompt": "template"}, "<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜>"),
    ],
)
def test_what_a_response_begins_after_and_ends_with(family, tmp_path, template, options, header, end):
    tokenizer = family(template, **options)
    if end is None:  # llama3's end of turn is none of Qwen's tokens
        with pytest.raises(DataError, match=r"end of turn '<\|eot_id\|>' does not begin with a token of its own"):
            tokenizer.response_ids("Fine.")
        return
    prompt, ids = tokenizer.prompt_ids(CHAT), tokenizer.response_ids("Fine.")
    assert tokenizer.hf.decode(prompt).endswith(header)
    assert tokenizer.hf.decode(ids) == "Fine." + end and ids[-1] == tokenizer.eot_id
    if options.get("generation_prompt") != "template":
        whole = tokenizer.whole_ids(conversation(CHAT, "Fine."))
        assert tokenizer.hf.decode(whole).startswith(tokenizer.hf.decode(prompt + ids[:-1]))
    assert_saved_alike(tokenizer, tmp_path / "saved")


def assert_saved_alike(tokenizer: ChatTokenizer, folder) -> None:
    """Saved and loaded without options it has the same tokens, by transformers alone too."""
    save_tokenizer(folder, tokenizer)
    again = ChatTokenizer(Model(path=str(folder)))
    assert again.prompt_ids(CHAT) == tokenizer.prompt_ids(CHAT) and again.fingerprint == tokenizer.fingerprint
    by_itself = again.hf.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert by_itself == tokenizer.prompt_ids(CHAT)


@pytest.mark.parametrize("template", ["qwen3", "gptoss", "glm4moe", "deepseek_r1_distill"])
def test_where_a_model_may_think_first_the_user_decides(family, template):
    tokenizer = family(template)
    for asked in (lambda: tokenizer.prompt_ids(CHAT), lambda: tokenizer.response_ids("Fine.")):
        with pytest.raises(DataError, match="Set generation_prompt of policy and rm.base to answer"):
            asked()
    assert tokenizer.hf.decode(tokenizer.whole_ids(conversation(CHAT, "Fine."))).count("Fine.") == 1


@pytest.mark.parametrize("source", ["spaces_as_text", "byte_level"])
def test_llama_2_has_no_generation_prompt_and_needs_none(tokenizer_path, tmp_path, source):
    if source == "byte_level":
        folder = of_family(
            tokenizer_path, tmp_path, LLAMA_2, ["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>"
        )
    else:
        folder = spaces_as_text(tmp_path, "bpe")
    tokenizer = ChatTokenizer(Model(path=str(folder)))
    ids = tokenizer.conversation_ids(conversation(CHAT, "Yes, a cat."))
    whole = tokenizer.whole_ids(conversation(CHAT, "Yes, a cat."))
    assert ids[-1] == tokenizer.hf.eos_token_id == whole[-1] and ids[:-1] == whole[: len(ids) - 1]
    assert ids.count(tokenizer.hf.bos_token_id) == 1  # the template's


def test_a_header_of_answers_that_cannot_be_had_is_refused(family):
    """Where a prompt ends differently without an answer, its end is not known to belong to the answer's header."""
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    template += (
        "{% if messages[-1].role == 'user' %}<repo_name>{% if add_generation_prompt %}<filename>{% endif %}{% endif %}"
    )
    with pytest.raises(DataError, match="generation_prompt: answer is not possible"):
        family(template, generation_prompt="answer")
    with pytest.raises(DataError, match="ends a prompt with '<repo_name><filename>'"):
        family(template).prompt_ids(CHAT)


def test_a_header_that_only_answers_have_is_the_generation_prompt(family, tmp_path):
    """Early ChatML templates ignore `add_generation_prompt`: the policy would go on with the user's turn."""
    chatml = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = family(chatml)
    assert tokenizer.hf.decode(tokenizer.prompt_ids(CHAT)).endswith("<|im_start|>assistant\n")
    assert tokenizer.whole_ids(conversation(CHAT, "Yes"))[:-1] == tokenizer.conversation_ids(conversation(CHAT, "Yes"))
    assert_saved_alike(tokenizer, tmp_path / "saved")


@pytest.mark.parametrize("template", ["llama3_2", "gptoss"])
def test_the_date_is_fixed_and_saved(family, tmp_path, monkeypatch, template):
    """Llama 3.2 and gpt-oss write today's date: the same chat would have another reward tomorrow."""
    from transformers.utils import chat_template_utils

    class Tomorrow(chat_template_utils.datetime):
        @classmethod
        def now(cls):
            return cls(2031, 5, 9)

    options = {"generation_prompt": "answer"}
    tokenizer = family(template, **options)
    today, fingerprint = tokenizer.prompt_ids(CHAT), tokenizer.fingerprint
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    other_day = family(template, **options)
    assert other_day.prompt_ids(CHAT) == today and other_day.fingerprint == fingerprint
    assert {"llama3_2": "26 Jul 2024", "gptoss": "2024-07-26"}[template] in tokenizer.hf.decode(today)
    assert_saved_alike(other_day, tmp_path / "saved")
    dated = family(template, chat_date="2025-01-02", **options)
    assert {"llama3_2": "02 Jan 2025", "gptoss": "2025-01-02"}[template] in dated.hf.decode(dated.prompt_ids(CHAT))
    assert dated.fingerprint != fingerprint
    save_tokenizer(tmp_path / "dated", dated)
    for day, expected in ((None, dated.prompt_ids(CHAT)), ("2024-07-26", today)):  # a saved date can be replaced
        assert ChatTokenizer(Model(path=str(tmp_path / "dated"), chat_date=day)).prompt_ids(CHAT) == expected
    with pytest.raises(ValidationError, match="chat_date"):
        Model(chat_date="2024-13-26")


def test_without_options_and_date_the_template_and_the_fingerprint_are_untouched(policy_path):
    """Finished models stay loadable: this is the fingerprint that version 0.1 gave the shipped policy."""
    tokenizer = ChatTokenizer(Model(path=str(policy_path)))
    assert tokenizer.hf.chat_template == (policy_path / "chat_template.jinja").read_text(encoding="utf-8")
    assert tokenizer.fingerprint == "51b070033fc18183"


def test_variables_are_written_into_the_template_and_replace_earlier_ones():
    base = "  {{ a }}{{ b }}\n{% if c is defined %}{{ c.d }}{% endif %}\n"
    once = templates.with_variables(base, {"a": 'é"\n\\', "c": {"d": [1, 2.5, None]}})
    assert once.endswith(base) and templates.with_variables(once, {"a": 'é"\n\\'}).count("set a") == 1
    from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

    assert compiled(once).render(b=2) == '  é"\n\\2\n[1, 2.5, None]'
    assert compiled(templates.with_variables(once, {"a": True})).render(b=2).startswith("  True2")
    with pytest.raises(DataError, match="'a-b' cannot be a variable"):
        templates.with_variables(base, {"a-b": 1})
    for name in ("messages", "add_generation_prompt", "tools"):
        with pytest.raises(DataError, match=f"'{name}' is what a chat template is given"):
            templates.with_variables(base, {"a": 1, name: []})


def test_templates_by_name_and_by_file(family, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(
        "{{ messages[0].content }}<|im_start|>{% if messages[1] %}{{ messages[1].content }}<|im_end|>{% endif %}"
    )
    tokenizer = family("gemma", chat_template=str(file))
    assert tokenizer.hf.decode(tokenizer.prompt_ids(CHAT)) == "Hello, how are you?<|im_start|>"
    assert templates.named_template("qwen3_training").startswith("{#- Training variant of the Qwen3 chat template")
    fault = "is neither a file nor one of TRL's templates"
    with pytest.raises(DataError, match=rf"'qwen3_trainig' {fault}; the nearest of TRL's is qwen3_training"):
        templates.named_template("qwen3_trainig")
    with pytest.raises(DataError, match=rf"'my_template' {fault}; TRL's are .*qwen3_training"):
        templates.named_template("my_template")
    with pytest.raises(DataError, match=f"'' {fault}"):
        family("gemma", chat_template="")


DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", ["gemma", DROPS_SYSTEM, LLAMA_2])
def test_a_system_turn_where_the_template_has_none(family, template):
    """Gemma's template refuses it; others leave it out without a word, which is worse."""
    tokenizer = family(template)
    moved = [{"role": "user", "content": "You are a pirate.\n\nHello, how are you?"}]
    assert tokenizer.moves_system(PIRATE) and not tokenizer.moves_system(CHAT)
    assert tokenizer.prompt_ids(PIRATE) == tokenizer.prompt_ids(moved) != tokenizer.prompt_ids(CHAT)
    answered = conversation(PIRATE, "Arr.")
    assert tokenizer.whole_ids(answered) == tokenizer.whole_ids(conversation(moved, "Arr."))
    with pytest.raises(DataError, match="has no system turn, and system_turn is refuse"):
        family(template, system_turn="refuse").prompt_ids(PIRATE)


def test_a_system_turn_that_the_template_renders_stays(family, tmp_path):
    tokenizer = family("phi3")
    assert not tokenizer.moves_system(PIRATE)
    assert "<|system|>\nYou are a pirate.<|end|>" in tokenizer.hf.decode(tokenizer.prompt_ids(PIRATE))
    first = family("phi3", system_turn="first_user")
    assert first.moves_system(PIRATE) and first.fingerprint != tokenizer.fingerprint
    save_tokenizer(tmp_path / "saved", first)
    again = ChatTokenizer(Model(path=str(tmp_path / "saved")))
    assert again.prompt_ids(PIRATE) == first.prompt_ids(PIRATE) and again.fingerprint == first.fingerprint


def test_what_a_template_refuses_is_an_error_of_the_row(family):
    with pytest.raises(DataError, match="refuses the conversation: Conversation roles must alternate"):
        family("gemma").prompt_ids([*CHAT, *CHAT])


@pytest.mark.parametrize(
    "special, expected",
    [
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", "<|image_pad|>"], "<|finetune_right_pad_id|>"),
        (["<|image_pad|>", "<|reserved_special_token_0|>"], "<|reserved_special_token_0|>"),
        (["<|image_pad|>"], "<|image_pad|>"),
        (["<unk>"], "<unk>"),
        ([], None),
    ],
)  # fmt: skip
def test_a_missing_pad_token(tokenizer_path, tmp_path, special, expected):
    names = {"eos_token": "<|im_end|>"} | ({"unk_token": "<unk>"} if special == ["<unk>"] else {})
    folder = of_family(tokenizer_path, tmp_path, "qwen2_5", special, **names)
    tokenizer = ChatTokenizer(Model(path=str(folder)))
    if expected:
        assert tokenizer.hf.convert_ids_to_tokens(tokenizer.pad_id) == expected == tokenizer.hf.pad_token
    else:
        with pytest.raises(DataError, match=r"name one of its special tokens in policy\.pad_token"):
            _ = tokenizer.pad_id
    named = ChatTokenizer(Model(path=str(folder), pad_token="<repo_name>"))
    assert named.hf.convert_ids_to_tokens(named.pad_id) == "<repo_name>"
    for wrong, fault in (("<|im_end|>", "ends turns"), ("Hello", "is none of its special tokens"),
                         ("<|im_start|>", "is written in every prompt")):  # fmt: skip
        with pytest.raises(DataError, match=fault):
            ChatTokenizer(Model(path=str(folder), pad_token=wrong))


def test_an_end_of_turn_whose_id_is_zero_ends_responses(tokenizer_path, tmp_path):
    """`filter(None, ids)` would drop it."""
    folder = of_family(
        tokenizer_path, tmp_path, "qwen2_5", ["<pad>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer = ChatTokenizer(Model(path=str(folder)))
    assert tokenizer.hf.eos_token_id == 0 and tokenizer.stop_ids == [0, tokenizer.eot_id]
    assert tokenizer.pad_id != 0
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert ChatTokenizer(Model(path=str(folder))).stop_ids == [0, tokenizer.eot_id]
