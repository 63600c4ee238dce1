"""A run that is given more steps: continued from its last state where it would have come to that state anyway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core.config import Optim, Ppo
from core.training.saved import last_step
from core.training.schedule import same_until


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
