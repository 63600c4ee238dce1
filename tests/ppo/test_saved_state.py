"""A state that PPO resumes from is the one that was saved, or is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from core.config.load import load
from core.errors import ArtefactError
from core.training.saved import mark_state, saved_state
from ppo.ema import FILE, WeightAverage
from ppo.keep import PolicyKeeper
from ppo.log import RunLog
from ppo.saved import LOGS, SavedFiles, check_saved

STATE = {"step": 4, "kl": {"coef": 0.1 + 0.2}, "scale": {"mean": 1e-9, "count": 7}, "ranks": 2}


def test_the_mark_of_a_state_comes_back_as_it_was(tmp_path):
    assert saved_state(tmp_path, 2) == {"step": 0}
    mark_state(tmp_path, STATE)
    assert saved_state(tmp_path, 2) == STATE
    with pytest.raises(ArtefactError, match="written by 2 ranks and there are 3 now"):
        saved_state(tmp_path, 3)
    (tmp_path / "state" / "last.json").write_text(json.dumps(STATE))
    assert saved_state(tmp_path, 2) == STATE, "those of earlier versions"


@pytest.mark.parametrize("change", [lambda text: text.replace("0.3", "0.4"), lambda text: text[:40], lambda text: ""])
def test_a_mark_that_is_damaged_is_refused(tmp_path, change):
    mark_state(tmp_path, STATE)
    mark = tmp_path / "state" / "last.json"
    mark.write_text(change(mark.read_text()))
    with pytest.raises(ArtefactError, match="last.json"):
        saved_state(tmp_path, 2)


def test_an_average_of_weights_that_is_damaged_is_refused(tmp_path):
    average = WeightAverage.__new__(WeightAverage)  # of one tensor, without an engine
    weight = torch.nn.Parameter(torch.arange(50.0))
    average._trained, average.values = {"w": weight}, {}
    save_file({"w": torch.arange(50.0)}, tmp_path / FILE)
    sha256 = average.digest(tmp_path)
    average.load(tmp_path, sha256)
    assert torch.equal(average.values[weight], torch.arange(50.0))
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-3] ^= 1
    (tmp_path / FILE).write_bytes(content)
    average.load(tmp_path, None)  # an earlier version recorded nothing
    with pytest.raises(ArtefactError, match="ema.safetensors is damaged"):
        average.load(tmp_path, sha256)


def run_with_a_state(out):
    """Logs of three steps, the policies of two, and a state after the second."""
    state = out / "state" / "000002"
    (state / "actor").mkdir(parents=True)
    (state / "actor" / "weights.pt").write_bytes(b"an archive")
    for name in LOGS:
        (out / name).write_text('{"step": 1}\n{"step": 2}\n')
    saved = SavedFiles(out)
    for step in (1, 2):
        policy = out / "checkpoints" / f"step-000{step}"
        policy.mkdir(parents=True)
        (policy / "adapter.safetensors").write_bytes(bytes([step]))
        saved.add_policy(policy)
        (out / "rollouts").mkdir(exist_ok=True)
        (out / "rollouts" / f"step-00000{step}.parquet").write_bytes(bytes([7, step]))
    then = json.loads(json.dumps(saved.record(state)))
    for name in LOGS:
        with (out / name).open("a") as file:
            file.write('{"step": 3}\n{"st')
    return then


def test_logs_are_cut_to_where_they_were_when_the_state_was_saved(tmp_path):
    then = run_with_a_state(tmp_path)
    check_saved(tmp_path, then, keeps_all=True)
    SavedFiles(tmp_path).go_on(then)
    assert {(tmp_path / name).read_text() for name in LOGS} == {'{"step": 1}\n{"step": 2}\n'}
    check_saved(tmp_path, then, keeps_all=True)


@pytest.mark.parametrize("name", [*LOGS, "checkpoints/step-0001/adapter.safetensors", "state/000002/actor/weights.pt"])
@pytest.mark.parametrize("how", ["cut", "missing", "flipped"])
def test_what_a_resumed_run_goes_on_with_is_refused_by_name_if_damaged(tmp_path, name, how):
    then, file = run_with_a_state(tmp_path), tmp_path / name
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(content) if how == "flipped" else b"")
    if how == "flipped" and name.startswith("state"):  # DeepSpeed's archives have checksums: `engine.check_state`
        return check_saved(tmp_path, then, keeps_all=True)
    name = name.removesuffix("/adapter.safetensors")  # a policy is named by its folder
    with pytest.raises(ArtefactError, match=f"{name} is missing or is not what was written: delete .*state"):
        check_saved(tmp_path, then, keeps_all=True)


def test_rollouts_that_were_changed_are_refused_and_rotated_ones_may_be_gone(tmp_path):
    then, folder = run_with_a_state(tmp_path), tmp_path / "rollouts"
    (folder / "step-000001.parquet").unlink()
    (folder / "step-000003.parquet").write_bytes(b"of a step after the state")
    check_saved(tmp_path, then, keeps_all=True)
    (folder / "step-000002.parquet").write_bytes(b"x")
    with pytest.raises(ArtefactError, match="rollouts/step-000002.parquet is missing or is not what was written"):
        check_saved(tmp_path, then, keeps_all=True)


def test_policies_that_a_later_step_has_deleted_may_be_gone(tmp_path):
    then = run_with_a_state(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-0001")
    check_saved(tmp_path, then, keeps_all=False)
    with pytest.raises(ArtefactError, match="step-0001"):
        check_saved(tmp_path, then, keeps_all=True)


def test_a_run_that_starts_again_takes_nothing_from_damaged_logs(tmp_path):
    """No state was saved yet: what the steps have left is made again."""
    cfg = load(["configs/smoke.yaml"], [f"run.dir={tmp_path}"])
    (tmp_path / "metrics.jsonl").write_bytes(b"[1]\n\xff\xfe{}\n")
    (tmp_path / "policies.json").write_text("{")
    PolicyKeeper(tmp_path, None).forget_after(0)
    assert not (tmp_path / "policies.json").exists()
    RunLog(cfg, tmp_path, 1).close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_scores_of_policies_come_back_with_the_state(tmp_path):
    keeper = PolicyKeeper(tmp_path, None)
    for step in (1, 2):
        keeper.folder(step).mkdir(parents=True)
        keeper.scored(step, step / 10)
    then = keeper.scores()
    keeper.folder(3).mkdir()
    keeper.scored(3, 0.9)
    (tmp_path / "policies.json").write_text("{")
    keeper.forget_after(2, then)
    assert json.loads((tmp_path / "policies.json").read_text()) == {"1": 0.1, "2": 0.2}
