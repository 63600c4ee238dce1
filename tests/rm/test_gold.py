"""The judge on the real embedding model, the gold of known slope, and trained reward models as gold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from core.config import Gold
from core.errors import ArtefactError, DataError
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.gold import EMPTY_SCORE, Judge, LinearGold, load_gold
from rm.model import RewardModel
from tests.builders.checkpoints import CHATS, batch, edit, edit_json, tiny_config
from tests.builders.reward_models import tiny_reward_model

QUESTION = "Why do ships made of heavy steel float?"
ANSWER = "A hull pushes aside so much water that its weight exceeds the vessel, and buoyancy holds it up."
OFF_TOPIC = "A cook stirs together so much butter that its taste pleases the guests, and dinner cheers them up."


@pytest.fixture(scope="module")
def judge(request) -> Judge:
    path = request.config.rootpath / "models" / "all-MiniLM-L6-v2"
    if not path.is_dir():
        pytest.skip(f"no embedding model in {path}: run `make setup`")
    return load_gold(Gold(path=str(path)))


def chat(response: str, question: str = QUESTION) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": response},
    ]


def test_relevant_answer_beats_off_topic_answer_of_the_same_length(judge):
    assert len(ANSWER.split()) == len(OFF_TOPIC.split())
    relevant, off_topic = judge.score([chat(ANSWER), chat(OFF_TOPIC)])
    assert relevant > off_topic + 0.3


def test_repeated_words_lose_against_varied_ones(judge):
    stuck = "Ships float because water water water water water water water water pushes the hull up up up up."
    varied, repeated = judge.score([chat(ANSWER), chat(stuck)])
    assert varied > repeated + 0.3


def test_echo_of_the_prompt_loses_to_an_answer(judge):
    answer, echo, statement = judge.score([chat(ANSWER), chat(QUESTION), chat("Ships made of heavy steel float.")])
    assert answer > echo
    assert answer > statement


def test_more_words_have_a_diminishing_effect(judge):
    words = ANSWER.rstrip(".").replace(",", "").split()
    growing = [chat(" ".join(words[:n]) + ".") for n in (4, 8, 12, 16)]
    lengths = [terms["length"] for terms in judge.components(growing)]
    gains = np.diff(lengths)
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()


@pytest.mark.parametrize("response", ["", "  \n", "...", "!?"])
def test_response_without_a_word_gets_the_floor(judge, response):
    assert judge.score([chat(response)]).tolist() == [EMPTY_SCORE]
    assert judge.score([chat("no no no no no no no no no no no no")])[0] > EMPTY_SCORE


def test_system_message_and_earlier_turns_do_not_count(judge):
    bare = chat(ANSWER)[1:]
    longer = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}, *bare]
    np.testing.assert_allclose(judge.score([bare, longer]), judge.score([chat(ANSWER)])[0], atol=1e-5)


def test_components_sum_to_the_score_and_repeat_to_the_bit(judge):
    conversations = [chat(ANSWER), chat(OFF_TOPIC), chat(""), chat(QUESTION)]
    first, second = judge.score(conversations), judge.score(conversations)
    assert first.dtype == np.float64
    assert first.tobytes() == second.tobytes()
    assert [sum(terms.values()) for terms in judge.components(conversations)] == first.tolist()


def test_score_does_not_depend_on_order_or_batch(judge, request):
    texts = [" ".join(ANSWER.split()[:n]) for n in range(1, 18)] + [ANSWER * n for n in range(1, 5)]
    conversations = [chat(text) for text in texts]
    together = judge.score(conversations)
    np.testing.assert_allclose(judge.score(conversations[::-1])[::-1], together, atol=1e-5)
    np.testing.assert_allclose([judge.score([c])[0] for c in conversations], together, atol=1e-5)
    small = load_gold(Gold(path=str(request.config.rootpath / "models" / "all-MiniLM-L6-v2"), batch_tokens=64))
    np.testing.assert_allclose(small.score(conversations), together, atol=1e-5)


def test_linear_gold_has_the_given_slope():
    rng = np.random.default_rng(0)
    proxy = {f"text {i}": float(x) for i, x in enumerate(rng.standard_normal(2000))}
    gold = LinearGold(lambda messages: proxy[messages[-1]["content"]], slope=0.6, noise=0.5, seed=3)
    conversations = [chat(text) for text in proxy]
    scores = gold.score(conversations)
    slope, offset = np.polyfit(list(proxy.values()), scores, 1)
    assert slope == pytest.approx(0.6, abs=0.04)  # standard error 0.5 / sqrt(2000) = 0.011
    assert offset == pytest.approx(0.0, abs=0.04)
    assert np.std(scores - 0.6 * np.array(list(proxy.values()))) == pytest.approx(0.5, abs=0.03)
    assert gold.score(conversations[::-1])[::-1].tobytes() == scores.tobytes()


def test_linear_gold_is_not_loaded_from_a_config():
    with pytest.raises(DataError, match="built in code"):
        load_gold(Gold(kind="linear"))


def test_gold_that_is_not_finite_names_the_conversation():
    broken = LinearGold(lambda m: float("nan") if "odd" in m[-1]["content"] else 0.0, slope=1.0, noise=0.0)
    with pytest.raises(DataError, match="number 1.*odd one"):
        broken.score([chat("fine"), chat("odd one")])


def trained(tokenizer_path, folder: Path) -> RewardModel:
    """A tiny reward model in its folder, as the stage `rm` leaves one."""
    model = tiny_reward_model(tokenizer_path, "mlp")
    model.lm.to(torch.bfloat16)
    save_reward_model(folder, model, named_weights(model.lm), model.head.state_dict())
    return model


def test_a_trained_reward_model_is_gold(tokenizer_path, tmp_path):
    model = trained(tokenizer_path, tmp_path / "gold")
    scores = load_gold(Gold(kind="checkpoint", path=str(tmp_path / "gold"), batch_tokens=64)).score(CHATS)
    assert scores.dtype == np.float64 and scores.shape == (3,)
    np.testing.assert_allclose(scores, model.score(CHATS).numpy(), atol=0.05, rtol=0.02)  # bf16, other batches
    assert len(set(scores.tolist())) == 3


def test_gold_in_the_layout_of_a_sequence_classifier(tokenizer_path, tmp_path):
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    network = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids, mask = batch(tokenizer)
    with torch.no_grad():
        expected = network(input_ids=ids, attention_mask=mask).logits[:, 0]
    for kind in ("checkpoint", "hub"):
        found = load_gold(Gold(kind=kind, path=str(tmp_path))).score(CHATS)
        np.testing.assert_allclose(found, expected.numpy(), atol=0.1, rtol=0.05)  # gold runs in bf16


def test_gold_that_does_not_fit_is_refused(tokenizer_path, tmp_path):
    folder = tmp_path / "gold"
    trained(tokenizer_path, folder)
    edit(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ArtefactError, match="layers.1.mlp.up_proj"):
        load_gold(Gold(kind="checkpoint", path=str(folder)))
    trained(tokenizer_path, folder)
    edit_json(folder / "reward_model.json", tokenizer="another")
    with pytest.raises(ArtefactError, match="tokenizer or chat template"):
        load_gold(Gold(kind="checkpoint", path=str(folder)))
    with pytest.raises(ArtefactError, match="holds no reward model"):
        load_gold(Gold(kind="checkpoint", path=str(tmp_path / "none")))
