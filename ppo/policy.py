"""The actor as a module: log-probs of sampled tokens, of the policy or of its reference."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from core.models import CausalLM
from core.models.layers import FrozenStates, hidden_states
from core.models.logits import LmHead
from core.models.logprobs import token_logprobs


class PolicyModule(nn.Module):
    """The policy's causal LM. B conversations of L columns (prompt and response).

    With adapters the reference is the same module with its adapters switched off.

    Args:
        temperature: of sampling; log-probs are of softmax(logits / temperature).
    """

    lm: CausalLM

    def __init__(self, lm: CausalLM, temperature: float):
        super().__init__()
        self.lm, self.temperature = lm, temperature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        is_response: Tensor,
        *,
        reference: bool = False,
        temperature: float | None = None,
        with_entropy: bool = False,
        frozen: FrozenStates | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens, in nats.

        Args:
            input_ids, attention_mask: [B, L].
            is_response: [B, L-1], True where the token that column t predicts, t+1, belongs to a response.
            reference: switch the adapters off.
            temperature: in place of the module's own.
            with_entropy: compute the entropy of each next-token distribution too.
            frozen: states of the frozen layers that policy and reference share, if they have been computed.

        Returns:
            Float32 log-probs [B, L-1], at column t that of token t+1, 0 outside responses; and the entropies [B, L-1]
            in nats, 0 outside responses, or None.
        """
        with self.lm.disable_adapter() if reference and hasattr(self.lm, "peft_config") else nullcontext():
            hidden = hidden_states(self.lm, input_ids, attention_mask, frozen=frozen)
            logps, entropy = token_logprobs(
                LmHead.of(self.lm),
                hidden[:, :-1][is_response],
                input_ids[:, 1:][is_response],
                temperature or self.temperature,
                with_entropy=with_entropy,
            )
        return scatter(logps, is_response), None if entropy is None else scatter(entropy, is_response)


def scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """`flat` [number of True in mask], put at the True positions of `mask` [B, T] in reading order; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
