"""What of `generation.vllm.overrides` vLLM has, in this process and as a server reads it: `vllm_overrides.py MODEL`."""

import json
import os
import sys

import torch

from core.config import Generation, Model, Vllm
from core.data.chat import ChatTokenizer
from core.errors import ConfigError
from core.generation.local import Generator
from core.generation.options import server_options
from core.generation.serve import server_command

OVERRIDES = {
    "max_num_batched_tokens": 192, "enable_prefix_caching": False, "disable_log_stats": False, "block_size": None,
    "kernel_config": {"enable_flashinfer_autotune": False},
    "tensor_parallel_size": 2,
}  # fmt: skip
"""A null, an entry beside those that the project sets itself, and what only ranks can have."""
FOR_SERVERS = {
    "max_num_batched_tokens": 192, "enable_prefix_caching": False, "disable_log_stats": False,
    "enable_chunked_prefill": True, "tensor_parallel_size": 2, "kv_cache_dtype": "fp8",
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
    "cudagraph_capture_sizes": [1, 2], "download_dir": "-odd",
}  # fmt: skip


def in_this_process(model: Model, overrides: dict) -> dict:
    tokenizer = ChatTokenizer(model)
    cfg = Generation(max_new_tokens=4, vllm=Vllm(dtype="float32", max_model_len=128, overrides=overrides))
    generator = Generator(model, cfg, tokenizer)
    of_vllm = generator._llm.llm_engine.vllm_config
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "Name a fruit."}])
    kernels = of_vllm.kernel_config
    return {
        "max_num_batched_tokens": of_vllm.scheduler_config.max_num_batched_tokens,
        "enable_prefix_caching": of_vllm.cache_config.enable_prefix_caching,
        "block_size": of_vllm.cache_config.block_size,
        "tensor_parallel_size": of_vllm.parallel_config.tensor_parallel_size,
        "log_stats": generator._llm.llm_engine.log_stats,
        "autotune": kernels.enable_flashinfer_autotune,
        "priority": kernels.ir_op_priority.rms_norm,
        "responses": len(generator.generate([prompt], n=2, seed=1)[0]),
    }


def as_a_server(model: Model) -> dict:
    """Names of arguments that vLLM's server would not read from the command as they were given."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vllm = Vllm(dtype="float32", max_model_len=128, overrides=FOR_SERVERS)
    command = server_command(model, vllm, host="127.0.0.1", port=8123, nccl=False)
    parser = FlexibleArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port")
    AsyncEngineArgs.add_cli_args(parser)
    read = AsyncEngineArgs.from_cli_args(parser.parse_args(command[3:]))
    wanted = server_options(model, vllm, nccl=False)
    assert wanted.keys() >= FOR_SERVERS.keys()
    return {name: str(getattr(read, name)) for name, value in wanted.items() if getattr(read, name) != value}


def main(path: str) -> None:
    model = Model(path=path)
    found = {"server": as_a_server(model)}
    try:
        in_this_process(model, {"kv_cache_dtype": "fp9"})
    except ConfigError as error:
        found["refused"] = str(error)
    found["here"] = in_this_process(model, OVERRIDES)
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
