"""Tables on disk become the pools of their rows, column by column, in whatever order they are."""

import numpy as np
import pytest

from bon.pools import from_tables
from bon.scores import pools_of_files
from core.errors import ArtefactError
from core.files import digest, write_table


@pytest.fixture
def tables(tmp_path):
    """Samples and scores of three prompts with four samples each, shuffled apart."""
    rng = np.random.default_rng(0)
    samples = [
        {"prompt_id": f"p{p}", "sample_id": 10 * k, "prompt": [{"role": "system", "content": "s"},
         {"role": "user", "content": f"q{p}"}], "response": f"answer {p} {k}" * (k + 1), "n_tokens": 3 + k,
         "logp_sampler": -float(k)}
        for p in range(3) for k in range(4)
    ]  # fmt: skip
    found = {"samples": samples}
    for name in ("gold", "one", "two"):
        found[name] = [
            {"prompt_id": s["prompt_id"], "sample_id": s["sample_id"], "text_sha": digest(s["response"]),
             "score": float(rng.normal())}
            for s in samples
        ]  # fmt: skip
    for rows in found.values():
        rng.shuffle(rows)
    return found


def written(folder, tables):
    for name, rows in tables.items():
        write_table(folder / f"{name}.parquet", rows)
    files = {name: folder / f"{name}.parquet" for name in tables}
    return files.pop("samples"), files.pop("gold"), files


def test_files_give_the_pools_of_their_rows(tmp_path, tables):
    found = pools_of_files(*written(tmp_path, tables))
    rows = from_tables(tables["samples"], tables["gold"], {name: tables[name] for name in ("one", "two")})
    by_id = {(r["prompt_id"], r["sample_id"]): r["score"] for r in tables["two"]}
    np.testing.assert_array_equal(found.proxies["two"], [[by_id[f"p{p}", 10 * k] for k in range(4)] for p in range(3)])
    for pools in (found, rows):
        assert pools.prompts == ("q0", "q1", "q2") and pools.responses[2][3] == "answer 2 3" * 4
        np.testing.assert_array_equal(pools.length, [[3, 4, 5, 6]] * 3)
        np.testing.assert_array_equal(pools.logp, [[0, -1, -2, -3]] * 3)
    np.testing.assert_array_equal(found.gold, rows.gold)
    np.testing.assert_array_equal(found.proxies["one"], rows.proxies["one"])


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (
            "one",
            lambda rows: [rows[0] | {"text_sha": digest("other")}, *rows[1:]],
            "scores of one: 1 ids name different",
        ),
        ("one", lambda rows: rows[1:], "scores of one: .* 1 rows without a partner .*, 0 partners unused, 0 duplicate"),
        ("two", lambda rows: [*rows, rows[0]], "scores of two: .* 0 rows without a partner .* 1 duplicate ids"),
        ("two", lambda rows: [*rows, rows[0] | {"prompt_id": "x"}], "scores of two: .* 1 partners unused"),
        ("samples", lambda rows: [*rows, rows[0]], "ragged: 4 to 5 samples"),
        ("samples", lambda rows: [rows[1] if r["sample_id"] == 0 else r for r in rows], "doubled|ragged"),
    ],
)
def test_files_that_do_not_join_are_refused(tmp_path, tables, table, change, message):
    tables[table] = change(tables[table])
    with pytest.raises(ArtefactError, match=message):
        pools_of_files(*written(tmp_path, tables))
