"""Exported reward models score as they did before, loaded by transformers alone, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from core.errors import ArtefactError
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from rm.tools.export import export
from rm.tools.exported_tokenizer import ending_with
from tests.builders.checkpoints import CHATS, CLOSE, batch, read, tiny_config, write_full, write_lora
from tests.builders.command_line import grm
from tests.builders.reward_models import tiny_reward_model

STRANGER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, chats = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
load = lambda dtype: AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
model = load(torch.float32).eval()
texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
found = {}
with torch.no_grad():
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        found[side] = model(**inputs).logits.tolist()
        found[side + " without mask"] = model(inputs["input_ids"]).logits.tolist()
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
rows = classify(texts, batch_size=3, function_to_apply="none", padding=True)
found["pipeline"] = [[row["score"]] for row in rows]
half = load(torch.bfloat16)
types = {str(p.dtype) for n, p in half.named_parameters() if "v_head" in n}, str(half.model.dtype)
assert types == ({"torch.float32"}, "torch.bfloat16"), types
assert half(**inputs).logits.dtype == torch.float32
ours = [name for name in sys.modules if name.split(".")[0] in ("rm", "pipelines", "bon", "ppo")]
assert not ours, ours
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return AutoTokenizer.from_pretrained(tokenizer_path)


def saved(model: RewardModel, folder: Path) -> Path:
    save_reward_model(folder, model, named_weights(model.lm), model.head.state_dict(), variant={"alpha": 0.01})
    return folder


def command(*arguments: object) -> int:
    return grm("rm-export", *arguments, "--dtype", "float32")


@torch.no_grad()
def logits(model, tokenizer, side: str) -> torch.Tensor:
    ids, mask = batch(tokenizer)
    if side == "left":
        ids = torch.stack([row.roll(len(row) - int(m.sum())) for row, m in zip(ids, mask, strict=True)])
        mask = mask.flip(1)
    return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_linear_head_becomes_a_sequence_classifier(tied, tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "linear", tie_word_embeddings=tied)
    assert command(saved(model, tmp_path / "rm"), tmp_path / "out") == 0
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == theirs.config.architectures[0] == "LlamaForSequenceClassification"
    config = theirs.config
    assert (config.num_labels, config.reward_mean, config.reward_std) == (1, 0.25, 2.0)
    assert config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id
    assert config.pad_token_id not in model.tokenizer.stop_ids
    for side in ("right", "left"):
        found = logits(theirs.eval(), AutoTokenizer.from_pretrained(tmp_path / "out"), side)
        torch.testing.assert_close(found.squeeze(-1), model.score(CHATS), **CLOSE)
    back = read(tmp_path / "out")
    assert torch.equal(back.score(CHATS), model.score(CHATS)) and (back.mean, back.std) == (0.25, 2.0)


@pytest.mark.parametrize("head", ["mlp", "mlp:48x2", "linear", "linear_bias"])
def test_any_head_is_exported_with_its_own_modelling_file(head, tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, head)
    form = "remote_code" if head == "linear" else "auto"
    assert command(saved(model, tmp_path / "rm"), tmp_path / "out", "--form", form) == 0
    back = read(tmp_path / "out")
    assert torch.equal(back.score(CHATS), model.score(CHATS)) and (back.mean, back.std) == (0.25, 2.0)


def test_an_mlp_head_leaves_other_classifiers_as_they_are(tokenizer, tokenizer_path, tmp_path):
    """transformers registers remote code for the class of its configuration, for the whole process."""
    export(tiny_reward_model(tokenizer_path, "mlp"), tmp_path / "mlp")
    stock = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
    stock.save_pretrained(tmp_path / "stock")
    load = AutoModelForSequenceClassification.from_pretrained
    ours = load(tmp_path / "mlp", trust_remote_code=True)
    assert type(ours).__name__ == "GrmForSequenceClassification" and type(ours.config).__name__ == "GrmConfig"
    assert type(ours.config) is not LlamaConfig and isinstance(ours.config, LlamaConfig)
    assert type(load(tmp_path / "stock", trust_remote_code=True)) is LlamaForSequenceClassification
    # as transformers 4 registers it, whether or not the configuration has a class of the library
    AutoModelForSequenceClassification.register(type(ours.config), type(ours), exist_ok=True)
    assert type(load(tmp_path / "stock", trust_remote_code=True)) is LlamaForSequenceClassification


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mlp", "linear_bias"])
def test_a_process_without_this_project_loads_the_export(head, tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, head)
    assert command(saved(model, tmp_path / "rm"), tmp_path / "out") == 0
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, tmp_path / "out", json.dumps(CHATS)],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"right", "left", "right without mask", "left without mask", "pipeline"}
    for how, values in found.items():
        torch.testing.assert_close(
            torch.tensor(values), model.score(CHATS)[:, None], **CLOSE, msg=lambda text, how=how: f"{how}: {text}"
        )


def test_a_lora_checkpoint_merged_and_as_remote_code(tokenizer, tmp_path):
    folder, expected = write_lora(tokenizer, tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    for form in ("merged", "remote_code"):
        assert command(folder, tmp_path / form, "--form", form, "--base", tmp_path / "moved") == 0
        torch.testing.assert_close(read(tmp_path / form).score(CHATS), expected, **CLOSE)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_merged_is_our_own_layout(tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "mlp")
    assert command(saved(model, tmp_path / "rm"), tmp_path / "out", "--form", "merged") == 0
    assert torch.equal(read(tmp_path / "out").score(CHATS), model.score(CHATS))
    about = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert about == json.loads((tmp_path / "rm" / "reward_model.json").read_text())


@pytest.mark.parametrize("form", ["classifier", "remote_code"])
def test_rotary_settings_are_under_old_names_too(form, tokenizer_path, tmp_path):
    """transformers 4 knows no `rope_parameters`: it would score with another rotary base."""
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
    model = tiny_reward_model(tokenizer_path, "linear", rope_parameters=rope)
    export(model, tmp_path / "out", form)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5e4, "float32")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert read(tmp_path / "out").lm.config.rope_parameters == rope
    assert torch.equal(read(tmp_path / "out").score(CHATS), model.score(CHATS))


def test_types_of_the_weights(tokenizer_path, tmp_path):
    model = tiny_reward_model(tokenizer_path, "linear")
    model.lm.to(torch.bfloat16)
    for form, head in (("classifier", "score.weight"), ("remote_code", "v_head.summary.weight")):
        export(model, tmp_path / form, form)
        weights = load_file(tmp_path / form / "model.safetensors")
        other = {t.dtype for key, t in weights.items() if not key.startswith(("score.", "v_head."))}
        assert other == {torch.bfloat16}
        assert weights[head].dtype == (torch.bfloat16 if form == "classifier" else torch.float32)


def test_what_cannot_be_exported_is_refused(tokenizer, tokenizer_path, tmp_path, capsys):
    model = tiny_reward_model(tokenizer_path, "mlp")
    source = saved(model, tmp_path / "rm")
    assert command(source, tmp_path / "out", "--form", "classifier") == 2
    assert "use --form remote_code" in capsys.readouterr().err
    assert command(source, source) == 2
    assert "exists: give a new folder" in capsys.readouterr().err
    assert command(tmp_path / "nothing", tmp_path / "out") == 2
    assert "run `grm rm` first" in capsys.readouterr().err
    write_full(tmp_path / "full", tokenizer)
    assert command(tmp_path / "full", tmp_path / "out", "--form", "merged") == 2
    assert "no LM head" in capsys.readouterr().err
    model.head_kind = "of_another_kind"
    with pytest.raises(ArtefactError, match="cannot read a of_another_kind head"):
        export(model, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


NASTY = """
{%- macro turn(m) -%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>{% endmacro -%}
{% set messages = messages[0:] %}
{%- for m in messages %}{{ turn(m) }}{{ '\\n' if not loop.last else ' \\n' }}{% endfor %}
  {%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}
"""


def test_only_what_follows_the_last_end_of_turn_is_cut_from_a_template(tokenizer_path):
    """A template is captured and not rewritten: macros, other variables and line ends stay as they are."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    chat = [*CHATS[0], {"role": "user", "content": "More <|im_end|>\n"}, *CHATS[1][1:]]
    for template in (NASTY, "\n\n  " + NASTY + "\n\n"):
        tokenizer.chat_template = template
        render = lambda messages, prompt: tokenizer.apply_chat_template(  # noqa: E731
            messages, tokenize=False, add_generation_prompt=prompt
        )
        before = render(chat, False), render(chat[:-1], True), render(chat[:-1], False)
        written = before[0].rpartition("<|im_end|>")
        tokenizer.chat_template = ending_with(template, "<|im_end|>" + written[2], "<|im_end|>")
        assert (render(chat[:-1], True), render(chat[:-1], False)) == before[1:]
        assert written[2].isspace() and render(chat, False) == written[0] + "<|im_end|>"
    tokenizer.chat_template = ending_with("{% for m in messages %}{{ m.content }}{% endfor %}", "", "<|im_end|>")
    assert tokenizer.apply_chat_template(CHATS[2], tokenize=False) == "Say hello.Hello!<|im_end|>"
