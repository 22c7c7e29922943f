"""From chats to padded batches of token ids, bucketed by length under a token budget.

Only the assistant's turns are supervised. This module knows no model: token ids in, tensors out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from regraft.errors import DataError
from regraft.models import prompt_ids
from regraft.records import Example, Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


class Encoded(NamedTuple):
    """One example as token ids; `labels` is `IGNORED` wherever the token is not supervised."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return sum(label != IGNORED for label in self.labels)


class Batch(NamedTuple):
    """Right-padded tensors of shape (rows, longest)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a causal model is called with in training, without the mask.

        The padding is on the right and not supervised: no token that counts ever attends to it. Without a
        mask the attention kernels take their fast, causal path.
        """
        return {"input_ids": self.input_ids, "labels": self.labels}


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, shown: Sequence[Message] = ()
) -> Encoded:
    """Turn a chat into token ids by the model's own template, supervising every assistant turn.

    A turn's supervised tokens are what the template adds for it after the generation prompt, including the
    end-of-turn token: the model has to learn to stop.

    Args:
        tokenizer: The model's, with a chat template.
        example: The chat.
        max_length: The most tokens of the example itself.
        shown: Turns before its own, not supervised.

    Raises:
        DataError: If the chat is longer than `max_length`, or the template rewrites earlier turns when later
            ones follow (then which tokens are the assistant's cannot be told).
    """
    own = len(_render(tokenizer, example)) if shown else None
    first = len(shown) + (example.messages[0].role == "system")
    example = example.after(shown)
    full = _render(tokenizer, example)
    labels = [IGNORED] * len(full)
    for index, message in enumerate(example.messages):
        if message.role != "assistant" or index < first:
            continue
        before = prompt_ids(tokenizer, example.messages[:index])
        upto = full if index == len(example.messages) - 1 else _render(tokenizer, example, index + 1)
        if full[: len(before)] != before or full[: len(upto)] != upto:
            raise DataError(
                f"example {example.id}: the chat template of this model rewrites earlier turns",
                "split the conversation into single-turn examples, or use another template",
            )
        labels[len(before) : len(upto)] = full[len(before) : len(upto)]
    length = len(full) if own is None else own
    if length > max_length:
        raise DataError(
            f"example {example.id} has {length} tokens, more than sweep.max_length = {max_length}",
            "shorten the example or raise sweep.max_length",
        )
    return Encoded(tuple(full), tuple(labels))


def _render(tokenizer: PreTrainedTokenizerBase, example: Example, turns: int | None = None) -> list[int]:
    messages = [m.model_dump() for m in example.messages[:turns]]
    ids = list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    # Some templates (SmolLM2's among them) write a newline after the last end-of-turn token. Nobody says it.
    end = tokenizer.eos_token_id
    while ids and end in ids and ids[-1] != end:
        ids.pop()
    return ids


def bucket(
    examples: Sequence[Encoded], tokens_per_batch: int, *, rng: random.Random | None
) -> list[list[Encoded]]:
    """Group examples of like length, at most `tokens_per_batch` padded tokens a group.

    With `rng`, lengths are jittered and the groups shuffled, so that no two epochs see the same batches.
    """
    by_length = sorted(
        examples, key=lambda e: len(e.ids) * (rng.uniform(0.9, 1.1) if rng else 1.0), reverse=True
    )
    groups: list[list[Encoded]] = []
    longest = 0
    for example in by_length:
        widest = max(longest, len(example.ids))
        if groups and (len(groups[-1]) + 1) * widest <= tokens_per_batch:
            groups[-1].append(example)
            longest = widest
        else:
            groups.append([example])
            longest = len(example.ids)
    if rng:
        rng.shuffle(groups)
    return groups


def collate(group: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad a group on the right."""
    import torch

    width = max(len(e.ids) for e in group)
    ids = torch.full((len(group), width), pad_id)
    labels = torch.full((len(group), width), IGNORED)
    mask = torch.zeros((len(group), width), dtype=torch.long)
    for row, example in enumerate(group):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    return Batch(ids, mask, labels)
