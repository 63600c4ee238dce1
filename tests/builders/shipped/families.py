"""The families of published models: their tokenizers' kind and chat template on a small vocabulary, tiny models, and
reward models in the layouts that people publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.builders.checkpoints import write_authors
from tests.builders.policies import tiny_policy
from tests.builders.tokenizers import gemma, of_family

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
"""As Mistral-7B-Instruct-v0.2 has it: no system turn, no generation prompt, and marks that are ordinary text."""
LLAMA_3 = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]

EXACT = {"dtype": torch.float32, "attn_implementation": "eager"}
"""sdpa leaves out Gemma-2's cap of attention scores."""


def _llama_3(source: Path, folder: Path, template: str, *more: str) -> Path:
    """The template and the tokenizer both write BOS."""
    of_family(source, folder, template, [*LLAMA_3, *more], bos_token=LLAMA_3[0], eos_token="<|eot_id|>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def _pythia(source: Path, folder: Path) -> Path:
    """As Pythia after SFT by Open-Assistant's code: no chat template."""
    of_family(source, folder, "{{ '' }}", ["<|padding|>", "<|prompter|>", "<|assistant|>"], eos_token="<|endoftext|>")
    (folder / "chat_template.jinja").unlink()
    return folder


TOKENIZERS: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "smollm": ("llama", lambda source, folder: source),
    "gemma": ("gemma", gemma),
    "gemma2": ("gemma2", gemma),
    "mistral": ("mistral", lambda source, folder: of_family(
        source, folder, MISTRAL, ["<unk>", "<s>", "</s>"], unk_token="<unk>", bos_token="<s>", eos_token="</s>")),
    "llama3": ("llama", lambda source, folder: _llama_3(source, folder, "llama3")),
    "llama3.2": ("llama", lambda source, folder: _llama_3(source, folder, "llama3_2", "<|finetune_right_pad_id|>")),
    "qwen3": ("qwen3", lambda source, folder: of_family(
        source, folder, "qwen3", [], eos_token="<|im_end|>", pad_token="<|endoftext|>")),
    "pythia": ("gpt_neox", _pythia),
}  # fmt: skip
"""Name -> family of `tests.builders.policies`, and (tokenizer of SmolLM, folder) -> folder of a tokenizer as the
published models have it. SmolLM stands for those whose tokenizer and template are the offline model's."""


def tiny_model(name: str, source: Path, folder: Path, *, layers: int = 2) -> Path:
    """A language model with random weights in `folder`; `source` is the folder of SmolLM's tokenizer."""
    family, make = TOKENIZERS[name]
    return tiny_policy(family, make(source, folder.with_name(folder.name + "-tokenizer")), folder, layers=layers)


def tiny_classifier(name: str, source: Path, folder: Path) -> Path:
    """A sequence classifier with one label, as the GRM authors' `-ft` models, their baseline and their gold are."""
    lm = tiny_model(name, source, folder.with_name(folder.name + "-lm"))
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(lm, num_labels=1)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(lm).save_pretrained(folder)
    return folder


def tiny_grm(name: str, source: Path, folder: Path) -> Path:
    """A GRM in the layout of the authors' `-sftreg` models: the trunk and `v_head.summary`, no LM head."""
    lm = tiny_model(name, source, folder.with_name(folder.name + "-lm"))
    torch.manual_seed(6)
    model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    write_authors(folder, AutoTokenizer.from_pretrained(lm), model)
    return folder


def classifier_rewards(folder: Path) -> Callable[[list[dict]], float]:
    """The rewards of conversations, one by one, as RewardBench computes them: a second BOS is not read."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, **EXACT).eval()

    @torch.no_grad()
    def reward(chat: list[dict]) -> float:
        ids = _ids(tokenizer, chat)
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        trunk = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return float(model.score(trunk)[0, -1, 0])

    return reward


def grm_rewards(folder: Path) -> Callable[[list[dict]], float]:
    """The same of `tiny_grm`, whose makers read both BOS; the head's weights are read from the file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = folder.with_name(folder.name + "-lm")
    model = AutoModelForCausalLM.from_pretrained(lm, **EXACT).eval()
    weights = load_file(folder / "model.safetensors")
    first, last = ({k: weights[f"v_head.summary.{i}.{k}"] for k in ("weight", "bias")} for i in (0, 2))

    @torch.no_grad()
    def reward(chat: list[dict]) -> float:
        ids = torch.tensor([_ids(tokenizer, chat)])
        hidden: Tensor = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        inner = torch.relu(first["weight"] @ hidden + first["bias"])
        return float(last["weight"] @ inner + last["bias"])

    return reward


def _ids(tokenizer, chat: list[dict]) -> list[int]:
    """The template of Llama-3.2 would write today's date otherwise."""
    return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, date_string="26 Jul 2024")).input_ids
