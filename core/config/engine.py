"""Section `engine`, and what one stage changes in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.config.base import NATIVE_DTYPE, Section, merge

EngineStage = Literal["sft", "rm", "ppo"]
"""The stages that train, each of which may have an engine of its own."""
ENGINE_STAGES: tuple[EngineStage, ...] = ("sft", "rm", "ppo")


class Engine(Section):
    """What DeepSpeed is given. `sft.engine`, `rm.engine` and `ppo.engine` say what differs for one stage."""

    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Ranks on this machine. auto: one per GPU, or on CPU two, and one where the command may use one core."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """What ZeRO shards over the ranks: 0 nothing, 1 optimiser states, 2 also gradients, 3 also parameters. A higher
    stage needs less memory and more communication."""
    frozen_zero_stage: Literal["auto", 0, 3] = "auto"
    """The same for the models of PPO that are not trained (reference, proxy, shared frozen layers). 0: each rank holds
    them whole, which is faster. 3: sharded. auto: 3 where zero_stage is 3 and either offload is set or they would
    together take more than a tenth of a GPU's memory, else 0."""
    dtype: Literal["bfloat16", "float32"] = NATIVE_DTYPE
    """Number type of training. The default is bfloat16 where the machine computes it fast, else float32. With bfloat16
    the optimiser keeps float32 master weights."""
    float32_head: bool = True
    """With dtype bfloat16: compute the logits that log-probs come from in float32, for the regulariser of reward
    models, in PPO and in eval's KL."""
    offload: bool = False
    """Keep optimiser states (at stage 3 also parameters) in host memory. Slower, for models that do not fit the GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass in place of storing them: less memory, slower steps."""
    compile: bool = False
    """In rm and ppo, compile the layers of the models that are trained (torch.compile). Steps on a GPU then take less
    time and memory, after a minute or less of compiling. Needs zero_stage 2 or less."""
    overrides: dict[str, Any] = {}
    """Your own DeepSpeed settings, laid over those that follow from this configuration."""
    rank_timeout: float = Field(default=1800.0, ge=5, json_schema_extra={"decides_result": False})
    """Seconds after which the ranks give up on one that shows no sign of life, and a minute later on a collective that
    does not end. All of them end then, the lost rank and its phase are named, and the same command goes on from what is
    saved."""

    shard_gib: float = Field(default=4.0, gt=0, json_schema_extra={"decides_result": False})
    """A saved policy or reward model is written in files of at most so many GiB (a smaller one in a single file), each
    as soon as it is full, and a process holds no more of the weights than one of them."""

    @model_validator(mode="after")
    def _whole_layers(self) -> Engine:
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs layers whose weights are whole: set zero_stage to 2 or less")
        return self

    @property
    def shares_trained(self) -> bool:
        """Whether PPO's models that are trained may hold frozen weights of others (`core.models.shared_weights`): not
        where ZeRO-3 divides them."""
        return self.zero_stage < 3

    @property
    def shares_frozen(self) -> bool:
        """The same of models that are not trained."""
        return self.frozen_zero_stage == 0 or (self.shares_trained and self.frozen_zero_stage == "auto")

    @property
    def shard_bytes(self) -> int:
        """`shard_gib` in bytes."""
        return int(self.shard_gib * 2**30)

    def changed(self, changes: EngineOfStage) -> Engine:
        """This section with those of `changes` that are not null; DeepSpeed's own settings are laid over each other."""
        given = {name: value for name, value in changes if value is not None}
        return Engine.model_validate(merge(self.model_dump(), given))


class EngineOfStage(Section):
    """What differs from the section `engine` for this stage alone. null: nothing differs."""

    processes: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """As engine.processes."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """As engine.zero_stage."""
    frozen_zero_stage: Literal["auto", 0, 3] | None = None
    """As engine.frozen_zero_stage."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """As engine.dtype."""
    float32_head: bool | None = None
    """As engine.float32_head. That of ppo.engine holds for eval's KL too."""
    offload: bool | None = None
    """As engine.offload."""
    gradient_checkpointing: bool | None = None
    """As engine.gradient_checkpointing."""
    compile: bool | None = None
    """As engine.compile."""
    overrides: dict[str, Any] = {}
    """As engine.overrides, over which these are laid."""
    rank_timeout: Annotated[float, Field(ge=5)] | None = Field(
        default=None, json_schema_extra={"decides_result": False}
    )
    """As engine.rank_timeout."""
    shard_gib: Annotated[float, Field(gt=0)] | None = Field(default=None, json_schema_extra={"decides_result": False})
    """As engine.shard_gib."""
