"""A model's own chat template: the one place where turns become token ids, in training, evaluation, serving.

It also says of a tokenizer whether it can be used at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.errors import DataError, ModelError
from regraft.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_PROBE = "A system turn that every template has to write out."
#: Whether a template writes the system turn, by its text: asked once for each template of this process.
_WRITES_SYSTEM: dict[str, bool] = {}


class Marked(NamedTuple):
    """Token ids of a chat, and for each whether the template marks it as the assistant's."""

    ids: list[int]
    answers: list[bool]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, ask: bool = False
) -> list[int]:
    """Token ids of a chat by the model's template.

    Args:
        tokenizer: The model's.
        messages: The turns. Where the template has no place for a system turn, it goes before the first
            user turn's text, with a blank line between.
        ask: Whether the assistant's next turn is to begin at the end.

    Raises:
        DataError: If the template refuses the chat.
    """
    return list(_apply(tokenizer, _turns(tokenizer, messages), add_generation_prompt=ask, return_dict=False))


def render_marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Marked | None:
    """Token ids of a chat with the template's own word on what the assistant says, where it gives one.

    Raises:
        DataError: If the template refuses the chat.
    """
    if not tokenizer.is_fast or not _MARKS.search(str(tokenizer.chat_template)):
        return None
    found = _apply(
        tokenizer,
        _turns(tokenizer, messages),
        add_generation_prompt=False,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return Marked(list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]])


def writes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a system turn out; some refuse it (Gemma 2's), some leave it out."""
    from jinja2.exceptions import TemplateError

    template = str(tokenizer.chat_template)
    if template not in _WRITES_SYSTEM:
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello"}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError):  # TypeError: templates that take turns by their place
            text = ""
        _WRITES_SYSTEM[template] = _PROBE in str(text)
        if not _WRITES_SYSTEM[template]:
            _log.warning("the chat template has no system turn: its text goes before the first user turn's")
    return _WRITES_SYSTEM[template]


def require_usable(tokenizer: PreTrainedTokenizerBase, name: str, rows: int | None) -> None:
    """Refuse a tokenizer that nothing can be trained or answered with; give it padding where it has none.

    Args:
        tokenizer: As it was loaded.
        name: How to call it in an error.
        rows: Token ids that the model's embedding knows; None where the configuration does not say.

    Raises:
        ModelError: If it has no chat template or no end-of-turn token, or does not fit the model.
    """
    if tokenizer.chat_template is None:
        raise ModelError(f"the tokenizer in {name} has no chat template", "use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        lacks = "neither an end-of-turn nor a pad token" if tokenizer.pad_token_id is None else "no eos_token"
        raise ModelError(
            f"the tokenizer in {name} has {lacks}: answers would never end",
            "set eos_token in tokenizer_config.json to what ends a turn in its chat template",
        )
    if tokenizer.pad_token_id is None:
        # Padding is told from text by the attention mask and the labels, never by its id.
        tokenizer.pad_token = tokenizer.eos_token
    if rows is None:
        return
    # Added tokens beyond the embedding are no harm while no chat uses them (Gemma 3 1B has such a one).
    beyond = [t for t in (tokenizer.eos_token_id, tokenizer.pad_token_id) if t >= rows]
    if beyond or tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer in {name} has {len(tokenizer)} tokens, but the model's embedding {rows} rows",
            "put the tokenizer that belongs to the model beside it, or resize the model's embedding",
        )


def _turns(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[dict[str, Any]]:
    turns = [m.model_dump() for m in messages]
    if not turns or turns[0]["role"] != "system" or writes_system(tokenizer):
        return turns
    system, *rest = turns
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{**system, "role": "user"}, *rest]


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], **how: Any) -> Any:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=True, **how)
    except TemplateError as error:
        order = " → ".join(turn["role"] for turn in turns)
        raise DataError(
            f"the chat template of this model refuses a chat of {order}: {error}",
            "bring the turns into the order the template wants, or use another template",
        ) from error
