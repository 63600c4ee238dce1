"""What a checkpoint folder contains, read from headers and configuration before a model is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from core.damage import check_part
from core.data.chat import ChatTokenizer
from core.errors import ArtefactError
from core.files import open_tensors, read_json
from core.models.architecture import text_config
from core.models.libraries import made_by_library

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; w = {}; files = sorted(glob.glob('*.bin')); "
    "[w.update(torch.load(f, map_location='cpu', weights_only=True)) for f in files if 'model' in f]; "
    "save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors', metadata={'format': 'pt'})"
)


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the local snapshot of a hub id, which must be a `str`.

    Raises:
        ArtefactError: it is neither; or it is a folder of a finished stage, and not what the stage wrote.
    """
    if Path(path).is_dir():
        check_part(Path(path))
        return Path(path)
    if not (isinstance(path, str) and HUB_ID.fullmatch(path)):
        raise ArtefactError(f"{path} holds no reward model (no such folder): run `grm rm` first")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:
        if _is_unreachable(error):
            raise ArtefactError(
                f"{path} is no folder here, and the hub cannot be reached ({type(error).__name__}): run `hf download "
                f"{path} --local-dir FOLDER` where it can be, and give that folder"
            ) from None
        if not isinstance(error, HfHubHTTPError | OSError | ValueError):
            raise
        raise ArtefactError(f"{path} is neither a local folder nor a model of the hub: {error}") from None


def _is_unreachable(error: Exception) -> bool:
    """Whether an error of huggingface_hub says that there is no connection, and not that there is no such model."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # A proxy's error comes as the HTTP client raises it, a package whose name differs between versions.
    client = type(error).__module__.partition(".")[0]
    return isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or client in (
        "httpx",
        "httpx2",
        "requests",
    )


def read_config(folder: str | Path):
    """The configuration of a causal LM, whichever head it was saved with; ArtefactError for other architectures."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with made_by_library(f"cannot read the configuration of {folder}"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ArtefactError(f"{folder} is a {config.model_type}, not a causal LM: encoder models are not supported")
    return config


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers; ArtefactError if there are only pickles, or no weights."""
    shape_of: dict[str, tuple[int, ...]] = {}
    for file in files(folder):
        with open_tensors(file) as weights:
            shape_of |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    return shape_of


def types(folder: Path) -> set[str]:
    """Types of the tensors as safetensors names them (`BF16`, `F16`, `F32`), from the headers."""
    names: set[str] = set()
    for file in files(folder):
        with open_tensors(file) as weights:
            names |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    return names


def tensors(folder: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors whose names are the values of `names`, under its keys."""
    result: dict[str, Tensor] = {}
    for file in files(folder):
        with open_tensors(file) as weights:
            here = set(weights.keys())
            result |= {name: weights.get_tensor(key) for name, key in names.items() if key in here}
    return result


def faults(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """What differs between two tables of shapes, the first six differences by name; empty if they are equal."""
    lines = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    lines += [f"{key} is extra" for key in sorted(found.keys() - wanted.keys())]
    both = sorted(wanted.keys() & found.keys())
    lines += [f"{k} is {list(found[k])}, not {list(wanted[k])}" for k in both if wanted[k] != found[k]]
    return ", ".join(lines[:6]) + (f" and {len(lines) - 6} more" if len(lines) > 6 else "")


def check_vocabulary(folder: Path, tokenizer: ChatTokenizer) -> None:
    """ArtefactError if the embeddings, `vocab_size` and the tokenizer of `folder` do not belong together."""
    size = text_config(read_config(folder)).vocab_size
    for key, shape in shapes(folder).items():
        if key.endswith("embed_tokens.weight") and shape[0] != size:
            raise ArtefactError(f"{folder}: {key} has {shape[0]} rows, but vocab_size in config.json is {size}")
    if beyond := tokens_from(tokenizer, size):
        raise ArtefactError(
            f"{folder}: vocab_size is {size}, but its tokenizer has {len(beyond)} tokens beyond it, such as "
            f"{next(iter(beyond))!r}: the tokenizer or the weights are of another model"
        )


def tokens_from(tokenizer: ChatTokenizer, size: int) -> dict[str, int]:
    """Tokens whose ids are `size` or more."""
    return {token: i for token, i in tokenizer.hf.get_vocab().items() if i >= size}


def files(folder: Path) -> list[Path]:
    """The safetensors files of the folder: an adapter, a model, or its shards; ArtefactError if there are none."""
    if (index := folder / "model.safetensors.index.json").is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    present = [p for name in ("adapter_model.safetensors", "model.safetensors") if (p := folder / name).is_file()]
    if len(present) == 1:
        return present
    if present:
        raise ArtefactError(f"{folder} holds {present[0].name} and {present[1].name}: keep the one that is meant")
    if pickles := sorted(
        p for name in ("pytorch_model*.bin", "adapter_model*.bin", "v_head.pt") for p in folder.glob(name)
    ):
        raise ArtefactError(
            f"{folder} holds its weights as pickles ({pickles[0].name}), which can run code when opened and are not "
            f'read. If you trust them, convert them in that folder: python -c "{CONVERT}"'
        )
    raise ArtefactError(f"{folder} holds no reward model (no safetensors): run `grm rm` first")
