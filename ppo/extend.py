"""A run that is given more steps: continued from its last state where it would have come to that state anyway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.artefacts import RESUME
from core.config import Optim, Ppo
from core.errors import ArtefactError
from core.files import digest, read_json, write_json
from core.training.schedule import same_until

LAST = "last.json"
"""File in the folder of resumable states; it names the last step whose state is whole."""
SEAL = "digest"
"""Key in that file: the digest of all else in it."""


def mark_state(out: Path, state: dict[str, Any]) -> None:
    """Say, after a state was written below `out`, that it is whole and what else belongs to it."""
    write_json(out / RESUME / LAST, {**state, SEAL: digest(state)})


def saved_state(out: Path, ranks: int) -> dict[str, Any]:
    """What `mark_state` wrote last below `out`; step 0 where it wrote nothing.

    Raises:
        ArtefactError: the state was written by another number of ranks, or the file is damaged.
    """
    mark = out / RESUME / LAST
    state: dict[str, Any] = read_json(mark) if mark.is_file() else {"step": 0}
    if state.pop(SEAL, None) not in (None, digest(state)):  # those of earlier versions have none
        raise ArtefactError(f"{mark} is damaged: delete {mark.parent} to start the stage again")
    if state["step"] and state["ranks"] != ranks:
        raise ArtefactError(
            f"{mark} was written by {state['ranks']} ranks and there are {ranks} now: "
            f"start as many (engine.processes), or delete {mark.parent} to start again"
        )
    return state


def last_step(folder: Path) -> int:
    """The step that a finished or unfinished folder can be continued after; 0 where it holds no state."""
    mark = folder / RESUME / LAST
    return int(read_json(mark)["step"]) if mark.is_file() else 0


def why_not(ppo: Ppo, folder: Path, old_steps: int) -> str | None:
    """Why a run of `old_steps` steps cannot be continued to `ppo.steps`; None where it can.

    It can where its learning rates so far are those of the longer run: the schedules depend on the number of steps.
    """
    step = last_step(folder)
    if step == 0:
        return "it kept no state to continue from (ppo.keep_state, ppo.save_every)"
    if step > ppo.steps:
        return f"its last state is that of step {step}, beyond ppo.steps={ppo.steps}"
    updates = ppo.epochs * ppo.minibatches
    roles: list[tuple[str, Optim, Callable[[int], int]]] = [
        ("actor", ppo.actor, lambda steps: max(0, steps - ppo.critic_warmup_steps) * updates)
    ]
    if ppo.estimator == "gae":
        roles.append(("critic", ppo.critic, lambda steps: steps * updates))
    for name, optim, optimiser_steps in roles:
        if not same_until(optim, optimiser_steps(step), optimiser_steps(old_steps), optimiser_steps(ppo.steps)):
            return (
                f"the learning rates of its first {step} steps would have been others: ppo.{name}.schedule "
                f"{optim.schedule} with ppo.{name}.warmup {optim.warmup:g} depends on ppo.steps"
            )
    return None
