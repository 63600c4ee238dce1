"""Language models cut to their first layers."""

from core.config import Model
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
