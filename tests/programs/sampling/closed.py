"""What is left of vLLM once a pool is drawn, as stage `bon` draws it: `closed.py MODEL FOLDER`."""

import json
import sys
import weakref
from pathlib import Path

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.generation.local import Generator
from core.generation.pool import sample_pool


def parts_of(generator: Generator) -> list[weakref.ref]:
    executor = generator._llm.llm_engine.engine_core.engine_core.model_executor
    parts = (generator._llm, executor, executor.driver_worker.worker.model_runner.model)
    return [weakref.ref(part) for part in parts]


def main(path: str, folder: str) -> None:
    model = Model(path=path)
    tokenizer = ChatTokenizer(model)
    cfg = Generation(max_new_tokens=8, vllm=Vllm(dtype="float32", max_model_len=64, max_num_seqs=16))
    watched: list[weakref.ref] = []

    def started() -> Generator:
        generator = Generator(model, cfg, tokenizer)
        watched.extend(parts_of(generator))
        return generator

    rows = [{"prompt_id": f"p{i}", "split": "eval", "prompt": [{"role": "user", "content": str(i)}]} for i in range(4)]
    pool = sample_pool(started, tokenizer, rows, 2, out=Path(folder), shard_prompts=2, seed=1, name="bon")
    print(json.dumps({"samples": len(pool.whole()), "left": [part() is not None for part in watched]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
