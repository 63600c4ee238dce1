"""Timed calls of the project's own functions, on the policy of a configuration; run by `pipelines.plan.measure`.

    python -m pipelines.plan.probes CONFIG OUT                        what one process does: bon, eval, preferences
    torchrun --nproc-per-node=R -m pipelines.plan.probes CONFIG OUT   what the ranks of rm and ppo do, all at once

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
from pipelines.policy_kl import measure_kl
from pipelines.prompts import read_prompts
from ppo.policy import PolicyModule
from rm.gold import load_gold, score_samples
from rm.model import RewardModel

STARTED = "GRM_PLAN_STARTED"
"""Environment variable: when the process was started, in seconds since the epoch."""
SHAPES = ((2, 96), (8, 96), (8, 256), (24, 96))
"""Rows x tokens of the passes that are timed."""
DEEP = 8
"""Most trained layers that are timed; deeper models are extrapolated."""
SEQUENCES = (4, 16, 64)
"""Sequences that are sampled together."""
MOST_NEW = 48
"""Longest response that is sampled here."""
OPTIM = Optim(lr=1e-6)


def timed(call: Callable[[], object], repeat: int = 3) -> float:
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
        self.tokenizer = ChatTokenizer(cfg.policy)

    def sampling(self) -> None:
        """vLLM: its start, sampling by the number of sequences, reading log-probs, and the built-in judge."""
        cfg, rank = self.cfg, distributed.rank()
        most = min(MOST_NEW, cfg.generation.vllm.max_model_len - cfg.data.max_prompt_tokens)
        generation = cfg.generation.model_copy(update={"max_new_tokens": most})
        calls = [(count, 1) for count in SEQUENCES] + [(SEQUENCES[-1] // 8, 8)]
        needed = 2 + sum(count for count, _ in calls)  # none is used twice: vLLM keeps the keys of what it has read
        usable = read_prompts(cfg.data, self.tokenizer, seed=cfg.run.seed).usable
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
        if self.ranks == 1 and cfg.gold.kind == "judge":
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
            for (rows, length), layers in [(shape, depth) for shape in SHAPES] + [(SHAPES[1], 2)]:
                ids, mask, states = self._inputs(lm, rows, length)
                frozen = FrozenStates(self.layers(lm) - layers, states)
                seconds = timed(lambda: hidden_states(lm, ids, mask, frozen=frozen))  # noqa: B023
                self._pass("forward", None, rows, length, layers, seconds)
            head = LmHead.of(lm)
            for tokens in (32, 384):
                hidden = torch.randn(tokens, states.shape[-1], dtype=states.dtype, device=where)
                targets = torch.zeros(tokens, dtype=torch.long, device=where)
                seconds = timed(lambda: token_logprobs(head, hidden, targets))  # noqa: B023
                self._logits("forward", None, tokens, seconds)
        if self.ranks == 1:
            names = list(lm.named_parameters())
            self.found["sync"] = {"none": timed(lambda: self.generator.sync(names)) / self._params(lm)}
            self._write(lm)
            self._kl(lm)
        return lm

    def _kl(self, lm: CausalLM) -> None:
        """Of a policy from itself: all layers are shared, so what is left are two LM heads and the sums over them."""
        response = list(range(3, 35))
        samples = [{"prompt": self.prompt, "token_ids": response} for _ in range(8)]
        call = lambda: measure_kl(lm, lm, self.tokenizer, samples, 1.0, 8)  # noqa: E731
        self.found["kl"] = timed(call, repeat=2) / (len(samples) * len(response))

    def engines(self) -> None:
        """Passes, optimiser steps and syncs of models under engines."""
        cfg = self.cfg
        settings = {s.zero_stage: s for s in (cfg.engine_of("rm"), cfg.engine_of("ppo"))}
        for zero, one in settings.items():
            for depth in (DEEP, 2):
                self._critic(one, zero, depth)
        actor = cfg.engine_of("ppo")
        for depth in (DEEP, 2):
            self._actor(actor, actor.zero_stage, depth)
        if actor.frozen_zero_stage == 3:
            self._frozen(actor)

    def _critic(self, settings: Settings, zero: int, depth: int) -> None:
        lm = self._load(None)
        depth = min(depth, self.layers(lm))
        train_top_layers(lm, depth)
        model = RewardModel(lm, "mlp", self.tokenizer)
        below = self.layers(lm) - depth
        seconds, engine = once(lambda: Engine(model, settings, micro_batch=8, optim=OPTIM, accumulation=2))
        self.found["starts"].setdefault("engine", seconds)
        updates: list[float] = []
        for rows, length in SHAPES:
            batch, states = self._batch(lm, rows, length)
            frozen = FrozenStates(below, states)
            arguments = (batch.input_ids, batch.attention_mask)
            call = lambda **more: engine(*arguments, read=batch.ends, frozen=frozen, **more)  # noqa: B023, E731
            with torch.no_grad():
                self._pass("forward", zero, rows, length, depth, timed(call))
            seconds, update = in_turn(lambda: self._back(engine, call()[0]))  # noqa: B023
            self._pass("weights", zero, rows, length, depth, seconds)
            updates.append(update)
            if depth > 2 and rows == 8 and length == SHAPES[0][1]:
                for tokens in (1, 48):
                    targets = batch.targets(range(rows))
                    kept = torch.arange(len(targets.token)) % (length // 2) < tokens
                    targets = type(targets)(*(part[kept] for part in targets))
                    with torch.no_grad():
                        seconds = timed(lambda: call(targets=targets))  # noqa: B023
                    self._logits("forward", zero, len(targets.token), seconds - self._last("forward", zero))
                    seconds, _ = in_turn(lambda: self._back(engine, call(targets=targets)[1]))  # noqa: B023
                    self._logits("backward", zero, len(targets.token), seconds - self._last("weights", zero))
        if depth > 2:
            trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
            self.found["update"] = self.found.get("update", {}) | {str(zero): median(updates) / trained}

    def _actor(self, settings: Settings, zero: int, depth: int) -> None:
        lora = self.cfg.ppo.lora or self.cfg.rm.lora or Lora()
        lm = self._load(None)
        depth, below = min(depth, self.layers(lm)), self.layers(lm) - min(depth, self.layers(lm))
        lm = add_lora(lm, lora.model_copy(update={"top_layers": depth, "dropout": 0.0}))
        module = PolicyModule(lm, 1.0)
        engine = Engine(module, settings, micro_batch=8, optim=OPTIM, accumulation=2)
        for rows, length in SHAPES:
            ids, mask, states = self._inputs(lm, rows, length)
            frozen, read = FrozenStates(below, states), torch.zeros_like(ids, dtype=torch.bool)[:, 1:]
            read[:, 0] = True
            call = lambda: engine(ids, mask, read, frozen=frozen)[0]  # noqa: B023, E731
            with torch.no_grad():
                self._pass("forward", zero, rows, length, depth, timed(call), logits=rows)
            seconds, _ = in_turn(lambda: self._back(engine, call()))  # noqa: B023
            self._pass("lora", zero, rows, length, depth, seconds, logits=rows)
        if depth > 2:
            gather = timed(lambda: [weight for _, weight in engine.named_weights(lm)], repeat=2)
            sync = timed(lambda: self.generator.sync(engine.named_weights(lm)), repeat=2)
            self.found["gather"] = {str(zero): gather / self._params(lm)}
            self.found["sync"] = self.found.get("sync", {}) | {str(zero): sync / self._params(lm)}

    def _frozen(self, settings: Settings) -> None:
        lm = self._load(DEEP)
        module = RewardModel(lm, "mlp", self.tokenizer)
        engine = Engine(module, settings, micro_batch=8)
        with torch.no_grad():
            for rows, length in SHAPES:
                batch, _ = self._batch(lm, rows, length)
                call = lambda: engine(batch.input_ids, batch.attention_mask, read=batch.ends)  # noqa: B023, E731
                self._pass("forward", 3, rows, length, self.layers(lm), timed(call), whole=True)

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

    def _pass(self, kind: str, zero: int | None, rows: int, length: int, layers: int, seconds: float, **more) -> None:
        point = {"kind": kind, "zero": zero, "rows": rows, "length": length, "layers": layers, "seconds": seconds}
        self.found["passes"].append(point | more)

    def _last(self, kind: str, zero: int | None) -> float:
        return next(p["seconds"] for p in reversed(self.found["passes"]) if (p["kind"], p["zero"]) == (kind, zero))

    def _logits(self, kind: str, zero: int | None, tokens: int, seconds: float) -> None:
        self.found["logits"].append({"kind": kind, "zero": zero, "tokens": tokens, "seconds": max(seconds, 0.0)})

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


def main(config: str, out: str) -> None:
    process = time.time() - float(os.environ[STARTED])
    cfg = load([config], [])
    seconds, _ = once(distributed.init_distributed)
    probes = Probes(cfg)
    probes.found["starts"] |= {"process": process, "deepspeed": seconds}
    for part in (probes.sampling, probes.whole) + ((probes.engines,) if "TORCHELASTIC_RUN_ID" in os.environ else ()):
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
