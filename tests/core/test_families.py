"""Families of language models: log-probs, frozen layers, shared prompts and adapters, against transformers and PEFT."""

import pytest
import torch
from torch import Tensor

from core.batching import pack, pad_right
from core.config import Lora, Model
from core.errors import ArtefactError
from core.models.agreement import can_share_prompts, check_agreement
from core.models.architecture import layers_of
from core.models.layers import FrozenLayers, hidden_states, shared_depth, train_top_layers
from core.models.loading import load_causal_lm, without_dropout
from core.models.logits import LmHead
from core.models.logprobs import token_logprobs
from core.models.lora import add_lora
from core.training.weights import named_weights
from tests.builders.families import NAMES, tiny
from tests.builders.policies import FAMILIES, tiny_policy

ROWS = [[5, 9, 13, 21, 8, 34, 55, 89, 7, 11], [3, 1, 4, 1, 5]]


@pytest.fixture(scope="module")
def lm_of(tokenizer_path, tmp_path_factory):
    """Loads a model of a family, in float32."""
    folder = tmp_path_factory.mktemp("families")

    def load(family: str, **options):
        if not (folder / family).is_dir():
            tiny_policy(family, tokenizer_path, folder / family)
        return load_causal_lm(Model(path=str(folder / family)), dtype="float32", **options).eval()

    return load


def our_logprobs(lm) -> list[Tensor]:
    ids, mask = pad_right(ROWS, 0)
    hidden = hidden_states(lm, ids, mask)
    ends = [len(row) for row in ROWS]
    return [token_logprobs(LmHead.of(lm), hidden[i, : n - 1], ids[i, 1:n])[0] for i, n in enumerate(ends)]


def own_logprobs(lm) -> list[Tensor]:
    """From the logits of the model's own forward pass, each row alone."""
    found = []
    for row in ROWS:
        ids = torch.tensor([row])
        logps = lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().log_softmax(-1)
        found.append(logps[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1))
    return found


def assert_own(lm) -> None:
    with torch.no_grad():
        for mine, own in zip(our_logprobs(lm), own_logprobs(lm), strict=True):
            torch.testing.assert_close(mine.double(), own, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_models_own_logits(family, lm_of):
    lm = lm_of(family)
    assert_own(lm)
    assert float(torch.cat(own_logprobs(lm)).detach().std()) > 0.05


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "falcon_h1", "recurrent_gemma", "hyperclovax"])
def test_scales_and_caps_after_the_head_are_kept(family):
    lm = tiny(family)
    with torch.no_grad():  # logits so large that a cap or a scale decides them
        lm.get_output_embeddings().weight.mul_(300)
        if "logits_scaling" in lm.config.to_dict():
            lm.config.logits_scaling = 8.0
    assert_own(lm)
    head = LmHead.of(lm)
    assert head.cap is not None or head.scale != 1


@pytest.mark.parametrize("family", ["bert", "electra", "inkling_text"])
def test_an_architecture_whose_logprobs_would_be_wrong_is_refused_by_name(family):
    with pytest.raises(ArtefactError, match=rf"\({type(tiny(family)).__name__}\): this architecture is not supported"):
        check_agreement(tiny(family))


@pytest.mark.slow
def test_every_family_of_transformers_is_right_or_refused(capsys):
    """Prints which families are refused, and which cannot be built in a tiny form, with the reasons."""
    right, wrong, refused, unbuilt = [], [], {}, {}
    for family in NAMES:
        try:
            lm = tiny(family)
            without_dropout(lm)
            own_logprobs(lm)
        except Exception as error:  # its sizes do not fit together, or it needs a package that is not here
            unbuilt[family] = f"{type(error).__name__}: {error}".split("\n")[0][:120]
            continue
        try:
            check_agreement(lm)
        except ArtefactError as error:
            assert type(lm).__name__ in str(error)
            refused[family] = str(error).partition("since ")[2][:100]
            continue
        try:
            assert_own(lm)
            right.append(family)
        except AssertionError:
            wrong.append(family)
    with capsys.disabled():
        print(f"\n{len(right)} families with their own log-probs: {', '.join(right)}")
        for title, which in (("refused", refused), ("not built", unbuilt)):
            print(f"{len(which)} {title}:", *(f"{name}: {why}" for name, why in which.items()), sep="\n  ")
    assert not wrong and len(right) > 100 and not set(FAMILIES) - set(right)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_continue_from_frozen_ones(family, lm_of):
    lm, other = lm_of(family), lm_of(family)
    for model in (lm, other):
        train_top_layers(model, 1)
    top = {id(p) for p in layers_of(lm)[-1].parameters()}
    trained = {n for n, p in lm.named_parameters() if p.requires_grad and id(p) not in top}
    assert trained and all("norm" in name or "ln_f" in name for name in trained)
    with torch.no_grad():
        for p in layers_of(other)[-1].parameters():
            p.add_(0.01)
    assert shared_depth(lm, other) == 1
    layers, (ids, mask) = FrozenLayers(lm, 1), pad_right(ROWS, 0)
    for model in (lm, other):
        layers.check(model)
        whole = hidden_states(model, ids, mask)
        torch.testing.assert_close(hidden_states(model, ids, mask, frozen=layers(ids, mask)), whole)
    assert all(p.requires_grad for p in layers_of(lm)[-1].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_shared_only_where_that_changes_nothing(family, lm_of):
    """The rows are longer than the sliding windows of these models."""
    lm = lm_of(family)
    prompt, responses = list(range(10, 24)), ([7, 8, 9, 10], [20, 21, 22, 23, 24, 25], [3, 4])
    shared = pack([(prompt, responses)], 0)
    alone = pack([(prompt, [r]) for r in responses], 0)
    with torch.no_grad():
        found, wanted = (
            hidden_states(lm, b.input_ids, b.attention_mask, positions=b.positions).flatten(0, 1)[b.ends]
            for b in (shared, alone)
        )
    assert can_share_prompts(lm) == torch.allclose(found, wanted, atol=1e-4, rtol=1e-3)
    assert can_share_prompts(lm) == (family not in ("mistral", "gemma2", "gemma3", "gemma3_text"))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_merged_as_peft_merges_them(family, lm_of):
    torch.manual_seed(0)
    lm = add_lora(lm_of(family), Lora(rank=4, top_layers=1))
    factors = {n: p for n, p in lm.named_parameters() if "lora_" in n}
    assert factors and all(".1." in name and "vision" not in name for name in factors)
    with torch.no_grad():
        for p in factors.values():
            p.normal_(std=0.1)
    ours = dict(named_weights(lm))
    theirs = dict(lm.merge_and_unload().named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "gpt2", "phi3"])
def test_the_default_targets_stand_for_all_linear_layers(family, lm_of):
    lm = add_lora(lm_of(family), Lora(rank=2))
    adapted = {n.split(".lora_A")[0] for n, _ in lm.named_parameters() if ".lora_A" in n}
    assert len(adapted) == 2 * {"gpt_neox": 4, "opt": 6, "gpt2": 4, "phi3": 4}[family]


def test_targets_that_no_layer_has_are_an_error(lm_of):
    with pytest.raises(ArtefactError, match=r"\['query'\].* have c_attn, c_fc, c_proj$"):
        add_lora(lm_of("gpt2"), Lora(targets=("c_attn", "query")))


def test_a_cut_model_of_images_and_text(lm_of):
    """The number of layers stands in the section about text."""
    lm = lm_of("gemma3", num_layers=1)
    assert len(layers_of(lm)) == len(lm.config.text_config.layer_types) == 1
    assert not any(p.requires_grad for n, p in lm.named_parameters() if "vision" in n)
