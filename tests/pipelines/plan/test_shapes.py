"""Sizes of models are those of the models themselves."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from core.config import Lora, Model
from core.errors import ConfigError
from core.models.lora import add_lora
from pipelines.plan.shapes import PUBLISHED, shape_of
from tests.builders.plan.sizes import TINY, tiny_shape


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied):
    lm = LlamaForCausalLM(LlamaConfig(**TINY | {"tie_word_embeddings": tied}))
    shape = tiny_shape(tie_word_embeddings=tied)
    assert shape.params == sum(p.numel() for p in lm.parameters())
    assert shape.layers * shape.layer_params == sum(p.numel() for p in lm.model.layers.parameters())
    assert shape.embedding_params == lm.model.embed_tokens.weight.numel() + TINY["hidden_size"]
    assert shape.cut(2).params == shape.params - 2 * shape.layer_params


@pytest.mark.parametrize(
    "lora", [Lora(rank=3), Lora(rank=5, top_layers=2), Lora(rank=2, targets=("q_proj", "down_proj"))]
)
def test_adapters_are_counted(lora):
    lm = add_lora(LlamaForCausalLM(LlamaConfig(**TINY)), lora)
    assert tiny_shape().lora_params(lora) == sum(p.numel() for p in lm.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("google/gemma-2b-it", 2.506),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8.030),
        ("meta-llama/Llama-3.2-1B-Instruct", 1.236),
        ("Qwen/Qwen3-4B", 4.022),
        ("EleutherAI/pythia-1.4b", 1.415),
        ("EleutherAI/pythia-70m", 0.070),
    ],
)
def test_published_sizes_have_the_published_parameters(name, billions):
    assert name in PUBLISHED
    assert shape_of(Model(path=name)).params / 1e9 == pytest.approx(billions, abs=0.001)


def test_a_model_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.json cannot be read"):
        shape_of(Model(path=str(tmp_path)))
