"""From encoded chats to padded batches, bucketed by length under a token budget.

This module knows no model and no tokenizer: token ids in, tensors out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from regraft.errors import InfeasibleTrialError

if TYPE_CHECKING:
    import torch

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


def require_supervised(rows: Sequence[Encoded], purpose: str) -> None:
    """Refuse a set that gives no loss, or a row that gives none.

    Raises:
        InfeasibleTrialError: With how many.
    """
    empty = sum(not row.supervised for row in rows)
    if empty or not rows:
        raise InfeasibleTrialError(
            f"nothing to {purpose} on: {empty} of {len(rows)} examples have no supervised token"
        )


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


def split(group: Sequence[Encoded], most_tokens: int) -> list[list[Encoded]]:
    """Cut a group into pieces of at most `most_tokens` padded tokens, or of one row; 0 leaves it whole."""
    rows = most_tokens // max(len(e.ids) for e in group) if most_tokens else len(group)
    rows = max(1, rows)
    return [list(group[start : start + rows]) for start in range(0, len(group), rows)]


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
