"""Writing weights as safetensors files of a stated size, each as soon as it is full, in the layout of transformers.

`model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`, which says in
which file each tensor is.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from core.files import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


def write_weights(folder: Path, named_weights: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the files, and delete those that another model has left in the folder.

    Of the weights only those of one file are in memory, and the next one.

    Args:
        shard_bytes: of tensors in a file, at most; a tensor that is larger has a file of its own.
    """
    from safetensors.torch import save_file

    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    written: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        file = folder / f"model-{len(written) + 1:05}.safetensors"  # how many there will be is not known yet
        save_file(held, file, metadata={"format": "pt"})
        written.append((file, list(held)))
        held.clear()

    for name, weight in named_weights:
        tensor = weight.contiguous().cpu()
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(written, start=1):
        moved = file.rename(folder / f"model-{number:05}-of-{len(written):05}.safetensors")
        places |= dict.fromkeys(names, moved.name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
