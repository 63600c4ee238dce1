"""Responses of vLLM, for the test that they stop at every end token of a model: `stop_tokens.py MODEL`."""

import json
import sys

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.generation.local import Generator


def main(path: str) -> None:
    model = Model(path=path)
    tokenizer = ChatTokenizer(model)
    cfg = Generation(max_new_tokens=16, vllm=Vllm(dtype="float32", max_model_len=64, max_num_seqs=16))
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Name a fruit."}])
    completions = Generator(model, cfg, tokenizer).generate([prompt], n=16, seed=1)[0]
    print(json.dumps([{"token_ids": c.token_ids, "finished": c.finished} for c in completions]))


if __name__ == "__main__":
    main(sys.argv[1])
