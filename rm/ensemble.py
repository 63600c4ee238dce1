"""Reward models that are adapters on one base, which is in memory once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from core.config import NATIVE_DTYPE, Attention
from core.errors import ArtefactError
from core.models import CausalLM
from core.models.architecture import hidden_size, layers_of
from core.models.layers import FrozenLayers, frozen_layers_of
from core.models.logits import leave_out_lm_head
from core.models.state_cache import FrozenStateCache
from core.training import distributed
from core.training.sharding import Shards
from rm.checkpoints.adapters import Adapter, backbone, cast, is_adapter
from rm.checkpoints.folder import locate
from rm.checkpoints.layout import kept_kernel, read_head, read_tokenizer
from rm.model import RewardModel
from rm.reading import Tokens

CACHED_STATES = 1 << 30
"""Bytes of frozen states that the members may share, for the rows of one `AdapterEnsemble.frozen_state_cache`."""


def one_base(paths: Sequence[str | Path]) -> bool:
    """Whether these are two or more adapter folders of this project whose reward models can share a base in memory."""
    folders = [locate(path) for path in paths]
    return len(folders) > 1 and all(map(is_adapter, folders)) and len(set(map(backbone, folders))) == 1


class AdapterMember(RewardModel):
    """One reward model of an `AdapterEnsemble`.

    All members have the same `lm`, and a call switches it to the member's adapter. So they are not safe to call from
    several threads at once.

    Args:
        name: of the adapter in `lm`.
    """

    def __init__(self, lm: CausalLM, name: str, *args, **options):
        super().__init__(lm, *args, **options)
        self.name = name

    def forward(self, *args, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `RewardModel.forward`."""
        if self.lm.active_adapter != self.name:
            self.lm.set_adapter(self.name, inference_mode=True)
        return super().forward(*args, **options)


class AdapterEnsemble(nn.Module):
    """k reward models that are adapters and heads on one base, which is in memory once. For rewards alone: the base
    has no LM head of its own.

    The adapters are not merged, so rewards equal those of `RewardModel.from_pretrained` up to rounding.

    Attributes:
        members: the k reward models; each scores like any other.
    """

    def __init__(self, members: Sequence[AdapterMember]):
        super().__init__()
        self.lm: CausalLM = members[0].lm
        self.heads = nn.ModuleList(member.head for member in members)
        # In a tuple, which torch does not look into: an engine must see the base once, not k times.
        self.members = tuple(members)

    @classmethod
    def from_pretrained(
        cls,
        paths: Sequence[str | Path],
        *,
        dtype: str = NATIVE_DTYPE,
        attention: Attention = "auto",
        base: str | Path | None = None,
        where: str | None = None,
        shards: Shards | None = None,
    ) -> AdapterEnsemble:
        """The reward models of these adapter folders, in their order.

        Args:
            dtype: of the weights.
            base: folder of the base model, in place of the one that the adapters name.
            where: the device; None for this rank's.
            shards: as in `core.models.loading.load_causal_lm`; `where` is not used.

        Raises:
            ArtefactError: models of several bases, or anything that `RewardModel.from_pretrained` refuses.
        """
        from peft import PeftModel

        adapters = [Adapter.open(path, base) for path in paths]
        if other := [a.folder for a in adapters if backbone(a.folder) != backbone(adapters[0].folder)]:
            raise ArtefactError(f"{other[0]} has another base, type or number of layers than {adapters[0].folder}")
        first = adapters[0]
        lm = first.load_base(kept_kernel(first.folder, first.about) if attention == "auto" else attention, shards)
        leave_out_lm_head(lm)
        for adapter in adapters:
            adapter.check(lm)
        lm, members = cast(lm, dtype), []
        for i, adapter in enumerate(adapters):
            if i == 0:
                lm = PeftModel.from_pretrained(lm, adapter.folder, adapter_name="0", autocast_adapter_dtype=False)
            else:
                lm.load_adapter(adapter.folder, str(i), autocast_adapter_dtype=False)
            about, tokenizer = adapter.about, read_tokenizer(adapter.folder, adapter.about)
            member = AdapterMember(
                lm, str(i), about["head"], tokenizer, mean=about["mean"], std=about["std"], reads=about["reads"]
            )
            member.head.load_state_dict(read_head(adapter.folder, about["head"], hidden_size(lm)))
            members.append(member.eval())
        place = distributed.device() if shards else where or distributed.device()
        return cls(members).requires_grad_(False).eval().to(place)

    def forward(self, *args, member: int, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`RewardModel.forward` of the member of this number."""
        return self.members[member](*args, **options)

    def through(self, forward: Callable) -> list[EngineMember]:
        """The members, each called like an engine of its own; `forward` is the engine that holds this ensemble."""
        return [EngineMember(self, forward, i) for i in range(len(self.members))]

    def frozen_state_cache(self, rows: Sequence[Tokens]) -> FrozenStateCache | None:
        """The `frozen` of `rm.score.score_tokens` that all members share: the layers below all adapters run only once.

        None where no layer is below all adapters, or where the states of `rows` would take more than CACHED_STATES.
        """
        if self._frozen_layers is None:
            return None
        tokens = sum(len(prompt) + len(response) for prompt, response in set(rows))
        size = tokens * hidden_size(self.lm) * next(self.parameters()).element_size()
        return FrozenStateCache(self._frozen_layers) if size <= CACHED_STATES else None

    @cached_property  # it stores the layers where torch does not look, since their parameters are those of `lm`
    def _frozen_layers(self) -> FrozenLayers | None:
        """The layers below the lowest adapter of any member; None where there are none, or `lm` cannot be cut there."""
        layers = layers_of(self.lm)
        adapted = (any("lora_" in name for name, _ in layer.named_parameters()) for layer in layers)
        depth = next((i for i, has_adapter in enumerate(adapted) if has_adapter), len(layers))
        if not depth or not self.members[0].shares_prompts:
            return None
        return frozen_layers_of(self.lm, depth, self.lm)


class EngineMember:
    """A member of an ensemble under an engine, called like an engine of its own.

    Attributes:
        module: the member.
    """

    def __init__(self, ensemble: AdapterEnsemble, forward: Callable, number: int):
        self.module = ensemble.members[number]
        self._forward, self._number = forward, number

    def __call__(self, *args, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._forward(*args, member=self._number, **options)
