"""`grm rm-export MODEL OUT`: a reward model as a folder that transformers loads."""

from __future__ import annotations

import argparse
import copy
import re
import shutil
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor, nn

from core.config import Dtype
from core.errors import ArtefactError
from core.files import read_json, write_json
from core.models import CausalLM
from core.models.loading import save_lm
from core.models.logits import has_lm_head
from core.training.weights import named_weights
from rm.checkpoints.folder import faults, locate
from rm.checkpoints.foreign_heads import V_HEAD
from rm.checkpoints.layout import ABOUT_FILE, save_reward_model
from rm.model import RewardModel
from rm.reading import Reads
from rm.tools.exported_tokenizer import exported_tokenizer, splits_answers_otherwise

MODELING = Path(__file__).with_name("modeling_grm.py")
HOW_TO_LOAD = {
    "classifier": "AutoModelForSequenceClassification.from_pretrained({!r})",
    "remote_code": "AutoModelForSequenceClassification.from_pretrained({!r}, trust_remote_code=True)",
    "merged": "RewardModel.from_pretrained({!r}), or AutoModelForCausalLM for the language model alone",
}


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    model = RewardModel.from_pretrained(options.model, dtype=options.dtype, base=options.base, reads=options.reads)
    form = export(model, options.out, options.form, facts=_facts(options.model))
    print(f"{options.out}: {form}; load it with {HOW_TO_LOAD[form].format(str(options.out))}")
    if (
        model.reads == "end_of_turn"
        and form != "merged"
        and splits_answers_otherwise(exported_tokenizer(model.tokenizer))
    ):
        print("its tokenizer joins the end of the generation prompt with an answer, so programs that tokenise a whole "
              "conversation read other tokens there, and their rewards differ a little from ours")  # fmt: skip
    return 0


def export(model: RewardModel, out: Path, form: str = "auto", *, facts: dict | None = None) -> str:
    """Write `model` and its tokenizer to the new folder `out`; returns the form. All forms give the same rewards.

    Other programs score the whole rendering of the chat template at its last token. So a model that reads up to the end
    of turn gets a template that ends there (`rm.tools.exported_tokenizer`), except in the layout of this project.

    classifier: a sequence classifier of transformers with one label, its `score` in the type of the trunk; for linear
        heads without bias.
    remote_code: trunk, float32 head and the code to read them; for linear and MLP heads.
    merged: the layout of this project, a plain causal LM and a head of any kind. `facts` go into `reward_model.json`.
    auto: classifier if the head allows it, else remote_code.

    Raises:
        ArtefactError: `out` is not empty; a head, an architecture or a chat template that the form does not allow.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtefactError(f"{out} exists: give a new folder")
    if form == "auto":
        form = "classifier" if model.head_kind == "linear" else "remote_code"
    partial = out.with_name(out.name + ".partial")  # so that a killed export never looks like a model
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if form == "merged":
            _merged(model, partial, facts or {})
        else:
            {"classifier": _classifier, "remote_code": _remote_code}[form](model, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return form


def _merged(model: RewardModel, out: Path, facts: dict) -> None:
    if not has_lm_head(model.lm):
        raise ArtefactError("the model has no LM head, so it cannot become a causal LM: export it in another form")
    head = {key: tensor.float().cpu() for key, tensor in model.head.state_dict().items()}
    save_reward_model(out, model, named_weights(model.lm), head, **facts)


def _classifier(model: RewardModel, out: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if model.head_kind != "linear":
        raise ArtefactError(f"a {model.head_kind} head is not a linear map without bias: use --form remote_code")
    config = _config(model)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ArtefactError(f"transformers has no sequence classifier for {config.model_type}: use --form remote_code")
    network = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    weights = _trunk(model.lm) | {"score.weight": cast(Tensor, model.head.weight).detach().to(model.lm.dtype)}
    _save(model, out, config, network, weights)


def _remote_code(model: RewardModel, out: Path) -> None:
    """Names and settings are those of the GRM authors' full checkpoints, which `rm.checkpoints.foreign` reads."""
    from rm.tools.modeling_grm import GrmForSequenceClassification

    config = _config(model)
    code = MODELING.read_text(encoding="utf-8")
    code = re.sub(r'^MODEL_TYPE = ".*"', f'MODEL_TYPE = "{config.model_type}"', code, count=1, flags=re.MULTILINE)
    head = model.head.state_dict()
    if model.head_kind in ("linear", "linear_bias"):
        config.vhead_layer_type = "linear"
        head = {"bias": torch.zeros(1), **head}
    elif shape := re.fullmatch(r"mlp(?::(\d+)x(\d+))?", model.head_kind):
        config.vhead_layer_type = "mlp"
        config.vhead_num_neurons, config.vhead_num_layers = int(shape[1] or 1024), int(shape[2] or 1)
    else:
        raise ArtefactError(f"transformers alone cannot read a {model.head_kind} head: use --form merged")
    config.auto_map = {
        "AutoConfig": f"{MODELING.stem}.GrmConfig",
        "AutoModelForSequenceClassification": f"{MODELING.stem}.{GrmForSequenceClassification.__name__}",
    }
    inner = model.lm.base_model_prefix + "."
    weights = {"model." + key.removeprefix(inner): tensor for key, tensor in _trunk(model.lm).items()}
    weights |= {V_HEAD + key: tensor.float() for key, tensor in head.items()}
    _save(model, out, config, GrmForSequenceClassification, weights)
    (out / MODELING.name).write_text(code, encoding="utf-8")


def _save(model: RewardModel, out: Path, config, network: type[nn.Module], weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        wanted = {key: tuple(tensor.shape) for key, tensor in network(config).state_dict().items()}
    if wrong := faults(wanted, {key: tuple(tensor.shape) for key, tensor in weights.items()}):
        raise ArtefactError(f"the weights do not fit {network.__name__}: {wrong}")
    config.architectures = [network.__name__]
    tokenizer = exported_tokenizer(model.tokenizer) if model.reads == "end_of_turn" else model.tokenizer
    save_lm(out, config, weights.items(), tokenizer)
    _add_old_names(out)


def _add_old_names(out: Path) -> None:
    """Add the names of transformers 4 to the settings; without them it would silently use a rotary base of 10,000."""
    config = read_json(out / "config.json")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    write_json(out / "config.json", config | {"torch_dtype": config["dtype"]})


def _config(model: RewardModel):
    """Configuration of a classifier with one label; `reward_mean`, `reward_std` are for the reader, not applied."""
    config = copy.deepcopy(model.lm.config)
    for key in [key for key in vars(config) if key == "auto_map" or key.startswith("vhead_")]:
        delattr(config, key)
    config.num_labels, config.dtype = 1, model.lm.dtype
    config.pad_token_id = model.tokenizer.pad_id  # not an end of turn: the classifier reads the token before the pads
    config.reward_mean, config.reward_std, config.reward_reads = model.mean, model.std, model.reads
    return config


def _trunk(lm: CausalLM) -> dict[str, Tensor]:
    """The causal LM's weights without its LM head."""
    lm_head = next((f"{name}." for name, m in lm.named_modules() if m is lm.get_output_embeddings()), None)
    return {key: tensor for key, tensor in named_weights(lm) if lm_head is None or not key.startswith(lm_head)}


def _facts(path: str) -> dict:
    """Entries of `reward_model.json` that `RewardModel` does not keep, such as the variant; empty for other layouts."""
    file = locate(path) / ABOUT_FILE
    kept = {"format", "head", "tokenizer", "mean", "std", "base_model", "reads", "attention"}
    return {key: value for key, value in read_json(file).items() if key not in kept} if file.is_file() else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grm rm-export",
        description="Write a reward model as a folder that transformers loads. Rewards are the same in every form.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub id: of this project, the GRM authors, or a classifier"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument(
        "--form",
        choices=["auto", *HOW_TO_LOAD],
        default="auto",
        help="classifier: transformers' own, for linear heads; remote_code: with a modelling file, for MLP heads too; "
        "merged: a causal LM with the head next to it; auto (default): classifier if possible, else remote_code",
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16", help="of the weights (%(default)s)")
    parser.add_argument("--base", help="base of a LoRA checkpoint, instead of the one that it names")
    parser.add_argument("--reads", choices=get_args(Reads), help="tokens that it reads, recorded in OUT (default: "
                        "what MODEL records, or what the makers of its layout do; docs/reward-models.md)")  # fmt: skip
    return parser
