"""Named random streams: every draw has a name, so none depends on how many draws came before it."""

from __future__ import annotations

import hashlib


def unit_interval(key: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on `key` and `salt` alone, so splits stay the same when keys are added."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{key}".encode()).digest()[:8], "big") / 2**64


def stream_seed(seed: int, *name: object) -> int:
    """Seed of a named random stream (`stream_seed(cfg.run.seed, "ppo", "rollout", step)`), below 2^31."""
    return int(unit_interval(repr(name), salt=str(seed)) * 2**31)
