"""Stage `sft` on a tiny model and two ranks, and the stages after it."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.artefacts import read_manifest
from core.files import read_rows, read_table
from core.stopping import EXIT_STOPPED
from tests.builders.policies import tiny_policy
from tests.builders.processes import GRM, ROOT, background, wait_for

DATA = ROOT / "examples" / "demonstrations.jsonl"


def grm(stage: str, config: Path, *overrides: str) -> str:
    """What `grm STAGE` says; a failed test with the end of its output."""
    done = subprocess.run(
        [*GRM, stage, "--config", str(config), *overrides], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{stage}\n{done.stdout[-1000:]}\n{done.stderr[-6000:]}"
    return done.stderr


def write_config(tokenizer: Path, folder: Path, **sft: object) -> Path:
    """A run in `folder` of a tiny policy, with a section `sft` and everything as small as the stages allow."""
    policy, config = tiny_policy("llama", tokenizer, folder / "base"), folder / "config.yaml"
    lines = (ROOT / "data" / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join(sorted(lines, key=len)[:200]))
    vllm = {"max_model_len": 192, "max_num_seqs": 16, "dtype": "float32", "cpu_kvcache_gib": 1}
    model = {"path": str(policy), "attention": "eager"}
    config.write_text(yaml.safe_dump({
        "run": {"name": "tiny", "dir": str(folder)}, "policy": model,
        "data": {"prompts": str(folder / "prompts.jsonl"), "max_prompt_tokens": 160, "system": "Answer in a sentence."},
        "sft": {
            "data": str(DATA), "epochs": 4, "global_batch": 8, "micro_batch": 2, "max_tokens": 192,
            "optim": {"lr": 5e-3}, "lora": {"rank": 8, "alpha": 16}, "save_every": 5, **sft,
        },
        "generation": {"max_new_tokens": 8, "vllm": vllm},
        "preferences": {"max_train_pairs": 16, "max_val_pairs": 8, "max_calibration_prompts": 4},
        "rm": {"base": model, "global_batch": 8, "micro_batch": 4, "max_tokens": 192, "variants": {"bt": {}}},
        "ppo": {
            "proxy": "bt", "lora": {"rank": 4, "alpha": 8}, "steps": 1, "rollouts": 4, "micro_batch": 1,
            "minibatches": 1, "critic_trainable_layers": 1,
        },
        "engine": {"processes": 2, "dtype": "float32"},
    }))  # fmt: skip
    return config


def plain_nll(folder: Path, rows: list[dict], system: str) -> float:
    """Mean NLL of the answers' tokens by transformers alone: its template, its model, its cross entropy."""
    hf = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": row["prompt"]}]
        before = hf.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer = hf(row["completion"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before + answer])
        labels = torch.tensor([[-100] * len(before) + answer])
        with torch.no_grad():
            total += float(lm(input_ids=ids, labels=labels).loss) * len(answer)
        count += len(answer)
    return total / count


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory) -> Path:
    """A run whose stage `sft` is finished; the folder with its configuration."""
    folder = tmp_path_factory.mktemp("sft")
    config = write_config(tokenizer_path, folder)
    grm("prompts", config)
    grm("sft", config)
    return folder


@pytest.mark.e2e
def test_two_ranks_lower_the_nll_of_the_demonstrations(run):
    """By a measurement of its own: transformers' template, model and loss on the saved folder."""
    out = run / "tiny" / "sft"
    rows = read_rows(out / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    manifest = read_manifest(out)
    train = manifest["metrics"]["demonstrations"]["train"]
    assert [row["step"] for row in steps] == list(range(1, 4 * (train // 8) + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert sum(row["loss"] for row in steps[-5:]) < sum(row["loss"] for row in steps[:5])
    held_out = [row["nll_held_out"] for row in rows if "nll_held_out" in row]
    assert len(held_out) == 5 and held_out[-1] < held_out[0]
    trained = {r["response"] for r in read_table(out / "demonstrations.parquet") if r["split"] == "train"}
    data = [row for row in read_rows(DATA) if row["completion"] in trained]
    before, after = (plain_nll(f, data, "Answer in a sentence.") for f in (run / "base", out / "policy"))
    assert len(data) == train and after < before - 0.5, (before, after)
    assert steps[0]["loss"] == pytest.approx(before, abs=0.5)
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert (
        not [name for name in files if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
        and (out / "tensorboard").is_dir()
    )


@pytest.mark.e2e
def test_the_loss_is_that_of_the_demonstrations_of_its_batch(run):
    """The first step's loss, a mean over the tokens of both ranks' passes, by transformers on the same rows."""
    from core.batching import in_epochs
    from core.data.streams import stream_seed

    out = run / "tiny" / "sft"
    rows = [r for r in read_table(out / "demonstrations.parquet") if r["split"] == "train"]
    first = in_epochs(len(rows), 8, [stream_seed(1, "sft", "order", 0)])[0]
    batch = [{"prompt": rows[i]["prompt"][-1]["content"], "completion": rows[i]["response"]} for i in first]
    logged = next(row["loss"] for row in read_rows(out / "metrics.jsonl") if row["step"] == 1)
    assert plain_nll(run / "base", batch, "Answer in a sentence.") == pytest.approx(logged, rel=1e-4)


@pytest.mark.e2e
def test_later_stages_sample_from_and_train_the_fine_tuned_policy(run):
    config = run / "config.yaml"
    for stage in ("preferences", "rm", "ppo"):
        grm(stage, config)
    status = grm_status(config)
    assert [line.split()[0] for line in status if "up to date" in line] == [
        "prompts",
        "sft",
        "preferences",
        "rm",
        "ppo",
    ]
    sampled = read_table(run / "tiny" / "preferences" / "samples.parquet")
    tuned, base = (logp(run / folder, sampled[:16]) for folder in ("tiny/sft/policy", "base"))
    found = torch.tensor([row["logp_sampler"] for row in sampled[:16]])
    assert (tuned - found).abs().max() < 1e-2 < (base - found).abs().max()
    (step,) = read_rows(run / "tiny" / "ppo" / "metrics.jsonl")
    assert step["mismatch_mean_abs"] < 1e-3 and step["kl_nats_per_response"] == 0.0
    rollouts = next((run / "tiny" / "ppo" / "rollouts").glob("*.parquet"))
    rows = read_table(rollouts)
    found = torch.tensor([sum(row["ref_logprobs"]) for row in rows])
    assert (logp(run / "tiny/sft/policy", rows) - found).abs().max() < 1e-2
    # Another fine-tuning makes everything that was sampled from the policy out of date, and not the prompts.
    changed = {line.split()[0]: line for line in grm_status(config, "sft.epochs=3")}
    assert "stale: sft.epochs: 4 -> 3" in changed["sft"] and "up to date" in changed["prompts"]
    assert all("stale" in changed[stage] for stage in ("preferences", "rm", "ppo"))


def grm_status(config: Path, *overrides: str) -> list[str]:
    done = subprocess.run(
        [*GRM, "status", "--config", str(config), *overrides], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def logp(folder: Path, rows: list[dict]) -> torch.Tensor:
    """Log-probs of sampled responses by transformers, in nats."""
    hf = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for row in rows:
        before = hf.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([before + list(row["token_ids"])])
        with torch.no_grad():
            logps = lm(input_ids=ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        found.append(float(logps.gather(-1, ids[0, len(before) :, None]).sum()))
    return torch.tensor(found)


def copy_of(run: Path, folder: Path) -> Path:
    """The configuration of the run, as it was before its stage `sft`, in another folder."""
    shutil.copytree(run / "tiny" / "prompts", folder / "tiny" / "prompts")
    config = folder / "config.yaml"
    config.write_text((run / "config.yaml").read_text().replace(f"dir: {run}\n", f"dir: {folder}\n"))
    return config


@pytest.mark.long
def test_one_rank_without_shards_comes_to_the_same(run, tmp_path):
    """Two ranks of ZeRO-3 with two passes each against one rank, one pass and no ZeRO."""
    grm("sft", copy_of(run, tmp_path), "sft.engine.processes=1", "sft.engine.zero_stage=0", "sft.micro_batch=8")
    two, one = (read_rows(folder / "tiny" / "sft" / "metrics.jsonl") for folder in (run, tmp_path))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for mine, other in zip(one, two, strict=True):
        for name in {"loss", "nll_held_out", "lr"} & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=2e-3), (name, mine, other)


@pytest.mark.long
def test_a_stopped_and_killed_stage_comes_to_the_uninterrupted_result(run, tmp_path):
    """SIGTERM after the first steps, SIGKILL somewhat later, then left alone."""
    config, partial = copy_of(run, tmp_path), tmp_path / "tiny" / "sft.partial"
    job, log = [*GRM, "sft", "--config", str(config)], tmp_path / "log"
    metrics = partial / "metrics.jsonl"
    with background(*job, log=log) as stopped:
        wait_for(lambda: steps_in(metrics) >= 2, stopped)
        stopped.terminate()
        assert stopped.wait(200) == EXIT_STOPPED
    assert "sft: stopped after step" in log.read_text()
    before = steps_in(metrics)
    with background(*job, log=log) as killed:
        wait_for(lambda: steps_in(metrics) > before + 5 or (tmp_path / "tiny" / "sft").exists(), killed)
    said = grm("sft", config)
    assert "resumes the unfinished work" in said
    uninterrupted, found = (read_rows(folder / "tiny" / "sft" / "metrics.jsonl") for folder in (run, tmp_path))
    assert uninterrupted == found
    first, second = (load_file(f / "tiny" / "sft" / "policy" / "model.safetensors") for f in (run, tmp_path))
    assert first.keys() == second.keys() and all(first[name].equal(weight) for name, weight in second.items())


def steps_in(metrics: Path) -> int:
    """0 where there is no such file, or no longer, since the stage has published its folder."""
    try:
        return sum('"loss"' in line for line in metrics.read_text().splitlines())
    except FileNotFoundError:
        return 0
