"""Spoils rank 1 of a stage at a moment of its run; Python imports this file first where its folder is on PYTHONPATH.

GRM_TEST_FAULT=KIND:PHASE:STEP, where KIND is kill (SIGKILL), stop (SIGSTOP) or nan (a number of an adapter).
"""

import os

if os.environ.get("RANK") == "1" and (fault := os.environ.get("GRM_TEST_FAULT")):
    import math
    import signal
    import sys

    from core import whereabouts

    kind, phase, step = fault.split(":")
    real = whereabouts.enter

    def poison(trainer):
        weight = next(w for name, w in trainer.actor.module.named_parameters() if "lora_B" in name)
        for held in (weight.data, getattr(weight, "ds_tensor", weight).data):  # small ones are whole on every rank too
            held.view(-1)[:1] = math.nan

    def enter(name, number=0):
        real(name, number)
        if (name, number) != (phase, int(step)):
            return
        if kind == "nan":
            poison(sys._getframe(1).f_locals["self"])
        else:
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    whereabouts.enter = enter
