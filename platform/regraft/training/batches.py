"""From encoded chats to padded batches, bucketed by length under a token budget.

This module knows no model and no tokenizer: token ids in, tensors out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.errors import InfeasibleTrialError

if TYPE_CHECKING:
    import torch

IGNORED = -100
#: The most that a padded batch may take, of its budget.
_PADDED = 1.25
#: Fewer tokens than these are not worth the trouble.
_WORTH_SHARING = 4


class Encoded(NamedTuple):
    """One example as token ids; `labels` is `IGNORED` wherever the token is not supervised."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return sum(label != IGNORED for label in self.labels)


class Batch(NamedTuple):
    """Tensors of shape (rows, longest), padded on the right; or one row of several examples.

    `lengths` are those of the examples that share a row, in order; empty where each has a row of its own.
    Their first `prefix` tokens, the same for all, then stand at the beginning once, and `lengths` are of
    the rest.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...] = ()
    prefix: int = 0

    def to(self, device: str) -> Batch:
        """The same batch on another device; on CUDA the host does not wait for the copy."""
        if not device.startswith("cuda"):
            return self
        ids, mask, labels = (t.pin_memory().to(device, non_blocking=True) for t in self[:3])
        return Batch(ids, mask, labels, self.lengths, self.prefix)

    @property
    def masked(self) -> dict[str, torch.Tensor]:
        """What any causal model is called with, the mask included."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}

    @property
    def inputs(self) -> dict[str, Any]:
        """What a causal model is called with in training, without the mask.

        The padding is on the right and not supervised: no token that counts ever attends to it. Without a
        mask the attention kernels take their fast, causal path. Where examples share a row, their positions
        begin anew, and their bounds are given by the names that transformers hands on to attention kernels;
        the prefix that all of them see is a name of this project's own attention.
        """
        found: dict[str, Any] = {"input_ids": self.input_ids, "labels": self.labels}
        if self.lengths:
            import torch

            where = self.input_ids.device
            # On the host: a device would be waited for.
            parts = [torch.arange(self.prefix), *(self.prefix + torch.arange(n) for n in self.lengths)]
            bounds = torch.tensor([self.prefix, *self.lengths]).cumsum(0).to(torch.int32)
            found |= {"position_ids": torch.cat(parts)[None].to(where)}
            found |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds.to(where))
            found |= dict.fromkeys(("max_length_q", "max_length_k"), max(self.lengths))
            if self.prefix:
                found["shared_prefix"] = self.prefix
        return found


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
    """Group examples of like length, at most `tokens_per_batch` tokens a group.

    Padding does not count, so that a step is the same examples whether they share a row or are padded; it may
    take up a quarter of the budget more, no further. With `rng`, lengths are jittered and the groups
    shuffled, so that no two epochs see the same batches. An example longer than the budget stands alone.
    """
    by_length = sorted(
        examples, key=lambda e: len(e.ids) * (rng.uniform(0.9, 1.1) if rng else 1.0), reverse=True
    )
    groups: list[list[Encoded]] = []
    longest = held = 0
    for example in by_length:
        widest, tokens = max(longest, len(example.ids)), held + len(example.ids)
        if (
            groups
            and tokens <= tokens_per_batch
            and (len(groups[-1]) + 1) * widest <= _PADDED * tokens_per_batch
        ):
            groups[-1].append(example)
            longest, held = widest, tokens
        else:
            groups.append([example])
            longest = held = len(example.ids)
    if rng:
        rng.shuffle(groups)
    return groups


def split(group: Sequence[Encoded], most_tokens: int) -> list[list[Encoded]]:
    """Cut a group into pieces of at most `most_tokens` tokens, or of one example; 0 leaves it whole."""
    return bucket(group, most_tokens, rng=None) if most_tokens else [list(group)]


def pack(group: Sequence[Encoded], *, share: bool = False) -> Batch:
    """Put a group into one row without padding, the longest examples first.

    No example is asked to say how the next one begins: the first token of each is not supervised.

    Args:
        group: The examples.
        share: Whether what all of them begin with, such as a system turn, stands there once.
    """
    import torch

    in_order = sorted(group, key=lambda e: len(e.ids), reverse=True)
    prefix = shared_prefix(in_order) if share else 0
    ids = torch.tensor([*in_order[0].ids[:prefix], *(token for e in in_order for token in e.ids[prefix:])])
    rest = (label for e in in_order for label in (IGNORED, *e.labels[prefix + 1 :]))
    labels = torch.tensor([*(IGNORED,) * prefix, *rest])
    lengths = tuple(len(e.ids) - prefix for e in in_order)
    return Batch(ids[None], torch.ones_like(ids)[None], labels[None], lengths, prefix)


def shared_prefix(group: Sequence[Encoded]) -> int:
    """How many tokens all examples begin with alike, none of them supervised, nor the one that follows.

    What comes out for these tokens depends on nothing behind them: computed once, it is the same for all.
    """
    if len(group) < 2:
        return 0
    first = group[0]
    most = min(len(e.ids) for e in group) - 1
    for e in group:
        # The token behind the prefix is asked of its last one, which all share.
        most = min(most, next((i for i, label in enumerate(e.labels) if label != IGNORED), len(e.ids)) - 1)
        most = next((i for i in range(max(0, most)) if e.ids[i] != first.ids[i]), max(0, most))
    return most if most >= _WORTH_SHARING else 0


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
