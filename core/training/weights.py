"""Saving a LoRA adapter that an engine trains."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from core.training import engine


def save_adapter(folder: Path, lm: nn.Module) -> None:
    """The trained adapter as peft's own folder; every rank must call it, the first writes."""
    from safetensors.torch import save_file

    weights = {}
    for name, weight in lm.named_parameters():
        if "lora_" in name:
            with engine.gathered([weight]):
                weights[name.replace(".default.", ".")] = weight.detach().cpu().contiguous().clone()
    if engine.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        lm.peft_config["default"].save_pretrained(folder)
