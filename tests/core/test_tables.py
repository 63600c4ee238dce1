"""Files of a split and a subset: local copies are read as the hub reads them, and no other split without a word."""

import gzip
import json

import pytest

from core.config import PreferenceSource
from core.data.sources import read_pairs
from core.data.tables import Malformed, local_tables
from core.errors import DataError
from core.files import write_table
from tests.builders.pair_files import unified, write


def put(folder, name, *prompts):
    """A file of one row a prompt in the format of its name."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rows = [unified(prompt=prompt) for prompt in prompts]
    if name.endswith(".parquet"):
        write_table(folder / name, rows)
    elif name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        write(folder / name, *rows)


def prompts_of(path, malformed=None, **options):
    source = PreferenceSource(path=path, **options)
    return [p["prompt"][0]["content"] for p in read_pairs(source, malformed or Malformed())]


def test_a_split_that_a_folder_lacks_is_not_read_from_others(tmp_path):
    put(tmp_path, "train.jsonl", "a")
    put(tmp_path, "test.jsonl", "held out")
    assert prompts_of(tmp_path) == ["a"] and prompts_of(tmp_path, split="test") == ["held out"]
    with pytest.raises(DataError, match="no files of split 'validation'; there are test, train"):
        prompts_of(tmp_path, split="validation")
    put(tmp_path / "plain", "one.jsonl", "a")
    put(tmp_path / "plain", "two.jsonl", "b")
    assert prompts_of(tmp_path / "plain") == ["a", "b"]  # files that name no split are train, as on the hub
    with pytest.raises(DataError, match="no files of split 'test'; there are train"):
        prompts_of(tmp_path / "plain", split="test")


@pytest.mark.parametrize("name", ["data/{}-00000-of-00001.parquet", "{}.jsonl"])
def test_several_kinds_of_one_split_are_not_mixed(tmp_path, name):
    """As in UltraFeedback-binarized; without shard numbers, `datasets` takes all three for train."""
    for kind in ("train_prefs", "train_sft", "test_prefs"):
        put(tmp_path, name.format(kind), kind)
    assert prompts_of(tmp_path, split="train_prefs") == ["train_prefs"]
    with pytest.raises(DataError, match="train_prefs, train_sft"):
        prompts_of(tmp_path)


def test_a_copy_in_the_cache_of_the_hub_is_links(tmp_path, monkeypatch):
    put(tmp_path, "blobs/a.jsonl", "a")
    put(tmp_path, "blobs/b.jsonl", "held out")
    (tmp_path / "snapshot").mkdir()
    for name, blob in (("train.jsonl", "a"), ("test.jsonl", "b")):
        (tmp_path / "blobs" / f"{blob}.jsonl").rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{blob}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("snapshot")
    for path in ("snapshot", "link", "./blobs/../snapshot", tmp_path / "snapshot"):
        assert prompts_of(path, malformed := Malformed()) == ["a"] and not malformed.changed


def test_shards_of_a_split_are_read_in_order(tmp_path):
    for number in (1, 0):
        put(tmp_path, f"data/train-0000{number}-of-00002.parquet", f"shard {number}")
    put(tmp_path, "data/test-00000-of-00001.parquet", "held out")
    assert prompts_of(tmp_path) == ["shard 0", "shard 1"]


README = """---
configs:
- config_name: all
  default: true
  data_files: [{split: train, path: "*/train*"}, {split: val, path: "*/val*"}]
- config_name: one
  data_files: [{split: train, path: "one/train*"}]
---
"""


def test_the_subset_of_a_local_copy(tmp_path):
    for part in ("one", "two"):
        put(tmp_path, f"{part}/train.jsonl.gz", part)
        put(tmp_path, f"{part}/val.jsonl.gz", f"val {part}")
    assert prompts_of(tmp_path, subset="two") == ["two"]  # a folder
    (tmp_path / "README.md").write_text(README)
    assert prompts_of(tmp_path) == ["one", "two"] and prompts_of(tmp_path, subset="one") == ["one"]
    assert prompts_of(tmp_path, split="val") == ["val one", "val two"]
    with pytest.raises(DataError, match="subset 'three': BuilderConfig 'three' not found"):
        prompts_of(tmp_path, subset="three")
    with pytest.raises(DataError, match=r"no files of split 'val'; there are train"):
        prompts_of(tmp_path, subset="one", split="val")


def test_a_single_file_is_train_unless_its_name_says_otherwise(tmp_path):
    for name in ("pairs.jsonl", "test.jsonl", "hh_base_test.jsonl"):
        put(tmp_path, name, name)
    assert prompts_of(tmp_path / "pairs.jsonl") == ["pairs.jsonl"]
    with pytest.raises(DataError, match="whose name says no split: leave split out, or give a folder"):
        prompts_of(tmp_path / "pairs.jsonl", split="validation")
    with pytest.raises(DataError, match="is named as a split 'test', not 'train': set split to test"):
        prompts_of(tmp_path / "test.jsonl")
    assert prompts_of(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    assert prompts_of(tmp_path / "hh_base_test.jsonl", malformed := Malformed()) == ["hh_base_test.jsonl"]
    assert malformed.changed == {"file hh_base_test.jsonl read as split 'train'": 1}
    put(tmp_path, "train_prefs.jsonl", "a")
    for split in ("train", "train_prefs"):
        assert prompts_of(tmp_path / "train_prefs.jsonl", split=split) == ["a"]
    with pytest.raises(DataError, match="named as a split 'train_prefs', not 'train_sft'"):
        prompts_of(tmp_path / "train_prefs.jsonl", split="train_sft")
    with pytest.raises(DataError, match="is one file, which has no subset 'all'"):
        prompts_of(tmp_path / "pairs.jsonl", subset="all")


def test_rows_that_name_another_split_are_left_out(tmp_path, monkeypatch):
    """As in HelpSteer2-preference, whose one file holds both splits."""
    rows = [unified(prompt=name) | {"split": name} for name in ("train", "validation", "valid1", "east")]
    file = write(tmp_path / "preference.jsonl", *rows)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    assert prompts_of(file, malformed := Malformed()) == ["train", "east"]
    assert malformed.changed == {"row of split 'validation' not read": 1, "row of split 'valid1' not read": 1}
    assert prompts_of(file, split="validation") == ["validation", "valid1", "east"]
    for part in ("train[:2]", "train+east"):
        assert [p for p in prompts_of("owner/set", split=part)] == ["train", "east"]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "pairs.jsonl", *rows)
    assert prompts_of(folder, split="validation") == ["validation", "valid1", "east"]
    with pytest.raises(DataError, match="named as a split 'validation', not 'test'"):
        prompts_of(write(tmp_path / "validation.jsonl", *rows), split="test")


def test_what_datasets_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list([unified(prompt=name)]) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    assert prompts_of(tmp_path / "both", split="test") == ["test"] and prompts_of(tmp_path / "one") == ["train"]
    with pytest.raises(DataError, match="no split 'val'; there are test, train"):
        prompts_of(tmp_path / "both", split="val")
    with pytest.raises(DataError, match="no split 'test'; there are train"):
        prompts_of(tmp_path / "one", split="test")
    assert prompts_of(tmp_path, subset="both") == ["train"]
    whole = [row for table in local_tables(tmp_path / "both", Malformed()) for row in table.rows]
    assert len(whole) == 2


def test_files_of_no_split_are_named(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        put(tmp_path, name, name)
    assert prompts_of(tmp_path, malformed := Malformed()) == ["train.jsonl"]
    assert malformed.changed == {"file more.jsonl not read, as it is of no split": 1}


def test_broken_lines_are_counted_with_file_and_row(tmp_path):
    for part in ("one", "two"):
        put(tmp_path, f"{part}/train.jsonl.gz", "a")
    packed = tmp_path / "two" / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{broken\n" + gzip.decompress(packed.read_bytes())))
    assert prompts_of(tmp_path, malformed := Malformed()) == ["a", "a"]
    assert malformed.rows == [{"reason": "not JSON", "where": "two/train.jsonl.gz row 1"}]


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        prompts_of(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"notes.txt: neither a .jsonl"):
        prompts_of(tmp_path)


def test_a_data_directory_of_the_hub_is_a_subset_too(monkeypatch):
    import datasets

    def load_dataset(path, name=None, data_dir=None, split=None, revision=None):
        if name is not None:
            raise ValueError(f"BuilderConfig '{name}' not found. Available: ['default']")
        return datasets.Dataset.from_list([unified(prompt=f"{path}/{data_dir}/{split}")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts_of("nvidia/HelpSteer2", subset="preference") == ["nvidia/HelpSteer2/preference/train"]
