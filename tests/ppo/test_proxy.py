"""The proxy of PPO behind a reward server."""

from types import SimpleNamespace

import pytest
import torch

from core.errors import ArtefactError
from core.generation.local import Completion
from ppo.proxy import LocalProxy, RemoteProxy
from ppo.records import Sampled
from ppo.rollout import responses
from rm.serving.server import Ensemble
from tests.builders.checkpoints import CHATS, CLOSE
from tests.builders.plain_engine import PlainEngine
from tests.builders.reward_models import tiny_reward_model
from tests.builders.reward_server import serving

ROWS = [{"prompt": chat[:-1], "response": chat[-1]["content"]} for chat in CHATS]


def test_ppo_takes_its_rewards_from_the_server_of_its_own_proxy(tokenizer_path):
    model = tiny_reward_model(tokenizer_path, "mlp")
    with serving(Ensemble(["runs/a/rm/grm"], [model], batch_tokens=256)) as url:
        proxy = RemoteProxy(url, model)
        torch.testing.assert_close(proxy.score(ROWS), model.score(CHATS), **CLOSE)
        assert (proxy.mean, proxy.std) == (0.25, 2.0)
        other = SimpleNamespace(tokenizer=model.tokenizer, mean=0.25, std=1.5, reads=model.reads)
        with pytest.raises(ArtefactError, match=r"mean and std \(0.25, 2.0\); those of ppo.proxy are \(0.25, 1.5\)"):
            RemoteProxy(url, other)
        other = SimpleNamespace(tokenizer=model.tokenizer, mean=0.25, std=2.0, reads="whole")
        with pytest.raises(ArtefactError, match="reads end_of_turn .*; ppo.proxy reads whole: serve it with --reads"):
            RemoteProxy(url, other)


def test_the_proxy_reads_what_the_policy_made(tokenizer_path):
    """A response that was cut off has no end of turn, and a special token that was sampled is there."""
    model = tiny_reward_model(tokenizer_path, "mlp")
    tokenizer = model.tokenizer
    encode = lambda text: tokenizer.hf(text, add_special_tokens=False).input_ids  # noqa: E731
    start = tokenizer.hf.convert_tokens_to_ids("<|im_start|>")
    sampled = [encode("An apple"), [*encode("Yes."), start, *encode("user\nGo on"), tokenizer.eot_id]]
    prompt = {"prompt_id": "p", "prompt": CHATS[0][:1]}
    ids = tokenizer.prompt_ids(prompt["prompt"])
    done = [Completion(t, [0.0] * len(t), tokenizer.decode(t), t[-1] == tokenizer.eot_id) for t in sampled]
    rows = responses(Sampled([prompt] * 2, [ids] * 2, 0, [0, 0], done), tokenizer.fingerprint)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids + t]), torch.ones(1, len(ids + t)))[0] for t in sampled])
    local = LocalProxy([PlainEngine(model, None)], None)
    torch.testing.assert_close(local.score(rows), expected, **CLOSE)
    with serving(Ensemble(["runs/a/rm/grm"], [model])) as url:
        torch.testing.assert_close(RemoteProxy(url, model).score(rows), expected, **CLOSE)
    texts = [[*CHATS[0][:1], {"role": "assistant", "content": c.text}] for c in done]
    assert ((model.score(texts) - expected).abs() > 1e-3).all()
