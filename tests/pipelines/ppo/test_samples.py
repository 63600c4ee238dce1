"""`grm samples`: the responses of a step in a terminal."""

import json

import pytest

from core.files import write_table
from pipelines.__main__ import main

PROXY = [0.3, -1.5, 2.0, 0.1]


def write(folder, step, proxy=PROXY, **columns):
    """The table of a step of a run; each response says its own reward."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": step, "policy": step - 1, "prompt_id": f"p{i}",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {i}?"}],
            "response": f"reward\x1b[31m {p}\n" + "word " * 40,
            "token_ids": [5] * (i + 1), "n_tokens": i + 1, "finished": i != 2, "sampler_logprobs": [-1.0] * (i + 1),
            "logprobs": [-1.0] * (i + 1), "ref_logprobs": [-1.5] * (i + 1), "proxy": p, "reward": 10 * p,
            "advantage_mean": 0.0, "advantage_min": 0.0, "advantage_max": 0.0, **columns,
        }
        for i, p in enumerate(proxy)
    ]  # fmt: skip
    write_table(folder / "rollouts" / f"step-{step:06d}.parquet", rows)


@pytest.fixture
def samples(tmp_path, monkeypatch, capsys):
    """Calls the command for a run with steps 3 and 12; status, and lines of both outputs."""
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path / "ppo", 3, [9.0])
    write(tmp_path / "ppo", 12)

    def call(*arguments):
        status = main(["samples", str(tmp_path), *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_the_worst_come_first(samples):
    status, out, _ = samples("--worst", "--n", "2")
    assert status == 0 and out.startswith("step 12 of ") and "the 2 worst by proxy, 4 responses" in out
    assert "proxy -1.5 to 2, mean 0.225" in out
    assert out.index("reward [31m -1.5") < out.index("reward [31m 0.1") and "Question 2?" not in out
    assert "prompt p1 (after 1 earlier message): Question 1?" in out
    # sum of log pi - log pi_0 of two tokens that are half a nat more likely
    assert "#1  proxy -1.5  reward -15  kl 1  n_tokens 2  advantage_mean 0" in out
    assert all(len(line) <= 80 and "\x1b" not in line for line in out.splitlines()[1:])


def test_other_orders_steps_and_json(samples):
    _, out, _ = samples("--best", "--n", "1", "--json")
    (row,) = map(json.loads, out.splitlines())
    assert row["proxy"] == 2.0 and row["finished"] is False and row["kl"] == 1.5 and row["token_ids"] == [5, 5, 5]
    _, out, _ = samples("--json")
    assert [json.loads(line)["proxy"] for line in out.splitlines()] == PROXY  # as they were sampled
    _, out, _ = samples("--worst", "--by", "n_tokens", "--json")
    assert [json.loads(line)["n_tokens"] for line in out.splitlines()] == [1, 2, 3, 4]
    assert samples("--step", "3")[1].startswith("step 3 of ") and "(cut off)" in samples()[1]


def test_an_unfinished_run_is_read(samples, tmp_path):
    write(tmp_path / "ppo.partial", 1, [7.0])
    assert samples()[1].startswith("step 1 of ")


def test_what_is_not_there_is_said(samples, tmp_path, capsys):
    status, _, err = samples("--step", "40")
    assert status == 2 and "has no step 40: it has 3 to 12. A larger ppo.keep_rollouts_mib keeps more" in err
    status, _, err = samples("--by", "reward_function")
    assert status == 2 and "--by reward_function: this run's rollouts have proxy, reward, kl, n_tokens" in err
    assert main(["samples", str(tmp_path / "nothing")]) == 2 and "no rollouts" in capsys.readouterr().err
