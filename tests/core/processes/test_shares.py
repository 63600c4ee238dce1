"""Work that processes divide as files: who makes which, and what becomes of them."""

import threading
import time

import pytest

from core.errors import ArtefactError
from core.files import concatenate_tables, read_table, write_table
from core.shares import Share, remove_shards, shard_file


def make(share: Share, table, count: int) -> list[int]:
    """The shards that a process makes: two rows each."""
    made = share.missing(table, count)
    for number in made:
        shard_file(table, number).parent.mkdir(parents=True, exist_ok=True)
        write_table(shard_file(table, number), [{"shard": number, "row": row, "of": None} for row in range(2)])
    return made


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_every_shard_has_one_process_and_none_has_two_more_than_another(count, ranks):
    parts = [list(Share(rank, ranks).of(count)) for rank in range(ranks)]
    assert sorted(sum(parts, [])) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_table_is_the_same_whoever_made_its_shards(tmp_path):
    """Two processes are killed; three go on, and none makes again what is there."""
    alone, table = tmp_path / "alone.parquet", tmp_path / "several.parquet"
    make(Share(), alone, 7)
    Share().make_whole(alone, 7, title="")
    assert make(Share(1, 2), table, 4) == [1, 3]  # the second of two processes, before they were killed
    assert [make(Share(rank, 3), table, 7) for rank in range(3)] == [[0, 6], [4], [2, 5]]
    Share(1, 3).make_whole(table, 7, title="")
    assert not table.exists()  # the first process does it
    Share(0, 3).make_whole(table, 7, title="")
    assert table.read_bytes() == alone.read_bytes()
    assert [row["shard"] for row in read_table(table)] == [n for n in range(7) for _ in range(2)]
    assert shard_file(table, 0).exists()  # another process may be reading them
    remove_shards([table])
    assert not shard_file(table, 0).parent.exists() and make(Share(1, 2), table, 7) == []


def test_the_first_process_waits_for_the_shards_of_the_others(tmp_path):
    table = tmp_path / "table.parquet"
    make(Share(0, 2), table, 3)

    def other() -> None:
        time.sleep(0.5)
        make(Share(1, 2), table, 3)

    threading.Thread(target=other).start()
    Share(0, 2).make_whole(table, 3, title="")
    assert [row["shard"] for row in read_table(table)] == [0, 0, 1, 1, 2, 2]


def test_a_column_without_values_in_one_shard_has_the_type_of_the_others(tmp_path):
    write_table(tmp_path / "a.parquet", [{"tokenizer": None, "ids": []}])
    write_table(tmp_path / "b.parquet", [{"tokenizer": "abc", "ids": [1]}])
    concatenate_tables([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "whole.parquet")
    assert read_table(tmp_path / "whole.parquet") == [{"tokenizer": None, "ids": []}, {"tokenizer": "abc", "ids": [1]}]


def test_a_damaged_shard_is_named(tmp_path):
    write_table(tmp_path / "a.parquet", [{"x": 1}])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(ArtefactError, match=r"b.parquet is damaged .*delete it, and it is made again"):
        concatenate_tables([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "whole.parquet")
    write_table(tmp_path / "b.parquet", [{"y": 1}])
    with pytest.raises(ArtefactError, match="b.parquet has other columns than"):
        concatenate_tables([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "whole.parquet")
    assert not (tmp_path / "whole.parquet").exists()


def test_processes_without_work_are_told_of_with_what_mends_it(capsys):
    Share(0, 8).advise("bon.shard_prompts", 180, 3)
    said = capsys.readouterr().err
    assert "180 prompts are 3 shards, so 5 of 8 processes have nothing to do" in said
    (size,) = [int(word.partition("=")[2]) for word in said.split() if word.startswith("bon.shard_prompts=")]
    assert -(-180 // size) >= 8
    Share(0, 8).advise("eval.shard_prompts", 180, 1, tables=3)
    (size,) = [
        int(word.partition("=")[2])
        for word in capsys.readouterr().err.split()
        if word.startswith("eval.shard_prompts=")
    ]
    assert 3 * -(-180 // size) >= 8
    Share(1, 8).advise("bon.shard_prompts", 180, 3)  # the first process says it
    Share(0, 8).advise("bon.shard_prompts", 180, 8)
    assert capsys.readouterr().err == ""


def test_a_damaged_shard_is_found_before_any_other_is_made(tmp_path):
    """And by the process whose shard it is alone."""
    table = tmp_path / "t.parquet"
    for number in range(3):
        shard_file(table, number).parent.mkdir(exist_ok=True)
        write_table(shard_file(table, number), [{"x": number}])
    shard_file(table, 1).write_bytes(shard_file(table, 1).read_bytes()[:-9])
    with pytest.raises(ArtefactError, match=r"shard-0001.parquet is damaged .*delete it, and it is made again"):
        Share(1, 2).missing(table, 6)
    assert Share(0, 2).missing(table, 6) == [4]
