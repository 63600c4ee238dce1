"""Bundles of what was not finite, and where in a pass it begins."""

import json
import math

import pytest
import torch
from torch import nn

from core.errors import ArtefactError
from core.models.tracing import gradients, traced
from core.training.bundles import faults_folder, put_weights, read_bundle, save_bundle
from core.training.distributed import NotFinite, check_finite


def fault(**values) -> NotFinite:
    with pytest.raises(NotFinite) as raised:
        check_finite("ppo step 2", values, "Lower the rate", [["a", "b"], ["c"]])
    return raised.value


def test_the_first_tensor_its_prompts_and_its_part_are_told():
    rows = [torch.tensor([[1.0, 2.0], [3.0, math.inf]]), torch.tensor([[math.nan, 0.0]])]
    found = fault(rewards=[torch.ones(2), torch.ones(1)], values=rows, losses=[math.nan])
    assert str(found) == "ppo step 2: 2 of 6 values are NaN or infinite, of prompts b, c. Lower the rate"
    assert (found.name, found.rank, found.parts, found.prompts) == ("values", 0, [0, 1], ["b", "c"])
    assert fault(losses=[1.0, math.inf]).prompts == ["c"]


def test_a_sum_that_overflows_is_no_fault():
    check_finite("here", {"large": [torch.full((4,), 3e38), torch.full((4,), 3e38, dtype=torch.bfloat16)]}, "")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).exp())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Block(), nn.Linear(2, 1))


def test_the_innermost_layer_with_a_broken_weight_is_named(network):
    with traced(network) as trace:
        network(torch.ones(2, 3))
    assert trace.first is None
    with torch.no_grad():
        network[1].first.weight[2, 1] = math.nan
    with traced(network) as trace:
        network(torch.ones(2, 3))
    assert trace.first == "1.first (Linear), whose weights are not finite (weight: 1 of 12 numbers)"


def test_what_a_module_computes_between_its_layers_is_its_own(network):
    with torch.no_grad():
        network[1].first.bias.fill_(1e3)  # exp overflows
    with traced(network) as trace:
        network(torch.ones(2, 3))
    assert trace.first == "1 (Block)"


def test_a_gradient_is_named_nearest_to_the_loss(network):
    network(torch.ones(2, 3)).sum().backward()
    assert not gradients(network)[0]
    network[1].first.bias.grad[0] = math.inf
    network[0].weight.grad[0, 0] = math.nan
    seen, lines = gradients(network)
    assert seen and "2 of 8 gradients" in lines[0] and lines[1] == "nearest to the loss: 1.first.bias"


def test_a_bundle_is_read_as_it_was_written(network, tmp_path):
    network[0].requires_grad_(False)
    folder = faults_folder(tmp_path / "run" / "rm.partial" / "grm") / "rm-grm-step-0001"
    assert folder == tmp_path / "run" / "faults" / "rm-grm-step-0001"
    inputs = {"ids": torch.arange(6).view(2, 3), "mask": torch.tensor([True, False]), "x": torch.tensor([math.nan])}
    said = save_bundle(fault(losses=[math.nan]), folder, {"stage": "rm", "step": 1}, inputs, network)
    assert f"`grm replay {folder}`" in str(said)
    found = read_bundle(folder)
    assert found.about["prompts"] == ["a", "b"] and found.about["step"] == 1
    assert found.inputs["ids"].equal(inputs["ids"]) and found.inputs["x"].isnan().all()
    assert set(found.weights) == {n for n, p in network.named_parameters() if p.requires_grad}
    other = nn.Sequential(nn.Linear(3, 3), Block(), nn.Linear(2, 1))
    put_weights(other, found.weights)
    assert other[1].first.weight.equal(network[1].first.weight)
    with pytest.raises(ArtefactError, match=r"no weight 1\.first\.weight of this shape"):
        put_weights(nn.Sequential(nn.Linear(3, 3)), {"1.first.weight": torch.ones(1)})


def test_a_bundle_that_is_none_or_damaged_is_refused(network, tmp_path):
    with pytest.raises(ArtefactError, match="no bundle in"):
        read_bundle(tmp_path)
    save_bundle(fault(losses=[math.nan]), tmp_path / "b", {"stage": "rm", "step": 1}, {}, network)
    about = json.loads((tmp_path / "b" / "bundle.json").read_text())
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(about | {"step": 2}))
    with pytest.raises(ArtefactError, match="is damaged"):
        read_bundle(tmp_path / "b")


def test_a_bundle_that_cannot_be_written_hides_no_fault(network, tmp_path):
    (tmp_path / "faults").write_text("a file")
    said = save_bundle(fault(losses=[math.nan]), tmp_path / "faults" / "b", {"stage": "rm"}, {}, network)
    assert "1 of 1 losses are NaN" in str(said) and "no bundle could be written" in str(said)
