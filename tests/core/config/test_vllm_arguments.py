"""`generation.vllm.overrides`: what is refused, and by which words."""

import dataclasses
import subprocess
import sys

import pytest

from core.config import Vllm, vllm_arguments
from core.config.fields import field_of
from core.config.load import load
from core.errors import ConfigError
from tests.builders.processes import ROOT

KEY = "generation.vllm.overrides"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("max_num_batched_token", "max_num_batched_tokens"),
        ("enable_prefix_cache", "enable_prefix_caching"),
        ("kv-cache-dtype", "kv_cache_dtype"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("_api_process_count", None),
        ("zzz", None),
    ],
)
def test_unknown_arguments_are_refused_with_the_nearest(wrong, meant):
    with pytest.raises(ConfigError, match=f"{KEY}: {wrong} is no argument of vLLM's engine") as refused:
        load([], [f"{KEY}={{max_num_batched_tokens: 64, {wrong}: 1}}"])
    assert ("the nearest is" in str(refused.value)) == bool(meant)
    assert not meant or str(refused.value).endswith(f"the nearest is {meant}")


def test_every_fault_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        load([], [f"{KEY}={{logprobs_mode: raw_logits, dtype: half, zzz: 1}}", "ppo.rollout=1"])
    lines = str(refused.value).splitlines()[1:]
    assert len(lines) == 4 and "ppo.rollout" in "".join(lines)
    assert any("logprobs_mode cannot be changed: log-probs must be those of" in line for line in lines)
    assert any(f"{KEY}: dtype follows from generation.vllm.dtype: set that" in line for line in lines)


def test_a_typo_brings_no_other_fault():
    """The rest of the section stays as it is while the other rules are checked."""
    longer = ["data.max_prompt_tokens=2000", "generation.vllm.max_model_len=4096"]
    with pytest.raises(ConfigError) as refused:
        load([], [*longer, f"{KEY}={{kv_cache_type: fp8}}"])
    assert len(str(refused.value).splitlines()) == 2
    assert load([], longer)


def test_what_is_refused_is_an_argument_and_what_it_follows_from_a_key():
    names = {*vllm_arguments.OWN_KEYS, *vllm_arguments.RELIED_ON, *vllm_arguments.PARALLEL}
    assert names <= vllm_arguments.engine_arguments()
    assert all(field_of(key) for key in vllm_arguments.OWN_KEYS.values())
    assert not set(vllm_arguments.OWN_KEYS) & set(vllm_arguments.RELIED_ON)
    for name in [*vllm_arguments.OWN_KEYS, *vllm_arguments.RELIED_ON]:
        with pytest.raises(ValueError, match=f"{name} (follows from|cannot be changed)"):
            Vllm(overrides={name: None})


@pytest.mark.slow
def test_the_names_are_those_of_vllm():
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs) if not field.name.startswith("_")}
    assert vllm_arguments.engine_arguments() == names


def test_vllm_is_not_imported_for_it():
    program = (
        "import sys; from core.config import Vllm; Vllm(overrides={'max_num_batched_tokens': 64});"
        "print({'vllm', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_without_vllm_names_are_not_judged(monkeypatch):
    monkeypatch.setattr(vllm_arguments, "engine_arguments", frozenset)
    assert Vllm(overrides={"of_another_version": 1}).overrides
    with pytest.raises(ValueError, match="cannot be changed"):
        Vllm(overrides={"logprobs_mode": "raw_logits"})
