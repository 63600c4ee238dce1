"""What a saved model's tokenizer and generation settings hold, for transformers 5 and 4."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

from core.config import Model
from core.data.chat import ChatTokenizer
from core.data.tokenizer_files import save_tokenizer
from core.models.loading import save_lm
from tests.builders.processes import run_program
from tests.builders.tokenizers import of_family

CHAT = [{"role": "user", "content": "Hello, how are you?"}]
MANY_ENDS = [2, *range(100, 1200)]


def settings(folder: Path, name: str = "tokenizer_config.json") -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_transformers_4_knows_everything_in_the_files(tokenizer_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, extra_special_tokens=["<repo_name>", "<filename>"])
    tokenizer.save_pretrained(tmp_path / "base")
    written = settings(tmp_path / "base")  # by transformers 5
    assert written["tokenizer_class"] == "TokenizersBackend" and isinstance(written["extra_special_tokens"], list)
    save_tokenizer(tmp_path / "saved", ChatTokenizer(Model(path=str(tmp_path / "base"))))
    written = settings(tmp_path / "saved")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<repo_name>", "<filename>"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & written.keys()
    template = (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8")
    assert written["chat_template"] == template and set(written["model_input_names"]) == {"input_ids", "attention_mask"}
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again(["Hi <filename>"]).input_ids == tokenizer(["Hi <filename>"]).input_ids
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_real_tokenizer_class_keeps_its_name(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(["<|endoftext|>", *"abcdU?Q:"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    GPT2Tokenizer.from_pretrained(
        tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    ).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "saved", ChatTokenizer(Model(path=str(tmp_path / "base"))))
    assert settings(tmp_path / "saved")["tokenizer_class"] == settings(tmp_path / "base")["tokenizer_class"]
    assert settings(tmp_path / "saved")["tokenizer_class"].startswith("GPT2Tokenizer")


@pytest.fixture
def policy_with_two_ends(tokenizer_path, tmp_path) -> Path:
    """A random policy whose base ends responses with <|im_end|> (2), <|endoftext|> of its own, and samples warmly."""
    of_family(
        tokenizer_path, tmp_path / "base", "qwen2_5", ["<end>"], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    base = {"eos_token_id": [2048, 2], "temperature": 0.7, "do_sample": True, "bos_token_id": 1}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(base))
    config = LlamaConfig(
        vocab_size=2049, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    lm = LlamaForCausalLM(config)
    save_lm(tmp_path / "saved", config, lm.named_parameters(), ChatTokenizer(Model(path=str(tmp_path / "base"))))
    return tmp_path / "saved"


def test_every_end_token_of_the_base_is_kept_and_ends_responses(policy_with_two_ends):
    """A base with two end tokens stops after one token where its saved policy ran to the limit."""
    kept = settings(policy_with_two_ends, "generation_config.json")
    assert kept == {
        "eos_token_id": [2048, 2], "pad_token_id": 0, "temperature": 0.7, "do_sample": True, "bos_token_id": 1
    }  # fmt: skip
    assert ChatTokenizer(Model(path=str(policy_with_two_ends))).stop_ids == [2, 2048]
    lm = AutoModelForCausalLM.from_pretrained(policy_with_two_ends)
    for end in (2, 2048):
        with torch.no_grad():
            lm.lm_head.weight.zero_()
            lm.model.embed_tokens.weight.fill_(1.0)
            lm.lm_head.weight[end] = 100.0
        assert lm.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False).tolist() == [[5, 6, end]]


def test_a_base_without_generation_settings_gets_the_end_of_its_turns(tokenizer_path, tmp_path):
    of_family(tokenizer_path, tmp_path / "base", "phi3", ["<|end|>"], eos_token="<|endoftext|>", pad_token="<filename>")
    save_tokenizer(tmp_path / "saved", ChatTokenizer(Model(path=str(tmp_path / "base"))))
    kept = settings(tmp_path / "saved", "generation_config.json")
    assert kept == {"eos_token_id": [0, 2048], "pad_token_id": 6}


@pytest.mark.slow
def test_vllm_stops_at_every_end_token_of_the_base(small_policy, tmp_path):
    """With a thousand frequent tokens as ends, in place of the usual two, no response gets past one of them."""
    for file in small_policy.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": MANY_ENDS}))
    found = json.loads(run_program("tests/programs/stop_tokens.py", tmp_path).splitlines()[-1])
    ends = set(MANY_ENDS)
    assert sum(c["finished"] for c in found) > len(found) / 2
    for completion in found:
        *before, last = completion["token_ids"]
        assert completion["finished"] == (last in ends) and not ends & set(before)
