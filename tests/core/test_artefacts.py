"""Publication and freshness."""

from core.artefacts import Fingerprint, manifest_digest, open_partial, publish, read_manifest
from core.files import write_table


def make(folder, sections):
    wanted = Fingerprint(sections, {"prompts": "abc"})
    partial = open_partial(folder, wanted)
    write_table(partial / "t.parquet", [{"a": 1}])
    publish(partial, folder, "rm", wanted, seed=1, seconds=0.0, metrics={})
    return read_manifest(folder)


def test_published_folder_and_differences(tmp_path):
    manifest = make(tmp_path / "rm", {"rm": {"lr": 1, "head": "mlp"}})
    assert manifest["outputs"][0]["rows"] == 1 and not (tmp_path / "rm.partial").exists()
    same = Fingerprint({"rm": {"lr": 1, "head": "mlp"}}, {"prompts": "abc"})
    assert same.differences(manifest) == []
    other = Fingerprint({"rm": {"lr": 2, "head": "mlp"}}, {"prompts": "xyz"})
    assert other.differences(manifest) == ["rm.lr: 1 -> 2", "input prompts changed"]


def test_digest_follows_content_not_time(tmp_path):
    first, second = (manifest_digest(make(tmp_path / "rm", {"rm": 1})) for _ in range(2))
    assert first == second != manifest_digest(make(tmp_path / "rm", {"rm": 2}))


def test_unfinished_work_is_kept_for_the_same_configuration_only(tmp_path):
    partial = open_partial(tmp_path / "bon", Fingerprint({"n": 1}))
    (partial / "shard").write_text("x")
    assert (open_partial(tmp_path / "bon", Fingerprint({"n": 1})) / "shard").exists()
    assert not (open_partial(tmp_path / "bon", Fingerprint({"n": 2})) / "shard").exists()
    assert read_manifest(tmp_path / "bon") is None


def test_results_made_before_a_correction_are_out_of_date(tmp_path):
    """A mended fault reaches users of finished runs: equal configurations alone do not make a result right."""
    made = make(tmp_path / "ppo", {"ppo": {"steps": 2}})
    corrected = Fingerprint({"ppo": {"steps": 2}}, {"prompts": "abc"}, ("sorted minibatches",))
    assert corrected.differences(made) == ["an earlier version sorted minibatches"]
    partial = open_partial(tmp_path / "ppo", corrected)
    (partial / "state").write_text("x")
    publish(partial, tmp_path / "ppo", "ppo", corrected, seed=1, seconds=0.0, metrics={})
    assert corrected.differences(read_manifest(tmp_path / "ppo")) == []
    again = Fingerprint(corrected.sections, corrected.inputs, (*corrected.corrections, "dropped a term"))
    assert again.differences(read_manifest(tmp_path / "ppo")) == ["an earlier version dropped a term"]


def test_unfinished_work_from_before_a_correction_is_not_continued(tmp_path):
    partial = open_partial(tmp_path / "ppo", Fingerprint({"n": 1}))
    (partial / "state").write_text("x")
    assert not (open_partial(tmp_path / "ppo", Fingerprint({"n": 1}, {}, ("erred",))) / "state").exists()
