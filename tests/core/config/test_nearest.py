"""Which key is suggested for one that does not exist."""

import pytest

from core.config.load import load
from core.errors import ConfigError

MEANT = {
    "ppo.lerning_rate": "ppo.actor.lr",
    "ppo.learning_rate": "ppo.actor.lr",
    "rm.learning_rate": "rm.optim.lr",
    "ppo.kl_coef": "ppo.kl.coef",
    "ppo.kl.coeff": "ppo.kl.coef",
    "ppo.mini_batch_size": "ppo.minibatches",
    "ppo.cliprange": "ppo.clip.low",
    "ppo.gae_lambda": "ppo.lam",
    "rm.num_train_epochs": "rm.epochs",
    "rm.variants.grm.aplha": "rm.variants.grm.alpha",
    "generation.max_tokens": "generation.max_new_tokens",
    "ppo.lora_rank": "ppo.lora.rank",
    "bon.num_samples": "bon.samples",
    "engine.zero": "engine.zero_stage",
    "ppo.actor.betas2": "ppo.actor.betas",
    "ppo.beta": "ppo.kl.coef",
    "ppo.bata": "ppo.kl.coef",
    "ppo.batch_size": "ppo.rollouts",
    "rm.batch_size": "rm.global_batch",
    "rm.beta": r"rm.variants.\*.beta",
    "ppo.num_iterations": "ppo.steps",
    "ppo.save_steps": "ppo.save_every",
    "preferences.noise": "preferences.label_noise",
    "ppo.temperature": "generation.temperature",
    "bon.n": "bon.samples",
}


@pytest.mark.parametrize("wrong", MEANT)
def test_the_nearest_key_is_the_one_that_was_meant(wrong):
    with pytest.raises(ConfigError, match=rf"the nearest is {MEANT[wrong]}(\n|$)"):
        load([], [f"{wrong}=1"])


def test_the_keys_of_the_section_where_nothing_is_near():
    with pytest.raises(ConfigError, match="no such key .*; ppo.kl has coef, target, horizon, where, stop"):
        load([], ["ppo.kl.qqq=1"])
    for far in ("ppo.max", "generation.min_p"):
        with pytest.raises(ConfigError, match=f"{far}: no such key .*; {far.split('.')[0]} has "):
            load([], [f"{far}=1"])
    with pytest.raises(ConfigError, match="the configuration has run, policy, data"):
        load([], ["zzz.x=1"])
