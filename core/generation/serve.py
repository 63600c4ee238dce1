"""`grm vllm-serve`: the policy behind a vLLM server, for `ppo.vllm_servers`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from core import environment
from core.config import Model, Vllm
from core.config.load import load
from core.generation.options import command_line, server_options
from core.http import TOKEN_VARIABLE, check_host, token_of


def main(argv: list[str]) -> int:
    """`grm vllm-serve`: replace this process by a vLLM server of `policy`. Returns only on a faulty command line."""
    parser = argparse.ArgumentParser(
        prog="grm vllm-serve", description="Serve the policy with vLLM, for `ppo.vllm_servers`.",
        epilog="Options after -- are passed to vLLM, for example: -- --tensor-parallel-size 2",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--config", "-c", action="append", help="YAML file; repeat to lay files over each other")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s); another one needs a token"
    )
    parser.add_argument("--token", help=f"what clients must send; better set {TOKEN_VARIABLE}, since other users of "
                        "the machine see the arguments of a program (default: no authentication)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000)
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_intermixed_args(argv[:cut])
    token = token_of(options.token)
    check_host(options.host, token)
    cfg = load(options.config or ["configs/offline.yaml"], options.overrides).after_sft()
    nccl = cfg.ppo.weight_transfer == "nccl"
    command = server_command(
        cfg.policy, cfg.generation.vllm, host=options.host, port=options.port, nccl=nccl, token=bool(token)
    )
    settings = {**os.environ, **environment.variables(1), "VLLM_SERVER_DEV_MODE": "1"}
    settings |= {TOKEN_VARIABLE: token} if token else {}
    settings["VLLM_CPU_KVCACHE_SPACE"] = str(cfg.generation.vllm.cpu_kvcache_gib)
    root = str(Path(__file__).parents[2])  # vLLM's worker imports `core.generation.worker`
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, [root, settings.get("PYTHONPATH")]))
    sys.stdout.flush()
    os.execve(command[0], [*command, *argv[cut + 1 :]], settings)


def server_command(model: Model, vllm: Vllm, *, host: str, port: int, nccl: bool, token: bool = False) -> list[str]:
    """The command that serves `model`.

    Args:
        nccl: new weights come over NCCL, otherwise from a file.
        token: ask a token of clients, that of the environment, at every address. vLLM's own `--api-key` leaves those
            open that change weights.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", str(port)]
    command += ["--middleware", "core.http.TokenRequired"] if token else []
    return command + command_line(server_options(model, vllm, nccl=nccl))
