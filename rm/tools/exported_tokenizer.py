"""The tokenizer of an export, with which other people's programs read the tokens that our reward models read.

Such programs score the chat template's whole rendering at its last token, and many of them tokenise the rendered text
like any other, special tokens included. So the exported template ends at the end of turn, and the exported tokenizer
adds nothing of its own.
"""

from __future__ import annotations

import copy
import json

from core.data.chat import ChatTokenizer, Message, conversation
from core.errors import ArtefactError

_QUESTION: list[Message] = [{"role": "user", "content": "Question"}]
_PROBES = (
    conversation(_QUESTION, "A probe response"),
    conversation(_QUESTION, ""),
    conversation([*conversation(_QUESTION, "A first response"), *_QUESTION], "A second response\nof two lines."),
)


def exported_tokenizer(tokenizer: ChatTokenizer) -> ChatTokenizer:
    """A copy whose template renders a whole conversation as its prompt, the response and the end of turn.

    Raises:
        ArtefactError: a template for which that is not so, since it writes a turn that is there otherwise than one that
            is generated.
    """
    changed = copy.deepcopy(tokenizer)
    rendered = tokenizer.hf.apply_chat_template(_PROBES[0], tokenize=False)
    written = rendered.rpartition(_PROBES[0][-1]["content"])[2]
    wanted = tokenizer.hf.decode([tokenizer.eot_id], skip_special_tokens=False)
    if written != wanted:
        changed.hf.chat_template = ending_with(tokenizer.hf.chat_template, written, wanted)
    _add_nothing(changed.hf)
    for messages in _PROBES:
        text = changed.hf.apply_chat_template(messages, tokenize=False)
        expected = tokenizer.hf.decode(tokenizer.conversation_ids(messages), skip_special_tokens=False)
        if text != expected:
            raise ArtefactError(
                f"the chat template of {tokenizer.name} renders a whole conversation as {text!r}, but turn by turn it "
                f"is {expected!r}: other programs would read this model wrongly, so use --form merged"
            )
    return changed


def splits_answers_otherwise(exported: ChatTokenizer) -> bool:
    """Whether the tokens of a whole rendering are not those of prompt and answer, although the text is the same.

    It is so where the tokenizer joins the end of the generation prompt with the beginning of an answer.
    """
    return any(exported.whole_ids(messages) != exported.conversation_ids(messages) for messages in _PROBES)


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
    if hf("a").input_ids != hf("a", add_special_tokens=False).input_ids:
        hf.backend_tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
