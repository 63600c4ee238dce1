"""Attention with capped scores (Gemma-2): which kernel a model is trained, saved and read with."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

from core.config import Model
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.models.loading import load_causal_lm
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from tests.builders.checkpoints import CHATS, edit_json
from tests.builders.policies import tiny_policy


@pytest.fixture(scope="module")
def gemma2(tokenizer_path, tmp_path_factory):
    """Attention scores so large that the cap decides them."""
    folder = tiny_policy("gemma2", tokenizer_path, tmp_path_factory.mktemp("kernels") / "gemma2")
    lm = Gemma2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
    lm.save_pretrained(folder)
    return folder


def last_state(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.arange(3, 40)[None]).last_hidden_state


def test_auto_computes_what_the_architecture_says(gemma2, tokenizer_path, tmp_path):
    lm = load_causal_lm(Model(path=str(gemma2)), dtype="float32")
    eager = Gemma2ForCausalLM.from_pretrained(gemma2, attn_implementation="eager")
    uncapped = Gemma2ForCausalLM.from_pretrained(gemma2, attn_implementation="sdpa")
    torch.testing.assert_close(last_state(lm), last_state(eager))
    assert (last_state(uncapped) - last_state(eager)).abs().max() > 0.1
    tiny_policy("llama", tokenizer_path, tmp_path / "llama")
    assert load_causal_lm(Model(path=str(tmp_path / "llama")), dtype="float32").config._attn_implementation == "sdpa"


def test_a_kernel_without_the_cap_is_refused(gemma2):
    with pytest.raises(ArtefactError, match="gemma2 caps its attention scores at 50 .* set attention to eager"):
        load_causal_lm(Model(path=str(gemma2), attention="sdpa"), dtype="float32")


def test_a_saved_reward_model_is_read_with_its_kernel(gemma2, tmp_path):
    """By this project, and by plain transformers, whose default leaves the cap out."""
    where = Model(path=str(gemma2))
    model = RewardModel(load_causal_lm(where, dtype="float32"), "mlp", ChatTokenizer(where)).eval()
    torch.nn.init.normal_(model.head[-1].weight, generator=torch.Generator().manual_seed(0))
    expected, head = model.score(CHATS), {k: v for k, v in model.head.state_dict().items()}
    save_reward_model(tmp_path / "rm", model, model.lm.named_parameters(), head)
    again = RewardModel.from_pretrained(tmp_path / "rm", dtype="float32")
    torch.testing.assert_close(again.score(CHATS), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rm").config._attn_implementation == "eager"
    with pytest.raises(ArtefactError, match="caps its attention scores"):
        RewardModel.from_pretrained(tmp_path / "rm", dtype="float32", attention="sdpa")
    edit_json(tmp_path / "rm" / "reward_model.json", attention=None)  # as version 0.1 wrote it, which used sdpa
    with pytest.raises(ArtefactError, match="version 0.1, which trained .* without the cap of 50 .* train it again"):
        RewardModel.from_pretrained(tmp_path / "rm", dtype="float32")
