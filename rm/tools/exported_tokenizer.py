"""The tokenizer of an export, with which other people's programs read the tokens that our reward models read.

Such programs score the chat template's whole rendering at its last token, and many of them tokenise the rendered text
like any other, special tokens included. So the exported template ends at the end of turn, and the exported tokenizer
adds nothing of its own.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cached_property

from core.data.chat import ChatTokenizer, Message, conversation
from core.errors import ArtefactError

_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]
_PROBES = (
    conversation(_QUESTION, "A probe response"),
    conversation(_QUESTION, ""),
    conversation([*conversation(_QUESTION, "A first response"), *_QUESTION], "A second response\nof two lines."),
)


def exported_tokenizer(tokenizer: ChatTokenizer) -> ChatTokenizer:
    """A copy whose whole rendering of a conversation has the tokens `conversation_ids`, with special tokens added too.

    Raises:
        ArtefactError: a template for which that is not so, since it writes a conversation otherwise than its turns.
    """
    changed = copy.copy(tokenizer)
    for name in [n for n in vars(changed) if isinstance(getattr(type(changed), n, None), cached_property)]:
        del vars(changed)[name]
    changed.hf = copy.deepcopy(tokenizer.hf)
    probe = _PROBES[0]
    prompt = tokenizer.hf.apply_chat_template(probe[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.hf.apply_chat_template(probe, tokenize=False)
    written = whole[len(prompt + probe[-1]["content"]) :]
    wanted = tokenizer.hf.decode([tokenizer.eot_id], skip_special_tokens=False)
    if written != wanted:
        changed.hf.chat_template = ending_with(tokenizer.hf.chat_template, written, wanted)
    _add_nothing(changed.hf)
    for messages in _PROBES:
        expected = tokenizer.conversation_ids(messages)
        text = changed.hf.apply_chat_template(messages, tokenize=False)
        if changed.whole_ids(messages) != expected or list(changed.hf(text).input_ids) != expected:
            raise ArtefactError(
                f"the chat template of {tokenizer.name} renders a whole conversation with other tokens than its turns, "
                f"as in {text!r}, so other programs would read this model wrongly: use --form merged"
            )
    return changed


def ending_with(template: str, written: str, wanted: str) -> str:
    """The Jinja template with the text `wanted` in place of `written` after a response that ends a conversation.

    The template itself is not changed but captured, so what else it writes, and the generation prompt, stay the same.
    """
    body = template.removesuffix("\n")  # Jinja leaves out one newline at the end of a template
    old, new = (json.dumps(text, ensure_ascii=False) for text in (written, wanted))
    cut = f"rendered_conversation[:-{len(written)}]" if written else "rendered_conversation"
    return (
        # Transformers removes the first newline after a block, so that of the template is kept.
        "{% set rendered_conversation %}\n"
        + body
        + "{%+ endset %}"
        + "{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' "
        + f"and rendered_conversation.endswith({old}) %}}"
        + f"{{{{ {cut} + {new} }}}}"
        + "{% else %}{{ rendered_conversation }}{% endif %}"
    )


def _add_nothing(hf) -> None:
    """Make the tokenizer add no special tokens to a text, also where transformers 4 loads it."""
    from tokenizers.processors import TemplateProcessing

    hf.init_kwargs |= {"add_bos_token": False, "add_eos_token": False}
    for name in ("add_bos_token", "add_eos_token"):
        if getattr(hf, name, False):
            setattr(hf, name, False)
    if _added(hf):
        hf.backend_tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def _added(hf) -> Sequence[int]:
    return [i for i in hf("a").input_ids if i not in hf("a", add_special_tokens=False).input_ids]
