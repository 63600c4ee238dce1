"""Every shipped file loads; every mistake is named."""

import json
import re
import typing

import pytest
from pydantic import BaseModel

from core.config import ENGINE_STAGES, Config, Ensemble, Lora, PreferenceSource, RewardVariant
from core.config.load import load
from core.errors import ConfigError
from tests.builders.processes import ROOT
from tests.builders.shipped.twins import RUN_AS_THEY_ARE, TWINS


@pytest.mark.parametrize("files", [t.paths for t in TWINS] + [[ROOT / "configs" / f] for f in RUN_AS_THEY_ARE], ids=str)
def test_shipped_configs_load(files):
    cfg = load(files)
    assert cfg.ppo.proxy in cfg.rm.variants
    for stage in ENGINE_STAGES:
        processes = cfg.engine_of(stage).processes
        assert cfg.batch_faults(stage, 1 if processes == "auto" else processes) == []


def test_all_faults_in_one_message():
    with pytest.raises(ConfigError) as error:
        load([], ["ppo.kl.coeff=0.1", "rm.optim.lr=fast", "bon.samples=4", "bon.n_max=9", "ppo.proxy=x",
                  "engine.processes=2", "ppo.rollouts=9", "rm.variants.grm.alfa=2"])  # fmt: skip
    message = str(error.value)
    for part in (
        "ppo.kl.coeff: no such key (got 0.1); the nearest is ppo.kl.coef",
        "rm.variants.grm.alfa: no such key (got 2); the nearest is rm.variants.grm.alpha",
        "rm.optim.lr", "'fast'",
        "bon: n_max 9 exceeds the pool of 4 samples",
        "ppo.proxy 'x' is none of rm.variants (grm, bt)",
        "ppo.rollouts 9 is not divisible by",
    ):  # fmt: skip
        assert part in message


def test_a_value_in_place_of_a_section_names_its_keys():
    with pytest.raises(ConfigError, match=r"ppo\.kl: is a section with coef, .*stop, not 0\.1") as error:
        load([], ["ppo.kl=0.1", "rm=3"])
    assert re.search(r"rm: is a section with base, .*, not 3", str(error.value))


def test_files_overlay_and_overrides(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("ppo: {kl: {coef: 0.3}, steps: 7}\nrm: {variants: {grm: {text_regulariser: sft}}}\n")
    b.write_text("ppo: {steps: 9}\n")
    cfg = load([a, b], ["rm.optim.lr=1e-6", "rm.variants.grm.alpha=0.5"])
    assert (cfg.ppo.kl.coef, cfg.ppo.steps, cfg.rm.optim.lr) == (0.3, 9, 1e-6)
    assert list(cfg.rm.variants) == ["grm"]
    assert cfg.rm.variants["grm"].alpha == 0.5 and cfg.rm.variants["grm"].text_regulariser == "sft"


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [", "not valid YAML"), ("- 1", "must hold a mapping"), ("ppo: {steps: 1}\nppo: {steps: 2}", "stands twice")],
)
def test_bad_files(tmp_path, text, part):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=part) as error:
        load([file])
    assert "bad.yaml" in str(error.value)


def test_overrides_keep_the_default_variants():
    cfg = load([], ["rm.variants.grm.alpha=0.2"])
    assert list(cfg.rm.variants) == ["grm", "bt"] and cfg.rm.variants["grm"].text_regulariser == "sft"


def test_frozen_and_documented_by_name():
    with pytest.raises(Exception, match="frozen"):
        Config().run.seed = 2

    def sections(kind):
        yield kind
        for field in kind.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from sections(field.annotation)

    assert all(kind.model_config["extra"] == "forbid" for kind in sections(Config))


def test_every_field_is_explained():
    """Through lists, mappings and unions: `grm config --explain` and docs/configuration.md show these docstrings."""

    def sections(annotation):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return {annotation}.union(*(sections(field.annotation) for field in annotation.model_fields.values()))
        return set().union(*(sections(part) for part in typing.get_args(annotation)))

    reached = sections(Config)
    assert {RewardVariant, PreferenceSource, Lora, Ensemble} <= reached
    bare = [f"{s.__name__}.{n}" for s in reached for n, field in s.model_fields.items() if not field.description]
    assert sorted(bare) == []


def test_no_field_is_dead():
    """Every leaf of the tree is read somewhere outside `core.config`."""
    packages = ("core", "rm", "sft", "bon", "ppo", "pipelines", "study")
    files = [p for d in packages for p in (ROOT / d).rglob("*.py") if p.parent != ROOT / "core" / "config"]
    source = "".join(p.read_text() for p in files)

    def leaves(kind):
        for name, field in kind.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from leaves(field.annotation)
            else:
                yield name

    # Splits are read by name; run.dir and engine.shard_gib by properties of core.config.
    by_name = {"rm_train", "rm_val", "rl_train", "calibration", "eval", "dir", "shard_gib"}
    dead = [n for n in set(leaves(Config)) - by_name if not re.search(rf"\.{n}\b", source)]
    assert dead == []


def test_policy_and_reward_models_on_one_base_read_the_same_tokens():
    """Otherwise the difference would show only when reward models are trained and PPO refuses them."""
    with pytest.raises(ConfigError, match="policy.pad_token and rm.base.pad_token differ"):
        load([], ["policy.pad_token=<|endoftext|>"])
    load([], ["policy.pad_token=<|endoftext|>", "rm.base.pad_token=<|endoftext|>"])
    load([], ["policy.pad_token=<|endoftext|>", "rm.base.path=other/base"])


def test_one_stage_may_have_another_engine():
    common = ["engine.processes=2", "engine.overrides={zero_optimization: {reduce_bucket_size: 7}, steps_per_print: 1}"]
    own = ["ppo.engine={zero_stage: 2, offload: false, overrides: {zero_optimization: {reduce_bucket_size: 9}}}"]
    cfg = load([], [*common, "engine.offload=true", *own, "rm.engine.processes=1"])
    assert cfg.engine_of("rm") == cfg.engine.model_copy(update={"processes": 1})
    found = cfg.engine_of("ppo")
    assert (found.processes, found.zero_stage, found.offload, found.dtype) == (2, 2, False, cfg.engine.dtype)
    assert found.overrides == {"zero_optimization": {"reduce_bucket_size": 9}, "steps_per_print": 1}
    assert load([], common).engine_of("ppo") == load([], common).engine


def test_batches_must_divide_on_the_ranks_of_their_own_stage():
    load([], ["engine.processes=2", "rm.engine.processes=3", "rm.global_batch=24", "rm.micro_batch=4"])
    with pytest.raises(ConfigError, match=r"rm.global_batch 32 is not divisible by 3 ranks \(rm.engine.processes, or"):
        load([], ["engine.processes=2", "rm.engine.processes=3"])
    with pytest.raises(ConfigError, match="ppo.sync adapter rounds nothing.* engine.dtype is float32"):
        load([], ["ppo.sync=adapter", "ppo.engine.dtype=float32", "generation.vllm.dtype=bfloat16"])


def test_states_are_moved_while_sampling_only_where_they_are_on_the_gpu():
    load([], ["ppo.offload_while_sampling=true", "ppo.engine.zero_stage=2", "rm.engine.offload=true"])
    with pytest.raises(ConfigError, match="ppo.offload_while_sampling and engine.offload exclude each other"):
        load([], ["ppo.offload_while_sampling=true", "ppo.engine.offload=true"])
    with pytest.raises(ConfigError, match="DeepSpeed moves nothing at engine.zero_stage 0: take 1, 2 or 3"):
        load([], ["ppo.offload_while_sampling=true", "engine.zero_stage=0"])


def test_layers_are_compiled_below_stage_3_only():
    assert load([], ["engine.compile=true", "engine.zero_stage=2"]).engine_of("rm").compile
    with pytest.raises(ConfigError, match="compile needs layers whose weights are whole: set zero_stage to 2 or less"):
        load([], ["ppo.engine.compile=true"])


@pytest.mark.parametrize("stage", ENGINE_STAGES)
def test_a_wrong_key_of_a_stages_engine_is_named_with_the_nearest(stage):
    with pytest.raises(ConfigError, match=rf"{stage}.engine.zero_stag: no such key .*{stage}.engine.zero_stage"):
        load([], [f"{stage}.engine.zero_stag=2"])
    with pytest.raises(ConfigError, match=rf"{stage}.engine.zero_stage"):
        load([], [f"{stage}.engine.zero_stage=4"])


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc", "a/../b", "..", ".", "", "a//b", ".replaced/rm", "a\nb", "x" * 300]
)
def test_a_run_stays_in_its_folder(name):
    with pytest.raises(ConfigError, match="run.name"):
        load([], [f"run.name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", ".hidden"])
def test_a_reward_model_stays_in_the_folder_of_its_stage(name):
    with pytest.raises(ConfigError, match="rm.variants"):
        load([], [f"rm.variants={json.dumps({name: {}})}", f"ppo.proxy={json.dumps(name)}"])


def test_names_of_runs_may_have_folders():
    cfg = load([], ["run.name=study/policies/grm-1", "run.dir=/elsewhere/runs"])
    assert str(cfg.run_dir) == "/elsewhere/runs/study/policies/grm-1"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a: 2024-99-99", b"? [a]\n: 1", b"a: &a [*a]", b"{", b"\0", b"[" * 3000]
)
def test_a_config_file_that_is_no_yaml_is_named(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError):
        load([tmp_path / "bad.yaml"])


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: give a config file"):
        load([tmp_path])


@pytest.mark.parametrize("value", ["2024-99-99", "{", "[" * 3000, "!!python/object:os.system x", "? [a]\n: 1"])
def test_an_override_that_is_no_yaml_is_named(value):
    with pytest.raises(ConfigError, match="ppo.steps|not valid"):
        load([], [f"ppo.steps={value}"])


@pytest.mark.parametrize(
    "section", ["rm: 3", "rm: [1]", "rm: true", "ppo: 3", "rm: {variants: 3}", "rm: {variants: {grm: 3}}"]
)
def test_a_value_in_place_of_a_section_in_a_file(tmp_path, section):
    (tmp_path / "a.yaml").write_text(section)
    with pytest.raises(ConfigError, match="the configuration is not valid"):
        load([tmp_path / "a.yaml"])


def test_addresses_hold_no_passwords():
    """Manifests, reports and trackers show the configuration."""
    with pytest.raises(ConfigError, match="vllm_servers hold a user or a password"):
        load([], ["ppo.vllm_servers=[http://me:hush@node1:8000]"])


@pytest.mark.parametrize("key", ["engine.processes", "rm.engine.processes", "ppo.engine.processes"])
@pytest.mark.parametrize("value", ["0", "-1", "false"])
def test_no_number_of_ranks_below_one(key, value):
    with pytest.raises(ConfigError, match=key):
        load([], [f"{key}={value}"])
