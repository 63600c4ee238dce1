"""Timed calls of the project's own functions, on the policy of a configuration; run by `pipelines.plan.measure`.

    python -m pipelines.plan.probes CONFIG OUT                        what one process does: bon, eval, preferences
    torchrun ... -m pipelines.plan.probes CONFIG OUT                  what their processes do, all at once
    torchrun ... -m pipelines.plan.probes CONFIG OUT engines          what the ranks of rm and ppo do, all at once

Every rank does the same at the same time, and the slowest one counts, as in a stage. The first rank writes OUT.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from core.batching import pack
from core.config import Config, Lora, Optim
from core.config import Engine as Settings
from core.config.load import load
from core.data.chat import ChatTokenizer, Message
from core.data.rows import ResponseRow
from core.files import write_json
from core.generation.local import Completion, Generator
from core.models import CausalLM
from core.models.layers import FrozenStates, hidden_states, train_top_layers
from core.models.loading import load_causal_lm
from core.models.logits import LmHead
from core.models.logprobs import token_logprobs
from core.models.lora import add_lora
from core.training import distributed
from core.training.engine import Engine
from pipelines.plan.work import Trained
from pipelines.policy_kl import measure_kl
from pipelines.prompts import in_order, read_prompts
from rm.gold import load_gold, score_samples
from rm.model import RewardModel

STARTED = "GRM_PLAN_STARTED"
"""Environment variable: when the process was started, by the monotonic clock."""
SHAPES = ((2, 96), (8, 96), (8, 256), (24, 96))
"""Rows x tokens of the passes that are timed."""
DEEP = 8
"""Most trained layers that are timed; deeper models are extrapolated."""
FEW = 2
"""Layers of the passes that show what a call costs by itself."""
SEQUENCES = (4, 16, 64)
"""Sequences that are sampled together."""
NEW_TOKENS = (64, 256)
"""Longest response that is sampled here is `generation.max_new_tokens`, within these bounds: one measurement serves
configurations with shorter responses too."""
OPTIM = Optim(lr=1e-6)


def shapes_of(depth: int) -> tuple[tuple[int, int], ...]:
    """What is timed of so many layers: few of them only show what a call costs by itself."""
    return SHAPES if depth > FEW else SHAPES[:2]


def timed(call: Callable[[], object], repeat: int = 2) -> float:
    """Seconds of a call on the slowest rank; the least of `repeat`, so that what happens once does not count."""
    best = float("inf")
    for _ in range(repeat):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, distributed.global_max(time.perf_counter() - started))
    return best


def in_turn(call: Callable[[], object]) -> tuple[float, float]:
    """(seconds of a pass, seconds of the optimiser step after it) of an engine that steps at every second pass."""
    seconds = [timed(call, repeat=1) for _ in range(4)]
    alone = min(seconds[::2])
    return alone, max(min(seconds[1::2]) - alone, 0.0)


def once(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds on the slowest rank, result) of a call that is made once."""
    result: list[Any] = []
    seconds = timed(lambda: result.append(call()), repeat=1)
    return seconds, result[0]


class Probes:
    """What one program measures; `found` is what it writes."""

    def __init__(self, cfg: Config):
        self.cfg, self.ranks = cfg, distributed.world_size()
        self.found: dict[str, Any] = {"ranks": self.ranks, "passes": [], "logits": [], "starts": {}, "samples": []}
        self.found["starts"]["tokenizer"], self.tokenizer = once(lambda: ChatTokenizer(cfg.policy))
        self.tokenizer.check()

    def sampling(self) -> None:
        """vLLM: its start, sampling by the number of sequences, reading log-probs, and the built-in judge."""
        cfg, rank = self.cfg, distributed.rank()
        least, longest = NEW_TOKENS
        room = cfg.generation.vllm.max_model_len - cfg.data.max_prompt_tokens
        most = min(max(cfg.generation.max_new_tokens, least), longest, room)
        generation = cfg.generation.model_copy(update={"max_new_tokens": most})
        calls = [(count, 1) for count in SEQUENCES] + [(SEQUENCES[-1] // 8, 8)]
        needed = 2 + sum(count for count, _ in calls)  # none is used twice: vLLM keeps the keys of what it has read
        usable = in_order(*read_prompts(cfg.data, self.tokenizer, seed=cfg.run.seed))
        prompts = [usable[(rank * needed + i) % len(usable)]["prompt"] for i in range(needed)]
        ids = [self.tokenizer.prompt_ids(prompt) for prompt in prompts]
        self.prompt = prompts[0]
        self.found["starts"]["vllm"], generator = once(lambda: Generator(cfg.policy, generation, self.tokenizer))
        generator.generate(ids[:2], seed=0)
        samples: list[Completion] = []
        asked: list[list[Message]] = []
        start = 2
        for count, n in calls:
            mine, start = slice(start, start + count), start + count
            seconds, groups = once(functools.partial(generator.generate, ids[mine], n=n, seed=count))
            lengths = [len(s.token_ids) for group in groups for s in group]
            self.found["samples"].append({
                "sequences": count * n, "prompts": count, "prompt_tokens": sum(map(len, ids[mine])) / count,
                "tokens": sum(lengths), "steps": max(lengths), "seconds": seconds,
            })  # fmt: skip
            if (count, n) == (SEQUENCES[-1], 1):
                samples, asked = [group[0] for group in groups], prompts[mine]
                rows = [prompt + s.token_ids for prompt, s in zip(ids[mine], samples, strict=True)][:8]
                self.found |= {"responses": lengths, "responses_cut_at": most}
        self.found["read"] = timed(lambda: generator.logprobs_of(rows)) / sum(map(len, rows))
        self.generator = generator
        if cfg.gold.kind == "judge":
            about: list[ResponseRow] = [
                {"prompt": prompt, "response": s.text, "token_ids": None, "tokenizer": None}
                for prompt, s in zip(asked, samples, strict=True)
            ]
            self.found["starts"]["judge"], gold = once(lambda: load_gold(cfg.gold))
            self.found["judge"] = timed(lambda: score_samples(gold, about)) / len(about)
        generator.sleep()

    def whole(self) -> CausalLM:
        """Passes of a model that nothing shards, and its LM head; the model."""
        seconds, lm = once(lambda: self._load(None))
        self.found["load"] = seconds / sum(p.numel() for p in lm.parameters())
        where = distributed.device()
        lm = lm.to(where).requires_grad_(False)
        depth = min(DEEP, self.layers(lm))
        with torch.no_grad():
            for (rows, length), layers in [(shape, depth) for shape in SHAPES] + [(SHAPES[1], FEW)]:
                ids, mask, states = self._inputs(lm, rows, length)
                frozen = FrozenStates(self.layers(lm) - layers, states)
                seconds = timed(lambda: hidden_states(lm, ids, mask, frozen=frozen))  # noqa: B023
                self._pass("forward", None, rows, length, layers, seconds)
        for tokens in (32, 384):
            self._head(lm, tokens)
        names = list(lm.named_parameters())
        self.found["sync"] = {"none": timed(lambda: self.generator.sync(names)) / self._params(lm)}
        self._kl(lm)
        if self.ranks == 1:
            self._write(lm)
        return lm

    def _kl(self, lm: CausalLM) -> None:
        """Of a policy from itself, less the layers, which both share: what is left are two LM heads and the sums."""
        response = list(range(3, 51))
        samples = [{"prompt": self.prompt, "token_ids": response} for _ in range(8)]
        row = self.tokenizer.prompt_ids(self.prompt) + response
        ids = torch.tensor([row] * len(samples), device=distributed.device())
        whole = timed(lambda: measure_kl(lm, lm, self.tokenizer, samples, 1.0, 8), repeat=2)
        with torch.no_grad():
            layers = timed(lambda: hidden_states(lm, ids, torch.ones_like(ids)), repeat=2)
        self.found["kl"] = max(whole - layers, 0.0) / (len(samples) * len(response))

    def _head(self, lm: CausalLM, tokens: int) -> None:
        """Log-probs of some tokens, with and without a backward pass to the hidden states; the head is frozen."""
        head, where = LmHead.of(lm), distributed.device()
        hidden = self._inputs(lm, 1, tokens)[2][0].requires_grad_()
        targets = torch.zeros(tokens, dtype=torch.long, device=where)
        with torch.no_grad():
            forward = timed(lambda: token_logprobs(head, hidden, targets))
        both = timed(lambda: token_logprobs(head, hidden, targets)[0].sum().backward())
        for kind, seconds in (("forward", forward), ("backward", both)):
            self.found["logits"].append({"kind": kind, "tokens": tokens, "seconds": seconds})

    def engines(self) -> None:
        """Passes, optimiser steps and syncs of models under engines."""
        cfg = self.cfg
        settings = {s.zero_stage: s for s in (cfg.engine_of("rm"), cfg.engine_of("ppo"))}
        for zero, one in settings.items():
            for depth in (DEEP, FEW):
                self._engine(one, zero, depth, "weights")
            if cfg.ppo.lora or cfg.rm.lora:
                for depth in (DEEP, FEW):
                    self._engine(one, zero, depth, "lora")

    def _engine(self, settings: Settings, zero: int, depth: int, kind: Trained) -> None:
        """Passes of the top layers, continued from states of the others, as after frozen layers that are shared."""
        lm = self._load(None)
        below = max(self.layers(lm) - depth, 0)
        depth = self.layers(lm) - below
        if kind == "lora":
            lora = self.cfg.ppo.lora or self.cfg.rm.lora or Lora()
            lm = add_lora(lm, lora.model_copy(update={"top_layers": depth, "dropout": 0.0}))
        else:
            train_top_layers(lm, depth)
        model = RewardModel(lm, "mlp", self.tokenizer)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds, engine = once(lambda: Engine(model, settings, micro_batch=8, optim=OPTIM, accumulation=2))
        self.found["starts"].setdefault("engine", seconds)
        updates: list[float] = []
        for rows, length in shapes_of(depth):
            batch, states = self._batch(lm, rows, length)
            frozen = FrozenStates(below, states) if below else None
            inputs = (batch.input_ids, batch.attention_mask)
            call = lambda: engine(*inputs, read=batch.ends, frozen=frozen)[0]  # noqa: B023, E731
            with torch.no_grad():
                self._pass("forward", zero, rows, length, depth, timed(call))
            seconds, update = in_turn(lambda: self._back(engine, call()))  # noqa: B023
            self._pass(kind, zero, rows, length, depth, seconds)
            updates.append(update)
        if depth <= FEW:
            return
        if kind == "weights":
            self.found.setdefault("update", {})[str(zero)] = median(updates) / trained
        gather = timed(lambda: [weight for _, weight in engine.named_weights(lm)])
        sync = timed(lambda: self.generator.sync(engine.named_weights(lm)))
        self.found.setdefault("gather", {})[str(zero)] = gather / self._params(lm)
        self.found.setdefault("sync", {})[str(zero)] = sync / self._params(lm)

    @staticmethod
    def _back(engine: Engine, values: torch.Tensor) -> None:
        engine.backward(values.float().mean())
        engine.step()

    def _load(self, layers: int | None) -> CausalLM:
        head = self.cfg.engine.float32_head
        return load_causal_lm(self.cfg.policy, dtype=self.cfg.engine.dtype, num_layers=layers, float32_head=head)

    def _inputs(self, lm: CausalLM, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        where = distributed.device()
        ids = torch.arange(rows * length, device=where).view(rows, length) % 1000 + 3
        kind = getattr(torch, self.cfg.engine.dtype)
        states = torch.randn(rows, length, lm.config.get_text_config().hidden_size, device=where).to(kind)
        return ids, torch.ones_like(ids), states

    def _batch(self, lm: CausalLM, rows: int, length: int) -> tuple[Any, torch.Tensor]:
        ids, _, states = self._inputs(lm, rows, length)
        half = length // 2
        return pack([(row[:half], [row[half:]]) for row in ids.tolist()], 0, distributed.device()), states

    def _pass(self, kind: str, zero: int | None, rows: int, length: int, layers: int, seconds: float) -> None:
        point = {"kind": kind, "zero": zero, "rows": rows, "length": length, "layers": layers, "seconds": seconds}
        self.found["passes"].append(point)

    def _write(self, lm: CausalLM) -> None:
        from safetensors.torch import save_file

        file = Path(sys.argv[2]).with_suffix(".safetensors")
        weights = {name: w.detach().clone() for name, w in lm.named_parameters()}
        seconds = timed(lambda: save_file(weights, file), repeat=2)
        self.found["write"] = seconds / file.stat().st_size
        file.unlink()

    @staticmethod
    def layers(lm: CausalLM) -> int:
        return lm.config.get_text_config().num_hidden_layers

    @staticmethod
    def _params(lm: CausalLM) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for name, p in lm.named_parameters() if "lora_" not in name)


def main(config: str, out: str, *more: str) -> None:
    process = time.monotonic() - float(os.environ[STARTED])
    cfg = load([config], [])
    seconds, _ = once(distributed.init_distributed)
    probes = Probes(cfg)
    probes.found["starts"] |= {"process": process, "deepspeed": seconds}
    for part in (probes.sampling, probes.whole, *([probes.engines] if "engines" in more else [])):
        started = time.perf_counter()
        part()
        took = time.perf_counter() - started
        probes.found["starts"][f"{part.__name__} took"] = took
        if distributed.rank() == 0:
            print(f"{part.__name__}: {took:.0f} s", file=sys.stderr, flush=True)
    if distributed.rank() == 0:
        write_json(Path(out), probes.found)
    sys.stdout.flush()
    os._exit(0)  # vLLM and DeepSpeed leave threads whose tear-down can crash


if __name__ == "__main__":
    main(*sys.argv[1:])
