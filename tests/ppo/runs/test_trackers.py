"""What trackers are called with: accelerate's own classes, on modules that write down what reaches them."""

import sys
from types import ModuleType, SimpleNamespace

import accelerate.tracking
import pytest

from core.config import Config, Ppo, Run
from core.errors import DataError
from ppo.measured.trackers import PROJECT, Trackers


@pytest.fixture
def calls(monkeypatch):
    """What `wandb` and `mlflow` were asked to begin, and what was logged."""
    found = []
    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    run = SimpleNamespace(log=lambda values, step, **_: found.append(("log", values, step)), finish=lambda: None)
    wandb.init = lambda **options: found.append(("wandb", options)) or run
    wandb.config = SimpleNamespace(update=lambda values, **_: None)
    mlflow.search_experiments = lambda **_: [SimpleNamespace(experiment_id="7")]
    mlflow.start_run = lambda **options: (
        found.append(("mlflow", options))
        or SimpleNamespace(info=SimpleNamespace(run_id=options["run_id"] or f"made-{len(found)}"))
    )
    mlflow.log_params = lambda values: found.append(("log_params", values))
    mlflow.log_metrics = lambda values, step, **_: found.append(("log_metrics", values, step))
    mlflow.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=10**6, MAX_PARAMS_TAGS_PER_BATCH=99))
    for name, module in (("wandb", wandb), ("mlflow", mlflow)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["wandb", "mlflow", "tensorboard"])
    return found


def config(*trackers: str) -> Config:
    return Config(run=Run(name="kl01"), ppo=Ppo(trackers=trackers))


def test_a_run_has_its_name_and_is_continued(calls, tmp_path):
    for _ in range(2):  # the second time as after a resume
        Trackers(config("wandb", "mlflow"), tmp_path).log({"ppo/kl": 1.5}, 3)
    first, again = ([call[1] for call in calls if call[0] == name] for name in ("wandb", "mlflow"))
    assert first[0] == first[1] and first[0].items() >= {"project": PROJECT, "name": "kl01", "resume": "allow"}.items()
    assert len(first[0]["id"]) == 21 and first[0]["id"].isalnum()
    assert [options["run_name"] for options in again] == ["kl01", "kl01"]
    assert again[0]["run_id"] is None and again[1]["run_id"].startswith("made-")  # the one that mlflow chose
    assert calls.count(("log", {"ppo/kl": 1.5}, 3)) == calls.count(("log_metrics", {"ppo/kl": 1.5}, 3)) == 2
    assert sum(call[0] == "log_params" for call in calls) == 1  # MLflow refuses to change them


def test_another_run_of_the_same_name_is_another_one(calls, tmp_path):
    for name in ("a", "b"):
        Trackers(config("wandb"), tmp_path / name / "ppo")
    ids = [options["id"] for _, options in calls]
    assert len(set(ids)) == 2


@pytest.mark.parametrize("name", ["tensorboard", "comet"])
def test_a_tracker_that_is_not_there_is_named(calls, tmp_path, name):
    with pytest.raises(DataError, match=rf"'{name}' is not installed or not known .*available: wandb, mlflow"):
        Trackers(config(name), tmp_path)


def test_nothing_is_written_without_trackers(tmp_path):
    Trackers(config(), tmp_path).log({"ppo/kl": 1.0}, 1)
    assert not list(tmp_path.iterdir())
