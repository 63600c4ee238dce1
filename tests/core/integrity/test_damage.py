"""Files of finished stages that are missing, cut short, changed or added are found, by name and at no cost twice."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from core import damage
from core.artefacts import Fingerprint, open_partial, publish, read_manifest, write_manifest
from core.damage import WEIGHTS, archive_fault, check_part, look, remember_outputs, remembered
from core.errors import ArtefactError
from core.files import read_json, write_json, write_table
from core.training.engine import check_state
from tests.builders.processes import draw

FILES = ("grm/model.safetensors", "grm/config.json", "val.parquet", "train.jsonl", "adapter/adapter_model.safetensors")


@pytest.fixture
def stage(tmp_path) -> Path:
    """A finished stage in a run, with files of all kinds."""
    wanted, folder = Fingerprint({"rm": 1}), tmp_path / "run" / "rm"
    partial = open_partial(folder, wanted)
    for number, name in enumerate(FILES):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(bytes((number + k) % 251 for k in range(3000 + number)))
    (partial / "val.parquet").unlink()
    write_table(partial / "val.parquet", [{"a": k} for k in range(100)])
    for name in ("tensorboard/events.out.tfevents.1", "README.md"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text("before")
    publish(partial, folder, "rm", wanted, seed=1, seconds=0.0, metrics={})
    return folder


def faults(folder: Path, **how) -> list[str]:
    found = look(folder, read_manifest(folder), **how).faults
    return [f"{fault.path.relative_to(folder)} {fault.what}" for fault in found]


def flip(file: Path) -> None:
    """One bit somewhere, and the time of writing as it was."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[int(draw(f"byte of {file.name}", 0, len(content)))] ^= 1 << int(draw(f"bit of {file.name}", 0, 8))
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("is_remembered", [False, True])
def test_one_bit_is_found_in_every_kind_of_file(stage, name, is_remembered):
    if is_remembered:
        assert faults(stage) == []
    flip(stage / name)
    assert faults(stage) == [f"{name} is not what was written: its SHA-256 is another"]


@pytest.mark.parametrize("name", FILES)
def test_sizes_are_told_in_words(stage, name):
    size = (stage / name).stat().st_size
    for content, words in (
        ((stage / name).read_bytes()[:-7], f"is cut short: {size - 7} bytes, and {size} were written"),
        (b"", f"is empty: 0 bytes, and {size} were written"),
        ((stage / name).read_bytes() + b"x", f"is too long: {size + 1} bytes, and {size} were written"),
    ):
        (stage / name).write_bytes(content)
        assert faults(stage) == [f"{name} {words}"]
    (stage / name).unlink()
    assert faults(stage) == [f"{name} is missing"]


def test_files_that_were_added_are_named_where_something_may_read_them(stage):
    (stage / "grm" / "model.safetensors.index.json").write_text("{}")
    for harmless in ("run.log", ".DS_Store", "NOTES.md", "tensorboard/events.2", ".ipynb_checkpoints/a.json"):
        (stage / harmless).parent.mkdir(exist_ok=True)
        (stage / harmless).write_text("x")
    (stage / "README.md").write_text("after")
    assert faults(stage) == ["grm/model.safetensors.index.json was not written by the stage"]


def test_weights_that_nothing_opens_may_be_gone(stage):
    (stage / "grm" / "model.safetensors").unlink()
    assert faults(stage, without=WEIGHTS) == [] and faults(stage) == ["grm/model.safetensors is missing"]


def test_a_folder_of_a_stage_is_checked_alone(stage):
    (stage / "val.parquet").unlink()
    check_part(stage / "grm")
    flip(stage / "adapter" / "adapter_model.safetensors")
    check_part(stage / "grm")
    with pytest.raises(
        ArtefactError, match="adapter is not what stage 'rm' wrote:\n .*adapter_model.safetensors is not"
    ):
        check_part(stage / "adapter")
    (stage / "grm" / "extra.json").write_text("{}")
    with pytest.raises(ArtefactError, match="extra.json was not written by the stage"):
        check_part(stage / "grm")
    (stage / "mine").mkdir()
    check_part(stage / "mine")
    check_part(stage.parent)


def count_reads(monkeypatch) -> list[str]:
    read, seen = damage._read, []
    monkeypatch.setattr(damage, "_read", lambda folder, paths, size: seen.extend(paths) or read(folder, paths, size))
    return seen


def test_a_second_look_reads_nothing_and_a_copy_is_read_once(stage, monkeypatch):
    read = count_reads(monkeypatch)
    assert faults(stage) == [] and sorted(read) == sorted(FILES)
    assert faults(stage) == [] and len(read) == len(FILES)
    os.utime(stage / FILES[0])
    assert faults(stage) == [] and read[len(FILES) :] == [FILES[0]]
    read.clear()
    copy = Path(shutil.copytree(stage.parent, stage.parent.with_name("copy"))) / "rm"
    assert [faults(copy), faults(copy)] == [[], []] and sorted(read) == sorted(FILES)
    read.clear()
    moved = stage.parent.rename(stage.parent.with_name("moved")) / "rm"
    assert faults(moved) == [] and not read
    assert faults(moved, again=True) == [] and sorted(read) == sorted(FILES)


def test_no_file_is_called_damaged_that_was_not_read(stage):
    """What is remembered may itself be damaged, and a wrong digest in it says nothing of the file."""
    assert faults(stage) == []
    memory = stage.parent / ".grm" / "digests.json"
    whole = json.loads(memory.read_text())
    memory.write_text(json.dumps(dict.fromkeys(whole, "0" * 64)))
    assert look(stage, read_manifest(stage), most_bytes=0) == ([], 0), "those in doubt are read, however large"
    assert json.loads(memory.read_text()) == whole
    flip(stage / FILES[0])
    assert faults(stage) == faults(stage) == [f"{FILES[0]} is not what was written: its SHA-256 is another"]


def test_a_stage_that_was_just_published_is_remembered(stage, monkeypatch):
    remember_outputs(stage)
    read = count_reads(monkeypatch)
    assert faults(stage) == [] and not read


def test_a_look_that_must_be_short_says_what_it_did_not_read(stage):
    flip(stage / FILES[0])
    assert look(stage, read_manifest(stage), most_bytes=1000) == ([], sum((stage / f).stat().st_size for f in FILES))
    assert not remembered(stage)


def test_a_run_that_cannot_be_written_is_checked_all_the_same(stage, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(damage, "write_json", refuse)
    assert faults(stage) == []
    (stage.parent / ".grm").mkdir()
    (stage.parent / ".grm" / "digests.json").write_text("[1")
    assert faults(stage) == []


def test_a_manifest_that_was_changed_is_refused(stage):
    write_manifest(stage, read_manifest(stage) | {"seconds": 0.1 + 0.2, "metrics": {"ä": [1e-9, None, True]}})
    assert read_manifest(stage)["seconds"] == 0.1 + 0.2
    file = stage / "manifest.json"
    sealed = file.read_bytes()
    fingerprint = (stage / "fingerprint.json").read_bytes()  # which has no digest of itself either
    for content in (
        sealed.replace(b"0.30", b"0.31"), sealed[:100], b"", b"\xff" + sealed, b"[1]", b"null", b"{}", fingerprint
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(ArtefactError, match="rm/manifest.json is damaged: .*`grm rm --force` runs the stage again"):
            read_manifest(stage)
    unsealed = {"stage": "rm", "outputs": []}
    write_json(file, unsealed)
    assert read_manifest(stage) == unsealed == read_json(file), "those of earlier versions"


def test_a_flipped_bit_in_an_archive_of_torch_is_found(tmp_path):
    """`torch.load` gives other numbers without a word."""
    file = tmp_path / "actor" / "state" / "rank_0.pt"
    file.parent.mkdir(parents=True)
    torch.save({"w": torch.arange(1000.0), "o": {"step": 3}}, file)
    whole = file.read_bytes()
    check_state(tmp_path / "actor")
    silent = 0
    for case in range(100):
        damaged, at = bytearray(whole), int(draw(f"bit {case}", 0, 8 * len(whole)))
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            found = torch.load(file)
            is_wrong = not torch.equal(found["w"], torch.arange(1000.0)) or found["o"] != {"step": 3}
        except Exception:
            continue  # loud by itself
        silent += is_wrong
        if is_wrong:
            with pytest.raises(ArtefactError, match="rank_0.pt is damaged.*: delete .* to start the stage again"):
                check_state(tmp_path / "actor")
    assert silent > 10
    for cut in (b"", whole[:100], whole[:-30]):
        file.write_bytes(cut)
        assert "is cut short or damaged" in archive_fault(file)
