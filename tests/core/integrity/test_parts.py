"""Unfinished work that is continued is what was written, or is made again."""

import numpy as np
import pytest

from core.artefacts import Fingerprint, open_partial, publish, read_manifest
from core.config import Model
from core.data.chat import ChatTokenizer
from core.files import read_table
from core.generation.local import Completion
from core.generation.pool import sample_pool
from core.parts import drop_damaged, seal, write_part
from tests.builders.inputs.fuzz import cases, damaged


def test_a_damaged_part_is_deleted_and_said(tmp_path, capsys):
    part = tmp_path / "samples" / "shard.parquet"
    write_part(part, lambda file: file.write_bytes(b"rows"))
    assert part.read_bytes() == b"rows" and drop_damaged(tmp_path) == [] and capsys.readouterr().err == ""
    part.write_bytes(b"rowt")
    assert drop_damaged(tmp_path) == [part] and not part.exists()
    assert capsys.readouterr().err == f"{part} is not what was written: it is made again\n"
    part.write_bytes(b"rows")
    assert drop_damaged(tmp_path) == [] and part.exists(), "of an earlier version, which left no digest"


def test_a_kill_between_digest_and_part_costs_the_part(tmp_path):
    part = tmp_path / "shard.parquet"

    def killed(file):
        file.write_bytes(b"ro")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(part, killed)
    assert not part.exists() and drop_damaged(tmp_path) == []
    write_part(part, lambda file: file.write_bytes(b"rows"))
    part.unlink()  # its digest alone is left
    assert drop_damaged(tmp_path) == [] and not list(tmp_path.iterdir())


def test_a_folder_is_a_part_with_all_files_in_it(tmp_path):
    part = tmp_path / "grm"
    changes = (lambda: (part / "a").unlink(), lambda: (part / "c").touch(), lambda: (part / "a").write_text("y"))
    for change in changes:
        part.mkdir()
        (part / "a").write_text("x")
        seal(part)
        assert drop_damaged(tmp_path) == []
        change()
        assert drop_damaged(tmp_path) == [part] and not part.exists()


def test_a_digest_that_is_damaged_costs_the_part_and_no_wrong_result(tmp_path):
    part, mark = tmp_path / "part", tmp_path / ".part.whole"
    for rng in cases("digest", 50):
        write_part(part, lambda file: file.write_bytes(b"rows"))
        whole = mark.read_bytes()
        mark.write_bytes(damaged(rng, whole))
        expected = [] if mark.read_bytes() == whole else [part]
        assert drop_damaged(tmp_path) == expected and part.exists() == (not expected)


def test_digests_are_not_published(tmp_path):
    fingerprint = Fingerprint({})
    partial = open_partial(tmp_path / "bon", fingerprint)
    write_part(partial / "scores" / "a.txt", lambda file: file.write_text("1"))
    (partial / "scores" / ".b.parquet.part.tmp").touch()  # what a kill has left
    publish(partial, tmp_path / "bon", "bon", fingerprint, seed=0, seconds=1, metrics={})
    assert [o["path"] for o in read_manifest(tmp_path / "bon")["outputs"]] == ["scores/a.txt"]
    assert {p.name for p in (tmp_path / "bon" / "scores").iterdir()} == {"a.txt"}


class Sampler:
    """Draws numbers in place of responses, by the seed that it is given."""

    def __init__(self):
        self.calls = 0

    def close(self):
        pass

    def generate(self, prompts, *, n, seed, **_):
        self.calls += 1
        rng = np.random.default_rng(seed)
        return [[Completion([int(i)], [-1.0], f"{i}", True) for i in rng.integers(9, 99, n)] for _ in prompts]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_pool_is_the_same_where_a_shard_was_damaged(tokenizer_path, tmp_path, damage):
    """A Parquet file with one bit flipped can still be read, as other numbers."""
    tokenizer = ChatTokenizer(Model(path=str(tokenizer_path)))
    rows = [{"prompt_id": f"p{i}", "split": "eval", "prompt": [{"role": "user", "content": f"{i}"}]} for i in range(6)]

    def draw(out, sampler):
        drop_damaged(out)
        return sample_pool(
            lambda: sampler, tokenizer, rows, 2, out=out, shard_prompts=2, seed=1, name="bon"
        ).whole()  # fmt: skip

    expected = draw(tmp_path / "unbroken", Sampler())

    class Killed(Sampler):
        def generate(self, prompts, **given):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().generate(prompts, **given)

    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "killed", Killed())
    shard = tmp_path / "killed" / "samples" / "shard-0000.parquet"
    content = bytearray(shard.read_bytes())
    at = content.index(expected[0]["response"].encode())
    content[at] ^= 1
    shard.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])
    if damage == "flip":
        assert read_table(shard)[0]["response"] != expected[0]["response"], "which nothing else would have seen"
    sampler = Sampler()
    assert draw(tmp_path / "killed", sampler) == expected and sampler.calls == 2
