"""Two torchrun agents with one rank each, as on two nodes, on this machine: the whole of PPO, and the loss of one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from core import whereabouts
from core.ranks import free_port
from tests.builders.inputs.tiny_run import copy_of, same
from tests.builders.processes import GRM, ROOT, background, wait_for

pytestmark = pytest.mark.slow


def agents(config: Path, stack: ExitStack) -> list:
    """Two of them, with the cores of this machine between them, so that each rank has as many threads as above."""
    port, made = free_port(), []
    cores = sorted(os.sched_getaffinity(0))
    for node in range(2):
        mine = ",".join(map(str, cores[node::2] or cores))
        command = [
            "taskset", "-c", mine, *GRM, "torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "tiny", "--local-addr", "127.0.0.1",
            "--rdzv-conf", f"is_host={str(node == 0).lower()}", "--", "ppo", "--config", config,
        ]  # fmt: skip
        log = config.with_name(f"node-{node}.log")
        made.append(stack.enter_context(background(*command, log=log, env={"PYTHONPATH": str(ROOT)})))
    return made


def places(config: Path) -> dict[int, whereabouts.Place]:
    return whereabouts.read(whereabouts.folder_of(config.parent / "tiny", "ppo"))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("taskset") is None, reason="no taskset")
def test_two_agents_come_to_the_result_of_one_and_survive_the_loss_of_one(whole, tmp_path):
    config = copy_of(whole, tmp_path)
    with ExitStack() as stack:
        both = agents(config, stack)
        wait_for(lambda: getattr(places(config).get(1), "step", 0) >= 2, both[0])
        number = [agent.pid for agent in both].index(parent_of(places(config)[1].pid))
        both[number].send_signal(signal.SIGKILL)
        assert both[1 - number].wait(300) != 0
    said = (tmp_path / f"node-{1 - number}.log").read_text()
    # Its rank got SIGTERM from the system, so that the run stops after a step; or it was lost before that.
    assert "(SIGTERM on rank 1)" in said or "rank 1 has ended in phase" in said or "rank 1 is lost in phase" in said, (
        said
    )
    assert "Traceback" not in said, said[-4000:]
    with ExitStack() as stack:
        both = agents(config, stack)
        assert [agent.wait(600) for agent in both] == [0, 0], [p.read_text()[-3000:] for p in tmp_path.glob("*.log")]
    assert same(tmp_path / "tiny", whole / "tiny")
