"""Generation by vLLM servers."""

import pytest

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.errors import DataError
from core.generation.remote import ServerGenerator


def test_a_missing_server_is_named_by_its_address(policy_path, tmp_path):
    model = Model(path=str(policy_path))
    with pytest.raises(DataError, match=r"vLLM server http://127.0.0.1:9/v1/models: .*refused"):
        ServerGenerator(
            ["http://127.0.0.1:9/"], model, Generation(vllm=Vllm()), ChatTokenizer(model), folder=tmp_path, timeout=5
        )
