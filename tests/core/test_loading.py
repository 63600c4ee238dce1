"""Language models cut to their first layers."""

import json

import pytest

from core.config import Model
from core.errors import ArtefactError
from core.models.loading import load_causal_lm


def test_kinds_of_attention_by_layer_are_cut_with_the_layers(tmp_path):
    """Qwen and Gemma list one a layer; a saved model whose list is longer than its layers does not load."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16}
    Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path / "a")
    lm = load_causal_lm(Model(path=str(tmp_path / "a")), dtype="float32", num_layers=2)
    lm.save_pretrained(tmp_path / "b")
    again = load_causal_lm(Model(path=str(tmp_path / "b")), dtype="float32")
    assert len(again.config.layer_types) == len(again.model.layers) == 2


@pytest.fixture
def tiny(tmp_path):
    """The folder of a small language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_a_model_that_was_cut_short_is_named(tiny):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match="lm: its weights are damaged, cut short or not there"):
        load_causal_lm(Model(path=str(tiny)), dtype="float32")
    weights.unlink()
    with pytest.raises(ArtefactError, match="lm: its weights are damaged, cut short or not there"):
        load_causal_lm(Model(path=str(tiny)), dtype="float32")


@pytest.mark.parametrize("content", ["{", "", "[1]", json.dumps({"model_type": "of no library"})])
def test_a_configuration_that_is_damaged_is_named(tiny, content):
    (tiny / "config.json").write_text(content)
    with pytest.raises(ArtefactError, match="cannot read the configuration of .*lm"):
        load_causal_lm(Model(path=str(tiny)), dtype="float32")
