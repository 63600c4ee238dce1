"""The table and README.md's numbers are made from the JSON."""

import copy
import json

from benchmarks import page, readme, records
from benchmarks.records import Record, Side
from benchmarks.statistics import Run, rate, ratios, spread


def side(name: str, runs: list[Run]) -> Side:
    return {
        "name": name,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "settings": {"dtype": "bfloat16", "threads": 2},
        "runs": runs,
        "seconds": spread([run["seconds"] for run in runs]),
        "rate": spread([rate(run) for run in runs]),
        "results": {"losses": [0.69]},
    }


def record(**changes) -> Record:
    """Ours takes 2, 2 and 4 s for 16 pairs, theirs 6, 8 and 8 s: ratios of 3, 4 and 2."""
    ours: list[Run] = [{"seconds": s, "work": 16} for s in (2.0, 2.0, 4.0)]
    theirs: list[Run] = [{"seconds": s, "work": 16} for s in (6.0, 8.0, 8.0)]
    made: Record = {
        "title": "Reward model training", "unit": "pairs", "ratio_of": "faster", "reach": 3.0, "inputs": "48 pairs",
        "same": "weights", "differs": "padding", "command": "python -m benchmarks --only rm-full",
        "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789", "others_cpu": 0.02, "seconds": 61.0,
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 16.0, "matrix_instructions": ["avx512_bf16"],
                    "dtype": "bfloat16", "gpu": None},
        "ours": side("grm-rlhf", ours), "theirs": side("TRL", theirs),
        "ratio": spread(ratios(ours, theirs, "faster")),
        "agreement": [{"what": "loss of the first batch", "ok": True, "detail": "0.69 and 0.69"}],
    }  # fmt: skip
    made = copy.deepcopy(made)
    made.update(changes)  # type: ignore[typeddict-item]
    return made


def failed(error: str) -> Record:
    """Ours was measured, theirs was not."""
    made = record(error=error)
    for key in ("theirs", "ratio", "agreement"):
        del made[key]  # type: ignore[misc]
    return made


def test_a_row_has_rates_ratio_and_spread():
    """16 pairs in 2, 2, 4 s are 8, 8, 4 pairs a second; theirs 2.67, 2, 2."""
    (row,) = (line for line in page.markdown({"rm": record()}).splitlines() if line.startswith("| Reward"))
    assert row == "| Reward model training | 8.00 pairs/s | 2.00 pairs/s | 3.00x [2.00 to 4.00] | 3x | 3 |"


def test_a_row_says_how_it_was_measured():
    text = page.markdown({"rm": record()})
    for words in (
        "torch 2.13.0+cpu", "threads 2", "Some CPU, 2 cores, avx512_bf16, bfloat16", "48 pairs", "commit 0123456789",
        "`python -m benchmarks --only rm-full`", "Agrees: loss of the first batch: 0.69 and 0.69", "61 s",
        "Not equal: padding",
    ):  # fmt: skip
        assert words in text
    assert "busy" not in text and "isagree" not in text


def test_a_busy_machine_is_marked_everywhere():
    busy = record(others_cpu=0.4)
    row = next(line for line in page.markdown({"rm": busy}).splitlines() if line.startswith("| Reward"))
    assert "(busy machine)" in row
    assert (
        "40%" in page.markdown({"rm": busy})
        and "40%" in page.line("rm", busy)
        and "40%" in readme.section({"rm": busy})
    )


def test_sides_that_disagree_are_marked():
    wrong = record(agreement=[{"what": "rewards", "ok": False, "detail": "1 and 2"}])
    assert "(the sides disagree)" in page.markdown({"rm": wrong}) and "**Disagrees**: rewards" in page.markdown(
        {"rm": wrong}
    )
    assert "DISAGREE on rewards" in page.line("rm", wrong)


def test_a_peer_that_failed_has_a_row_that_says_why():
    text = page.markdown({"rm": record(), "ppo": failed("no .venv-peers/x: `make bench PEERS=1`")})
    assert "| Reward model training | 8.00 pairs/s | not measured | | 3x | |" in text
    assert "**Not compared:** no .venv-peers/x" in text
    assert "no .venv-peers/x" in page.line("ppo", failed("no .venv-peers/x"))
    assert readme.section({"ppo": failed("x"), "rm": record()}).count("pairs/s") == 2  # one row: ours and theirs


def test_what_is_reached():
    assert page.reached(record()) and not page.reached(record(reach=3.5))
    assert "| 4x, missed by 25% |" in page.markdown({"rm": record(reach=4.0)})
    cost = record(ratio_of="cost", reach=1.03, ratio=spread([1.02, 1.03, 1.06]))
    assert page.reached(cost) and not page.reached(cost | {"ratio": spread([1.04])})
    assert "| at most 1.03x |" in page.markdown({"grm": cost})


def test_results_survive_the_file(tmp_path):
    file = tmp_path / "deep" / "results.json"
    assert records.read(file) == {}
    records.write(file, {"rm": record(), "ppo": failed("x")})
    assert records.read(file) == {"rm": record(), "ppo": failed("x")}
    assert list(json.loads(file.read_text())["rows"]) == ["rm", "ppo"]


def test_readme_is_written_between_its_marks(tmp_path):
    records.write(tmp_path / "results.json", {"rm": record()})
    page_ = tmp_path / "README.md"
    page_.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.write(page_, tmp_path / "results.json") == 0
    text = page_.read_text()
    assert readme.written(text) == readme.section({"rm": record()}) and "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "3.00x [2.00 to 4.00]" in text
    page_.write_text("no marks")
    assert readme.write(page_, tmp_path / "results.json") == 1 and page_.read_text() == "no marks"
