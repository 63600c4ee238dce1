"""Which layers of a language model are trained."""

from core.config import Model
from core.models.layers import train_top_layers
from core.models.loading import load_causal_lm


def test_only_the_top_layers_learn(policy_path):
    lm = load_causal_lm(Model(path=str(policy_path)), dtype="float32", num_layers=4)
    train_top_layers(lm, 1)
    trained = {n.split(".")[2] if "layers" in n else n for n, p in lm.named_parameters() if p.requires_grad}
    assert trained == {"3", "model.norm.weight"}
