"""The proxy of PPO behind a reward server."""

from types import SimpleNamespace

import pytest
import torch

from core.errors import ArtefactError
from ppo.proxy import RemoteProxy
from rm.serving.server import Ensemble
from tests.builders.checkpoints import CHATS, CLOSE
from tests.builders.reward_models import tiny_reward_model
from tests.builders.reward_server import serving


ROWS = [{"prompt": chat[:-1], "response": chat[-1]["content"]} for chat in CHATS]


def test_ppo_takes_its_rewards_from_the_server_of_its_own_proxy(tokenizer_path):
    model = tiny_reward_model(tokenizer_path, "mlp")
    with serving(Ensemble(["runs/a/rm/grm"], [model], batch_tokens=256)) as url:
        proxy = RemoteProxy(url, model)
        torch.testing.assert_close(proxy.score(ROWS), model.score(CHATS), **CLOSE)
        assert (proxy.mean, proxy.std) == (0.25, 2.0)
        other = SimpleNamespace(tokenizer=model.tokenizer, mean=0.25, std=1.5)
        with pytest.raises(ArtefactError, match=r"mean and std \(0.25, 2.0\); those of ppo.proxy are \(0.25, 1.5\)"):
            RemoteProxy(url, other)
