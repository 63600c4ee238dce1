"""Named random streams: every draw has a name, so none depends on how many came before it."""

from __future__ import annotations

import hashlib


def unit_interval(key: str, salt: str = "") -> float:
    """A number in [0, 1) fixed by `key`; independent of every other key, so splits never reshuffle."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{key}".encode()).digest()[:8], "big") / 2**64


def stream_seed(seed: int, *name: object) -> int:
    """Seed of a named random stream (`stream_seed(cfg.run.seed, "ppo", "rollout", step)`), below 2^31."""
    return int(unit_interval(repr(name), salt=str(seed)) * 2**31)
