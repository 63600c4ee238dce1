"""Tiny reward models as the GRM authors' code writes and scores them, for the tests of reading and export."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rm.model import RewardModel

CHATS = [
    [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    for q, a in (
        ("Name a fruit.", "An apple is a fruit."),
        ("Why do cats purr?", "Often because they are content; sometimes to calm themselves when they are hurt."),
        ("Say hello.", "Hello!"),
    )
]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def tiny_config(tokenizer, **settings) -> LlamaConfig:
    standard = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tokenizer.unk_token_id,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaConfig(**{**standard, **settings})


def batch(tokenizer) -> tuple[Tensor, Tensor]:
    """Ids and mask [3, L] of CHATS as the authors and RewardBench read them: the whole rendering, as any text.

    Padded on the right.
    """
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    rows = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    pad = lambda rows, value: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # noqa: E731
    return pad(rows, tokenizer.unk_token_id), pad([torch.ones_like(row) for row in rows], 0)


class AuthorsModel(nn.Module):
    """The forward pass of the GRM authors' model: the head on the last layer, read at the end of right-padded rows."""

    def __init__(self, pretrained_model: PreTrainedModel, layer_type: str, neurons: int, layers: int):
        super().__init__()
        self.pretrained_model, self.config = pretrained_model, pretrained_model.config
        width = self.config.hidden_size
        self.v_head = nn.Module()
        self.v_head.dropout = nn.Dropout(0.1)
        if layer_type == "linear":
            self.v_head.summary = nn.Linear(width, 1)
        else:
            sizes = [width] + [neurons] * layers
            parts = [p for i in range(layers) for p in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
            self.v_head.summary = nn.Sequential(*parts, nn.Linear(neurons, 1))
        vhead = {"vhead_layer_type": layer_type, "vhead_num_neurons": neurons, "vhead_num_layers": layers}
        for key, value in vhead.items():
            setattr(self.config, key, value)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        values = self.v_head.summary(self.v_head.dropout(out.hidden_states[-1])).squeeze(-1)
        return values[torch.arange(len(values)), attention_mask.sum(-1) - 1]


def write_lora(tokenizer, tmp_path: Path) -> tuple[Path, Tensor]:
    """A LoRA checkpoint as their trainer saves it, beside its base; returns it and its rewards of CHATS."""
    torch.manual_seed(1)
    base = LlamaForCausalLM(tiny_config(tokenizer))
    base.save_pretrained(tmp_path / "base")
    wrapped = AuthorsModel(base, "mlp", 1024, 1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets, task_type=TaskType.SEQ_CLS)
    peft = get_peft_model(wrapped, settings)
    for name, weight in peft.named_parameters():
        weight.requires_grad = "lora_" in name or "v_head" in name
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    inner = peft.base_model.model
    trained = {k: p.detach().clone() for k, p in inner.named_parameters() if p.requires_grad}
    kept = {key.replace("pretrained_model.", ""): tensor for key, tensor in trained.items()}
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in kept and "v_head.summary.0.weight" in kept
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    inner.config.save_pretrained(folder)
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft.peft_config["default"].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return folder, wrapped.eval()(*batch(tokenizer))


def write_full(folder: Path, tokenizer, layer_type="mlp", neurons=1024, layers=1, *, lm_head=False, **settings):
    """A full checkpoint as they publish it; returns the model."""
    torch.manual_seed(2)
    lm = LlamaForCausalLM(tiny_config(tokenizer, **settings))
    return write_authors(folder, tokenizer, lm, layer_type, neurons, layers, lm_head=lm_head)


def write_authors(folder: Path, tokenizer, lm, layer_type="mlp", neurons=1024, layers=1, *, lm_head=False):
    """The same of a given language model of any family."""
    model = AuthorsModel(lm, layer_type, neurons, layers).eval()
    weights = {key.replace("pretrained_model.", ""): t.detach().clone() for key, t in model.named_parameters()}
    weights = {key: tensor for key, tensor in weights.items() if lm_head or "lm_head" not in key}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def edit(folder: Path, change) -> None:
    """Apply `change` to the tensors of the folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def read(folder: Path, **options) -> RewardModel:
    return RewardModel.from_pretrained(folder, dtype="float32", attention="eager", **options)
