"""Models whose loss and rewards read no LM head are held without one, and are and give what they did with one."""

import json

import pytest
import torch

from core.config import Model
from core.config.load import load
from core.errors import ArtefactError
from core.models.loading import load_causal_lm
from core.models.logits import has_lm_head, leave_out_lm_head
from rm.variants import build, lm_head_of
from tests.builders.families import tiny
from tests.builders.planted_pairs import settings, write_base
from tests.builders.processes import run_program
from tests.builders.reward_models import tiny_reward_model

LAYOUTS = ["0:float32", "0:bfloat16", "1:bfloat16", "2:float32", "3:float32", "3:bfloat16"]


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory):
    return write_base(tokenizer_path, tmp_path_factory.mktemp("untied") / "base")


@pytest.fixture(scope="module", params=[1, 2])
def found(request, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("without")
    run_program("tests/programs/training/absent_lm_head.py", base, out, *LAYOUTS, ranks=request.param)
    return json.loads((out / "found.json").read_text())


def head_size(base) -> int:
    about = json.loads((base / "config.json").read_text())
    assert not about["tie_word_embeddings"]
    return about["vocab_size"] * about["hidden_size"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_nothing_reads_is_not_held(found, base, layout):
    """Of a reward model and of critics from both starts; nothing holds on to its weights or to a share of them."""
    kept, without = found[layout]["kept"], found[layout]["left out"]
    for model in ("rm", "proxy", "policy"):
        assert kept[model]["params"] - without[model]["params"] == head_size(base) > 0
    assert found[layout]["left out of critics"] == [["lm.lm_head.weight"]] * 2
    assert len(found[layout]["freed"]) > 4 and all(found[layout]["freed"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_trained_and_saved_is_the_same(found, layout):
    """Every file of a reward model, the LM head in it; a critic after three updates, also one that was resumed."""
    kept, without = found[layout]["kept"], found[layout]["left out"]
    assert len([name for name in kept["rm"]["files"] if name.startswith("model-")]) > 1
    assert kept["rm"]["files"] == without["rm"]["files"]
    assert found[layout]["critics equal"]
    for model in ("proxy", "policy"):
        assert "state of another model, or was written by an earlier version" in without[model]["refused"]
        assert without[model]["resumed"] and without[model]["grad_norm"] == pytest.approx(
            kept[model]["grad_norm"], rel=1e-6
        )


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, False), ({"text_regulariser": "sft"}, True), ({"text_regulariser": "sft", "alpha": 0.0}, False),
     ({"text_regulariser": "dpo"}, True), ({"lora": True}, False)],
)  # fmt: skip
def test_a_text_regulariser_keeps_the_head(base, options, kept):
    cfg = load([], settings(base, **options))
    model, _ = build(cfg.rm, cfg.engine, cfg.rm.variants["it"], 0)
    assert has_lm_head(model.lm) is kept
    names = [name for name, _ in lm_head_of(cfg.rm.base, torch.float32, None)]
    assert names == ["lm_head.weight"]


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_a_head_over_layers_of_several_kinds_is_read_too(tmp_path, family):
    """Such a model cannot be cut to one layer, and a reward model of it is not to be lost when it is saved."""
    lm = tiny(family)
    assert lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight
    lm.save_pretrained(tmp_path)
    base = Model(path=str(tmp_path), attention="eager")
    with pytest.raises(ArtefactError):
        load_causal_lm(base, dtype="float32", num_layers=1)
    ((name, weight),) = lm_head_of(base, torch.float32, None)
    assert name == "lm_head.weight" and torch.equal(weight, lm.get_output_embeddings().weight)


def test_a_head_that_is_tied_to_the_embeddings_stays(tokenizer_path):
    tied, untied = (tiny_reward_model(tokenizer_path, "mlp", tie_word_embeddings=tied) for tied in (True, False))
    ids = torch.arange(4, 20)[None]
    for model in (tied, untied):
        before, size = model(ids, torch.ones_like(ids))[0], sum(p.numel() for p in model.parameters())
        leave_out_lm_head(model.lm)
        assert torch.equal(model(ids, torch.ones_like(ids))[0], before)
        assert (size > sum(p.numel() for p in model.parameters())) is (model is untied)
    assert tied.lm(ids).logits.shape[-1] == tied.lm.config.vocab_size
    with pytest.raises(ArtefactError, match="was loaded without its LM head, so it has no log-probs"):
        untied.lm(ids)
