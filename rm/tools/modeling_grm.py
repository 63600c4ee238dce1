"""A reward model on a transformers backbone; this file is saved with the weights and needs transformers alone.

`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` gives a model whose `logits`
[B, 1] are float32 rewards, read at the last real token of each row. Fields of `config.json`: `vhead_layer_type`
(`linear`, `mlp`), `vhead_num_neurons`, `vhead_num_layers`; `reward_mean` and `reward_std`, the rewards' scale on
samples of the reference policy, are for the reader and not applied; neither is `reward_reads`. The chat template next
to this file ends where the reward is read: tokenise its whole rendering of a conversation as it is.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

MODEL_TYPE = "llama"  # the backbone's; set when the model is exported


class GrmConfig(CONFIG_MAPPING[MODEL_TYPE]):
    """The backbone's configuration as a class of its own.

    transformers registers a model class for the class of its configuration. Under the backbone's own class every other
    classifier with that backbone, loaded later in the same process, would become a `GrmForSequenceClassification`.
    """


class Float32Linear(nn.Linear):
    """Computes in float32 with weights of any type, because in bfloat16 many rewards would be equal."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class ValueHead(nn.Module):
    """Linear(H, 1), or `vhead_num_layers` x [Linear(., neurons), ReLU] and Linear(neurons, 1)."""

    def __init__(self, config):
        super().__init__()
        self.summary: nn.Module
        if config.vhead_layer_type == "linear":
            self.summary = Float32Linear(config.hidden_size, 1)
            return
        parts, width = [], config.hidden_size
        for _ in range(config.vhead_num_layers):
            parts += [Float32Linear(width, config.vhead_num_neurons), nn.ReLU()]
            width = config.vhead_num_neurons
        self.summary = nn.Sequential(*parts, Float32Linear(width, 1))

    def forward(self, hidden):
        return self.summary(hidden)


class GrmForSequenceClassification(PreTrainedModel):
    config_class = GrmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _keep_in_fp32_modules_strict = ["v_head"]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = 1
        backbone = next(cls for cls in type(config).__mro__ if cls in MODEL_MAPPING)
        self.model = MODEL_MAPPING[backbone]._from_config(config)
        self.v_head = ValueHead(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        return_dict=None,
        **kwargs,
    ):
        """Rewards of B rows of L tokens, padded on either side.

        Args:
            input_ids: [B, L]; or `inputs_embeds` [B, L, H].
            attention_mask: [B, L], 1 on real tokens. Without it, tokens other than `config.pad_token_id` are real.

        Returns:
            An object with `logits` [B, 1], float32.
        """
        if labels is not None:
            raise ValueError("this model gives rewards, not a loss: call it without labels")
        if attention_mask is None:
            shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
            attention_mask = torch.ones(shape, dtype=torch.long, device=self.device)
            if input_ids is not None and self.config.pad_token_id is not None:
                attention_mask = (input_ids != self.config.pad_token_id).long()
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            **kwargs,
        ).last_hidden_state
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * columns).argmax(-1).to(hidden.device)
        rewards = self.v_head(hidden[torch.arange(len(hidden), device=hidden.device), last])
        return SequenceClassifierOutputWithPast(logits=rewards)
