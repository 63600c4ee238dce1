"""README.md of a trained policy: what it is, what it was made from, and what was measured."""

from __future__ import annotations

from pathlib import Path

from core.config import Config


def write_card(file: Path, cfg: Config, summary: dict, gold: str | None = None) -> None:
    """Write a Hugging Face model card.

    Args:
        summary: of `ppo.log.summary`.
        gold: what stage `eval` measured, in words; None while it has not run yet.
    """
    ppo, first, last = cfg.ppo, summary["first"], summary["last"]
    kinds = {name: cfg.rm.variants[name].text_regulariser for name in ppo.members}
    variants = "; ".join(f"{n}: Bradley-Terry" if k == "none" else f"{n}: GRM ({k})" for n, k in kinds.items())
    form = f"LoRA of rank {ppo.lora.rank}, merged" if ppo.lora else "all weights trained"
    data = ", ".join(cfg.preferences.sources) or "samples of the base policy, labelled by the gold model"
    rows = {
        "Base policy": cfg.policy.path,
        "Prompts": f"{cfg.data.prompts}, split rl_train",
        "Reward model (proxy)": f"{ppo.label} ({variants}) on {cfg.rm.base.path}",
        "Its training data": data,
        **({"What was optimised": ppo.reward.in_words} if ppo.reward.is_own else {}),
        "Algorithm": f"PPO ({ppo.estimator}), {ppo.steps} steps of {ppo.rollouts} responses, {form}",
        "KL coefficient": f"{first['kl_coef']:g} at first, {last['kl_coef']:g} at the end, in the {ppo.kl.where}",
        "Sampling temperature": f"{cfg.generation.temperature:g}",
        "Proxy reward of rollouts": f"{first['proxy_mean']:+.3f} at first, {last['proxy_mean']:+.3f} at the end",
        "KL from the base policy": f"{last['kl_nats_per_response']:.2f} nats per response, on the last rollout",
        "Responses that end by themselves": f"{last['eos_rate']:.0%}",
        "Gold": gold or "not measured yet: stage eval measures it, and the report's policy-card.md has it",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    file.write_text(
        "---\ntags: [ppo, rlhf, reward-model-overoptimization]\n"
        "pipeline_tag: text-generation\n---\n"
        f"# {cfg.run.name}: a policy optimised against the reward model {ppo.label}\n\n"
        "Made to measure over-optimisation of a reward model, not to be deployed: a higher proxy reward is no evidence "
        "of better answers.\n\n| | |\n| --- | --- |\n"
        f"{table}\n\nLoads with `AutoModelForCausalLM.from_pretrained` and `vllm serve`; "
        "`checkpoints/step-*` beside it are the policies of earlier steps"
        f"{' as PEFT adapters of the base policy' if ppo.lora else ''}.\n"
    )
