"""Reward models saved as adapters: the scores of the merged form, several on one base, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from core.config import Lora, Model
from core.config.load import load
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError, ConfigError
from core.models.layers import hidden_states
from core.models.loading import load_causal_lm
from core.models.lora import add_lora
from core.training.weights import named_weights, save_adapter
from rm.checkpoints.adapters import save_adapter_model
from rm.checkpoints.layout import save_reward_model
from rm.ensemble import AdapterEnsemble, one_base
from rm.model import RewardModel
from rm.score import score_tokens
from rm.serving import server as serve
from tests.builders.checkpoints import CHATS, CLOSE, edit_json, tiny_config, write_lora
from tests.builders.command_line import grm
from tests.builders.processes import run_program

LAYERS = 3


@pytest.fixture(scope="module")
def base(tokenizer_path, tmp_path_factory) -> Path:
    """A tiny model of four layers; reward models use three of them."""
    folder = tmp_path_factory.mktemp("adapters") / "base"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config(tokenizer, num_hidden_layers=LAYERS + 1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(base: Path, seed: int, *, dtype: str = "float32", kind: str = "mlp", **lora) -> RewardModel:
    """A reward model with an adapter as training would leave it."""
    where = Model(path=str(base))
    lm = load_causal_lm(where, dtype=dtype, num_layers=LAYERS)
    lm = add_lora(lm, Lora(**{"rank": 4, "alpha": 8, "dropout": 0.1, "top_layers": 2, **lora}))
    torch.manual_seed(seed)
    for name, weight in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return RewardModel(lm, kind, ChatTokenizer(where), mean=0.1 * seed, std=1.0 + seed).eval()


def saved(model: RewardModel, folder: Path, base: Path) -> tuple[Path, Path]:
    """The model as an adapter and whole."""
    head = {key: tensor.detach().clone() for key, tensor in model.head.state_dict().items()}
    about = {"variant": {"alpha": 0.01}, "run_seed": 1}
    save_adapter_model(folder / "adapter", model, head, base=Model(path=str(base)), **about)
    save_reward_model(folder / "whole", model, named_weights(model.lm), head, base=str(base), **about)
    return folder / "adapter", folder / "whole"


@pytest.fixture(scope="module")
def members(base, tmp_path_factory) -> list[tuple[Path, Path]]:
    """Three seeds, of which one has another rank and adapts all layers."""
    folder, settings = tmp_path_factory.mktemp("members"), ({}, {}, {"rank": 2, "top_layers": None})
    return [saved(trained(base, s, **lora), folder / str(s), base) for s, lora in zip((1, 2, 3), settings, strict=True)]


@pytest.fixture
def copy(members, tmp_path) -> Path:
    """An adapter folder to spoil."""
    return Path(shutil.copytree(members[0][0], tmp_path / "copy"))


def test_equal_adapters_have_equal_files(base, tmp_path):
    """PEFT keeps the names of layers in a set, whose order is another in every process."""
    model = trained(base, 1)
    config, names = model.lm.peft_config["default"], {"q_proj", "v_proj", "k_proj"}
    for number, order in enumerate((sorted(names), sorted(names, reverse=True))):
        config.target_modules = order
        save_adapter(tmp_path / str(number), model.lm)
    first, second = ((tmp_path / n / "adapter_config.json").read_bytes() for n in "01")
    assert first == second and set(json.loads(first)["target_modules"]) == names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mlp", "odin"])
def test_scores_are_those_of_the_merged_form_to_the_bit(base, tmp_path, dtype, kind):
    model = trained(base, 4, dtype=dtype, kind=kind)
    adapter, whole = saved(model, tmp_path, base)
    for wanted in ("float32", "bfloat16"):
        one, other = (RewardModel.from_pretrained(folder, dtype=wanted) for folder in (adapter, whole))
        assert torch.equal(one.score(CHATS), other.score(CHATS))
        assert (one.mean, one.std, one.head_kind) == (other.mean, other.std, other.head_kind) == (0.4, 5.0, kind)
        theirs = dict(other.lm.named_parameters())
        assert all(torch.equal(p, theirs[n]) and p.dtype == theirs[n].dtype for n, p in one.lm.named_parameters())
    exact = {"float32": CLOSE, "bfloat16": {"atol": 0.05, "rtol": 0.05}}[dtype]
    torch.testing.assert_close(
        RewardModel.from_pretrained(adapter, dtype=dtype).score(CHATS), model.score(CHATS), **exact
    )
    assert model.score(CHATS).std() > 0.02
    names = {file.name for file in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "head.safetensors"} < names
    assert not any(name.startswith("model") for name in names)


def test_peft_loads_the_folder(base, members):
    lm = load_causal_lm(Model(path=str(base)), dtype="float32", num_layers=LAYERS)
    lm = PeftModel.from_pretrained(lm, members[0][0]).eval()
    model = RewardModel.from_pretrained(members[0][0], dtype="float32")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, expected = (hidden_states(m, ids, torch.ones_like(ids)) for m in (lm, model.lm))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("dtype", "close"), [("float32", CLOSE), ("bfloat16", {"atol": 0.05, "rtol": 0.05})])
def test_an_ensemble_on_one_base_scores_as_its_merged_members(members, dtype, close):
    ensemble = AdapterEnsemble.from_pretrained([adapter for adapter, _ in members], dtype=dtype)
    expected = [RewardModel.from_pretrained(whole, dtype=dtype).score(CHATS) for _, whole in members]
    for _ in range(2):  # each call switches adapters
        for member, rewards in zip(ensemble.members, expected, strict=True):
            torch.testing.assert_close(member.score(CHATS), rewards, **close)
    for member, rewards in zip(ensemble.through(ensemble), expected, strict=True):
        module = member.module
        rows = [module.reader.conversation(chat) for chat in CHATS]
        found = score_tokens(member, module.tokenizer, rows, limits=module.limits)
        torch.testing.assert_close(found, rewards, **close)
    assert [(m.mean, m.std) for m in ensemble.members] == [(0.1, 2.0), (0.2, 3.0), (0.1 * 3, 4.0)]
    assert min(float((a - b).abs().max()) for a, b in zip(expected, expected[1:], strict=False)) > 0.02


def test_the_base_is_in_memory_once(base, members):
    adapters = [adapter for adapter, _ in members]
    one, three = (AdapterEnsemble.from_pretrained(a, dtype="float32") for a in (adapters[:1], adapters))
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    own = [load_file(a / f"{part}.safetensors") for a in adapters[1:] for part in ("adapter_model", "head")]
    assert size(three) - size(one) == sum(tensor.numel() for part in own for tensor in part.values())
    assert len({id(member.lm) for member in three.members}) == 1
    assert not any(p.requires_grad for p in three.parameters())


def test_members_share_the_layers_below_their_adapters(members):
    rows = None
    for chosen, depth in ((members[:2], 1), (members, None)):
        ensemble = AdapterEnsemble.from_pretrained([adapter for adapter, _ in chosen], dtype="float32")
        rows = rows or [ensemble.members[0].reader.conversation(chat) for chat in CHATS]
        cache = ensemble.frozen_state_cache(rows)
        assert (cache and cache.layers.depth) == depth
        for member, (adapter, _) in zip(ensemble.members, chosen, strict=True):
            expected = RewardModel.from_pretrained(adapter, dtype="float32").score(CHATS)
            torch.testing.assert_close(member.score(CHATS, frozen=cache), expected, **CLOSE)


def test_the_server_shares_a_base_where_it_can(members, base, tmp_path):
    adapters, whole = zip(*members, strict=True)
    models, frozen = serve.load([str(a) for a in adapters[:2]], dtype="float32")
    assert models[0].lm is models[1].lm and frozen is not None
    served = serve.Ensemble(["a", "b"], models, frozen=frozen)
    apart, none = serve.load([str(w) for w in whole[:2]], dtype="float32")
    assert none is None and apart[0].lm is not apart[1].lm
    rows = [served.models[0].reader.conversation(chat) for chat in CHATS]
    torch.testing.assert_close(served.members(rows), serve.Ensemble(["a", "b"], apart).members(rows), **CLOSE)
    assert not one_base([adapters[0], whole[1]]) and not one_base(adapters[:1])
    half = saved(trained(base, 5, dtype="bfloat16"), tmp_path, base)[0]
    assert one_base(adapters) and not one_base([*adapters, half])
    with pytest.raises(ArtefactError, match="has another base, type or number of layers"):
        AdapterEnsemble.from_pretrained([adapters[0], half])
    with pytest.raises(ArtefactError, match="whole is not an adapter of this project"):
        AdapterEnsemble.from_pretrained([adapters[0], whole[1]])


def spoil(folder: Path, change, file: str = "adapter_model.safetensors") -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(KEY), r"layers\.2\.self_attn\.q_proj\.lora_A\.weight is missing"),
        (lambda w: w.update({KEY.replace("layers.2", "layers.0"): w[KEY].clone()}), r"layers\.0\.self_attn.*is extra"),
        (lambda w: w.update({KEY.removeprefix("base_model."): w[KEY].clone()}), r"model\.model\.layers\.2.*is extra"),
        (lambda w: w.update({KEY: w[KEY][:2].clone()}), r"lora_A\.weight is \[2, 32\], not \[4, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, members, change, message):
    spoil(copy, change)
    for read in (RewardModel.from_pretrained, lambda f: AdapterEnsemble.from_pretrained([members[1][0], f])):
        with pytest.raises(ArtefactError, match=message):
            read(copy)


def test_heads_tokenizers_and_formats_that_do_not_fit_are_named(copy):
    edit_json(copy / "adapter_config.json", use_dora=True)
    with pytest.raises(ArtefactError, match="use_dora = True"):
        RewardModel.from_pretrained(copy)
    edit_json(copy / "adapter_config.json", use_dora=False)
    spoil(copy, lambda w: w.pop("2.bias"), "head.safetensors")
    with pytest.raises(ArtefactError, match=r"mlp head: 2\.bias"):
        RewardModel.from_pretrained(copy)
    edit_json(copy / "reward_model.json", format=3)
    with pytest.raises(ArtefactError, match="format 3 is not known"):
        RewardModel.from_pretrained(copy)
    edit_json(copy / "reward_model.json", format=2, tokenizer="another")
    with pytest.raises(ArtefactError, match="tokenizer or chat template is not the one"):
        RewardModel.from_pretrained(copy)


def test_another_vocabulary_is_refused(copy, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(copy)
    edit_json(copy / "reward_model.json", tokenizer=ChatTokenizer(Model(path=str(copy))).fingerprint)
    with pytest.raises(ArtefactError, match="1 tokens beyond it, such as '<another>'"):
        RewardModel.from_pretrained(copy)


def test_another_base_is_refused_and_a_moved_one_is_found(copy, base, tmp_path):
    expected = RewardModel.from_pretrained(copy, dtype="float32").score(CHATS)
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    edit_json(copy / "reward_model.json", base=str(tmp_path / "gone"))
    with pytest.raises(ArtefactError, match="its base .*gone does not exist"):
        RewardModel.from_pretrained(copy)
    assert torch.equal(RewardModel.from_pretrained(copy, dtype="float32", base=moved).score(CHATS), expected)
    ensemble = AdapterEnsemble.from_pretrained([copy], dtype="float32", base=moved)
    torch.testing.assert_close(ensemble.members[0].score(CHATS), expected, **CLOSE)
    edit_json(moved / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ArtefactError, match=r"moved is not the base of .*copy: its rms_norm_eps is 0\.001, not 1e-06"):
        RewardModel.from_pretrained(copy, base=moved)
    edit_json(moved / "config.json", rms_norm_eps=1e-6)
    # as another fine-tuning of the same model would have it
    spoil(moved, lambda w: w["model.layers.0.mlp.up_proj.weight"].mul_(1.01), "model.safetensors")
    with pytest.raises(ArtefactError, match="moved is not the base of .*copy: the digest of its weights"):
        RewardModel.from_pretrained(copy, base=moved)


def test_the_authors_lora_is_not_taken_for_ours(tokenizer_path, members, tmp_path):
    folder, _ = write_lora(AutoTokenizer.from_pretrained(tokenizer_path), tmp_path)
    assert not one_base([folder, folder])
    with pytest.raises(ArtefactError, match="is not a LoRA checkpoint"):
        RewardModel.from_pretrained(members[0][1], base=tmp_path / "base")


def test_export_and_merge_take_adapters(members, tmp_path, capsys):
    adapter, whole = members[0]
    assert grm("rm-export", adapter, tmp_path / "whole", "--form", "merged", "--dtype", "float32") == 0
    texts = [(f / "reward_model.json").read_text() for f in (tmp_path / "whole", whole)]
    assert json.loads(texts[0]) == json.loads(texts[1])
    models = [RewardModel.from_pretrained(f, dtype="float32") for f in (tmp_path / "whole", whole)]
    assert torch.equal(models[0].score(CHATS), models[1].score(CHATS))
    for form in (0, 1):
        assert grm("rm-merge", tmp_path / f"average{form}", *(m[form] for m in members)) == 0
    scores = [RewardModel.from_pretrained(tmp_path / f"average{f}", dtype="float32").score(CHATS) for f in (0, 1)]
    assert torch.equal(*scores)
    assert grm("rm-merge", tmp_path / "none", members[0][0], members[1][1]) == 2
    assert "layout merged, not adapter" in capsys.readouterr().err
    edit_json(
        Path(shutil.copytree(adapter, tmp_path / "other")) / "reward_model.json",
        base_model={"digest": "0", "revision": None, "dtype": "float32"},
    )
    assert grm("rm-merge", tmp_path / "none", adapter, tmp_path / "other") == 2
    assert "base of digest 0, not of digest" in capsys.readouterr().err


def test_a_configuration_without_lora_has_no_adapter_to_save():
    with pytest.raises(ConfigError, match="rm: save: adapter needs lora"):
        load([], ["rm.save=adapter"])
    assert load([], ["rm.save=adapter", "rm.lora={rank: 4}"]).rm.save == "adapter"


@pytest.mark.slow
def test_trained_and_saved_under_zero3_both_ways(base, tmp_path):
    run_program("tests/programs/adapters.py", base, tmp_path, ranks=2)
    for name in ("a", "b"):
        adapter, whole = tmp_path / "adapter" / name, tmp_path / "merged" / name
        assert not (adapter / "model.safetensors").exists() and not (whole / "adapter_config.json").exists()
        assert max(t.abs().max() for n, t in load_file(adapter / "adapter_model.safetensors").items() if "_B" in n) > 0
        for wanted in ("float32", "bfloat16"):
            one, other = (RewardModel.from_pretrained(folder, dtype=wanted) for folder in (adapter, whole))
            assert torch.equal(one.score(CHATS), other.score(CHATS)) and (one.mean, one.std) == (other.mean, other.std)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["shared"] == scores["again"] and len(scores["shared"]) == 4
    assert scores["shared"] == pytest.approx(scores["whole"], abs=1e-3, rel=1e-3)  # standard deviations
    # Read straight into shards: the same rewards, and the same training.
    assert scores["divided"] == scores["divided adapters"] == scores["whole"]
    assert scores["divided and shared"] == scores["shared"]
    first, second = ((tmp_path / "log" / name / "train.jsonl").read_text() for name in ("a", "whole"))
    assert first == second
    one, other = (load_file(tmp_path / "merged" / name / "model.safetensors") for name in ("a", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
