"""Other people's checkpoints: written here as their code writes them, scored as their code scores, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from core.config import Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models.logits import LmHead
from core.models.logprobs import token_logprobs
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.checkpoints import CHATS, CLOSE, batch, edit, edit_json, read, tiny_config, write_full, write_lora
from tests.builders.reward_models import tiny_reward_model
from tests.builders.tokenizers import of_family


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return AutoTokenizer.from_pretrained(tokenizer_path)


@pytest.fixture
def lora(tokenizer, tmp_path) -> tuple[Path, Tensor]:
    return write_lora(tokenizer, tmp_path)


def test_the_authors_lora_scores_as_their_code_does(lora, tmp_path):
    folder, expected = lora
    model = read(folder)
    torch.testing.assert_close(model.score(CHATS), expected, **CLOSE)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert expected.std() > 0.01


@pytest.mark.parametrize("prefix", ["base_model.model.pretrained_model.", "base_model.model."])
def test_lora_names_as_peft_and_wrappers_write_them(lora, prefix):
    folder, expected = lora

    def rename(weights):
        for key in list(weights):
            weights[prefix.replace("pretrained_model.", "" if "v_head" in key else "pretrained_model.")
                    + key.replace(".default", "")] = weights.pop(key)  # fmt: skip

    edit(folder, rename)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    torch.testing.assert_close(read(folder).score(CHATS), expected, **CLOSE)


def test_a_lora_checkpoint_on_a_base_given(lora, tmp_path):
    folder, expected = lora
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ArtefactError, match="its base .*base does not exist: give its folder"):
        read(folder)
    torch.testing.assert_close(read(folder, base=tmp_path / "moved").score(CHATS), expected, **CLOSE)


def test_a_pad_token_that_the_authors_code_added(lora, tokenizer, tokenizer_path):
    """Their code gives a tokenizer without pad a new one and the base a row for it, which is in no file."""
    folder, expected = lora
    padded = AutoTokenizer.from_pretrained(tokenizer_path)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(folder)
    edit_json(folder / "config.json", vocab_size=len(padded))
    model = read(folder)
    assert model.tokenizer.pad_id == len(tokenizer)
    torch.testing.assert_close(model.score(CHATS), expected, **CLOSE)
    padded.add_tokens(["<another>"])
    padded.save_pretrained(folder)
    edit_json(folder / "config.json", vocab_size=len(padded))
    with pytest.raises(ArtefactError, match=r"is not the base of .*<another>"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("v_head.summary.2.bias"), r"mlp head: v_head\.summary\.2\.bias is missing"),
        (lambda w: w.update({"v_head.summary.4.bias": torch.zeros(1)}), r"v_head\.summary\.4\.bias is extra"),
        (lambda w: [w.pop(k) for k in list(w) if "v_head" in k], r"no reward head .*it is an adapter alone"),
        (
            lambda w: w.pop("model.layers.1.self_attn.k_proj.lora_B.default.weight"),
            r"layers\.1\.self_attn\.k_proj\.lora_B\.weight is missing",
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(32)}), r"model\.norm\.weight is extra"),
    ],
)
def test_lora_tensors_that_do_not_fit_are_named(lora, change, message):
    edit(lora[0], change)
    with pytest.raises(ArtefactError, match=message):
        read(lora[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, r"lora_A\.weight is \[4, 32\], not \[8, 32\]"),
        ({"target_modules": ["q_proj"]}, r"k_proj\.lora_A\.weight is extra"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save \['model\.embed_tokens'\]"),
    ],
)
def test_adapter_settings_that_do_not_fit_are_named(lora, settings, message):
    edit_json(lora[0] / "adapter_config.json", **settings)
    with pytest.raises(ArtefactError, match=message):
        read(lora[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64, not 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, not 2"),
        ({"vocab_size": 1000}, "vocab_size is 1000, not 2048"),
    ],
)
def test_another_base_is_refused(lora, tokenizer, tmp_path, settings, message):
    LlamaForCausalLM(tiny_config(tokenizer, **settings)).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtefactError, match=f"is not the base of .*{message}"):
        read(lora[0], base=tmp_path / "other")


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        (("mlp", 1024, 1), {}),
        (("mlp", 48, 2), {"lm_head": True}),
        (("linear", 1024, 1), {"tie_word_embeddings": True}),
    ],
)
def test_the_authors_full_checkpoint_scores_as_their_code_does(head, settings, tokenizer, tmp_path):
    theirs = write_full(tmp_path, tokenizer, *head, **settings)
    model = read(tmp_path)
    with torch.no_grad():
        expected = theirs(*batch(tokenizer))
    torch.testing.assert_close(model.score(CHATS), expected, **CLOSE)
    assert expected.std() > 0.01
    logps = lambda: token_logprobs(LmHead.of(model.lm), torch.ones(1, 32), torch.tensor([7]))  # noqa: E731
    if settings:
        assert logps()[0].isfinite().all()
    else:
        with pytest.raises(ArtefactError, match="without an LM head"):
            logps()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("v_head.summary.2.bias"), r"v_head\.summary\.2\.bias is missing"),
        (lambda w: w.update({"v_head.summary.4.bias": torch.zeros(1)}), r"v_head\.summary\.4\.bias is extra"),
        (lambda w: w.update({"v_head.scale": torch.zeros(1)}), r"v_head\.scale is extra"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), r"model\.extra is extra"),
        (lambda w: w.update({"model.norm.weight": torch.ones(31)}), r"model\.norm\.weight is \[31\], not \[32\]"),
        (lambda w: w.update({"model.embed_tokens.weight": torch.ones(99, 32)}), "embed_tokens.weight has 99 rows"),
    ],
)
def test_full_tensors_that_do_not_fit_are_named(tokenizer, tmp_path, change, message):
    write_full(tmp_path, tokenizer)
    edit(tmp_path, change)
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vhead_layer_type": "linear"}, r"linear_bias head: v_head\.summary\.bias is missing"),
        ({"vhead_num_neurons": 512}, r"summary\.0\.weight is \[1024, 32\], not \[512, 32\]"),
        ({"vhead_num_output": 2}, "vhead_num_output is 2"),
        ({"vocab_size": 1000}, "embed_tokens.weight has 2048 rows, but vocab_size in config.json is 1000"),
        ({"model_type": "deberta-v2"}, "deberta-v2, not a causal LM"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(tokenizer, tmp_path, settings, message):
    write_full(tmp_path, tokenizer)
    edit_json(tmp_path / "config.json", **settings)
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path)


def test_a_sequence_classifier_scores_as_transformers_does(tokenizer, tokenizer_path, tmp_path):
    torch.manual_seed(3)
    theirs = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    tokenizer.save_pretrained(tmp_path)
    ids, mask = batch(tokenizer)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    model = read(tmp_path)
    torch.testing.assert_close(model.score(CHATS), expected, **CLOSE)
    with pytest.raises(ArtefactError, match="cannot be put on the base"):
        read(tmp_path, base=tokenizer_path)
    # the mask says what is real, even where the last token is the pad
    with torch.no_grad():
        ids[:, -1], mask[:, -1] = tokenizer.unk_token_id, 1
        hidden = theirs.model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model(ids, mask)[0][1], theirs.score(hidden)[1, -1, 0], **CLOSE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["v_head", "value_head", "reward_head", "regression_head", "rm_head", "classifier"])
def test_a_linear_head_of_another_name(name, bias, tokenizer, tmp_path):
    torch.manual_seed(3)
    theirs = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    offset = {f"{name}.bias": torch.tensor([0.5])} if bias else {}
    edit(tmp_path, lambda w: w.update({f"{name}.weight": w.pop("score.weight"), **offset}))
    ids, mask = batch(tokenizer)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1) + 0.5 * bias
    torch.testing.assert_close(read(tmp_path).score(CHATS), expected, **CLOSE)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"value_head.weight": torch.ones(1, 32)}, r"holds the heads score and value_head: remove the one"),
        (
            {"score.0.weight": torch.ones(4, 32)},
            r"score is not a linear layer but 0\.weight \[4, 32\], weight \[1, 32\]",
        ),
    ],
)
def test_heads_that_cannot_be_told_are_refused(tokenizer, tmp_path, extra, message):
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    edit(tmp_path, lambda w: w.update(extra))
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path)


@pytest.fixture
def peft_classifier(tokenizer, tmp_path) -> tuple[Path, Tensor]:
    """A classifier as PEFT trains and saves it: no config.json, and the head next to the adapter."""
    torch.manual_seed(5)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(tmp_path / "base")
    trunk = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type=TaskType.SEQ_CLS)
    theirs = get_peft_model(trunk, settings).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name or "score.modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "peft")
    tokenizer.save_pretrained(tmp_path / "peft")
    ids, mask = batch(tokenizer)
    with torch.no_grad():
        return tmp_path / "peft", theirs(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def test_a_classifier_that_peft_has_trained(peft_classifier, tmp_path):
    folder, expected = peft_classifier
    assert not (folder / "config.json").exists() and expected.std() > 0.01
    torch.testing.assert_close(read(folder).score(CHATS), expected, **CLOSE)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ArtefactError, match="its base .*base does not exist: give its folder"):
        read(folder)
    torch.testing.assert_close(read(folder, base=tmp_path / "moved").score(CHATS), expected, **CLOSE)


def test_a_folder_without_a_configuration_says_what_it_lacks(peft_classifier):
    folder, _ = peft_classifier
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ArtefactError, match=r"peft holds LoRA tensors, but no adapter_config\.json"):
        read(folder)


def test_a_classifier_with_two_labels_is_refused(tokenizer, tmp_path):
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"linear head: score\.weight is \[2, 32\], not \[1, 32\]"):
        read(tmp_path)


def test_pickles_are_refused_with_the_way_out(tokenizer, tmp_path):
    model = write_full(tmp_path, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtefactError, match=r"pickles \(pytorch_model\.bin\).*weights_only=True"):
        read(tmp_path)


def test_what_is_no_reward_model_is_refused(tokenizer, tmp_path):
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(tmp_path / "lm")
    with pytest.raises(ArtefactError, match=r"no reward head among its tensors \(it holds lm_head, model\)"):
        read(tmp_path / "lm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="no safetensors"):
        read(tmp_path / "empty")


def test_our_own_layout_with_another_vocabulary_is_refused(tokenizer, tokenizer_path, tmp_path):
    chat = ChatTokenizer(Model(path=str(tokenizer_path)))
    model = RewardModel(LlamaForCausalLM(tiny_config(tokenizer, vocab_size=1000)), "linear", chat)
    save_reward_model(tmp_path, model, named_weights(model.lm), model.head.state_dict())
    with pytest.raises(ArtefactError, match="vocab_size is 1000, but its tokenizer has 1048 tokens beyond"):
        read(tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=len(tokenizer))
    with pytest.raises(ArtefactError, match=r"model\.embed_tokens\.weight has 1000 rows"):
        read(tmp_path)


def test_a_template_that_read_the_clock_is_named_as_the_reason(tokenizer_path, tmp_path):
    """Version 0.1 trained on the tokens of the day, which this version cannot give."""
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"]
    of_family(tokenizer_path, tmp_path / "base", "llama3_2", marks, eos_token="<|eot_id|>", pad_token="<pad>")
    model = tiny_reward_model(tmp_path / "base", "linear")
    save_reward_model(tmp_path / "rm", model, named_weights(model.lm), model.head.state_dict())
    edit_json(tmp_path / "rm" / "reward_model.json", tokenizer="that of version 0.1")
    with pytest.raises(ArtefactError, match="is not the one the model was trained with$"):
        read(tmp_path / "rm")
    about = json.loads((tmp_path / "rm" / "reward_model.json").read_text())
    (tmp_path / "rm" / "reward_model.json").write_text(json.dumps({k: about[k] for k in about if k != "attention"}))
    with pytest.raises(ArtefactError, match="version 0.1 took from the clock .* train it again"):
        read(tmp_path / "rm")
