"""What the study measures on its reward models: their sizes, and the second gold."""

import numpy as np

from core.config import Model
from core.data.chat import ChatTokenizer
from core.files import read_table, write_json, write_table
from core.models.loading import load_causal_lm
from core.training.weights import named_weights
from rm.checkpoints.layout import save_reward_model
from rm.model import RewardModel
from study import reward_models as study_models
from study.reward_models import parameters
from tests.builders.study_plan import planned


def test_parameters_of_an_adapter_are_those_of_its_layers(policy_path, tmp_path):
    where = Model(path=str(policy_path))
    lm = load_causal_lm(where, dtype="bfloat16", num_layers=2)
    model = RewardModel(lm, "mlp", ChatTokenizer(where))
    save_reward_model(tmp_path / "whole", model, named_weights(lm), model.head.state_dict())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    expected = sum(p.numel() for p in lm.parameters())
    assert parameters(tmp_path / "whole", str(policy_path), 2) == expected
    assert parameters(tmp_path / "adapter", str(policy_path), 2) == expected


def test_the_second_gold_is_scored_once_for_one_pool(tmp_path, monkeypatch):
    cfg, _, _ = planned(tmp_path, "study.second_gold={kind: hub, path: some/gold}")
    rest = {"split": "eval", "prompt": [], "token_ids": [1], "n_tokens": 1, "finished": True, "logp_sampler": -1.0}
    samples = [{"prompt_id": "a", "sample_id": k, "response": f"r{k}", **rest} for k in range(3)]
    scored = []
    monkeypatch.setattr("study.reward_models.load_gold", lambda gold: gold.path)
    monkeypatch.setattr(
        "study.reward_models.score_samples", lambda gold, rows: scored.append(gold) or np.arange(len(rows))
    )

    (cfg.run_dir / "bon").mkdir(parents=True)

    def pools(sha):
        write_table(cfg.run_dir / "bon" / "samples.parquet", samples)
        outputs = [{"path": "samples.parquet", "sha256": sha}]
        write_json(cfg.run_dir / "bon" / "manifest.json", {"format": 1, "stage": "bon", "outputs": outputs})
        study_models.score_second_gold(cfg)

    pools("first")
    pools("first")
    assert scored == ["some/gold"]
    pools("other")
    assert len(scored) == 2 and [r["score"] for r in read_table(cfg.run_dir / "study" / "gold2.parquet")] == [0, 1, 2]
    study_models.score_second_gold(planned(tmp_path)[0])  # no second gold any more: its scores are of no run now
    assert not (cfg.run_dir / "study" / "gold2.parquet").exists()
