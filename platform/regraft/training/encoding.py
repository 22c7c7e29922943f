"""From chats to token ids with labels, and what becomes of those that are too long: said, counted, recorded.

Only the assistant's turns are supervised.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from regraft.config import SweepSection
from regraft.errors import DataError, ModelError
from regraft.models import prompt_ids
from regraft.records import DatasetVersion, Example, Message
from regraft.sections import TooLong
from regraft.templates import render, render_marked
from regraft.training.batches import IGNORED, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5
_MEND = "shorten them, raise sweep.max_length, or set sweep.too_long to drop or truncate"


class Limits(NamedTuple):
    """How long an example may be, in tokens, and what becomes of longer ones.

    `rows` is how many token ids the model knows, where that is known.
    """

    max_length: int
    too_long: TooLong = "refuse"
    rows: int | None = None


class Encodings(NamedTuple):
    """The rows of one set, and what became of its examples. Lengths are before anything was cut."""

    rows: tuple[Encoded, ...]
    lengths: tuple[int, ...]
    dropped: int = 0
    truncated: int = 0
    emptied: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """What to record, in examples and tokens; `emptied` had their whole answer cut away."""
        return {
            "kept": len(self.rows),
            "dropped": self.dropped,
            "truncated": self.truncated,
            "emptied": self.emptied,
            "tokens": sum(len(row.ids) for row in self.rows),
            "supervised_tokens": sum(row.supervised for row in self.rows),
            "longest": max(self.lengths),
        }

    @property
    def summary(self) -> str:
        """One line on counts and lengths."""
        found = self.counts
        p50, p95 = (_quantile(self.lengths, q) for q in (0.5, 0.95))
        losses = {
            "longer than sweep.max_length dropped": self.dropped,
            "truncated": self.truncated,
            "dropped because nothing was left of the answer": self.emptied,
        }
        told = "".join(f", {count} {what}" for what, count in losses.items() if count)
        return (
            f"{found['kept']} of {len(self.lengths)} examples kept{told}; "
            f"{found['tokens']} tokens, {found['supervised_tokens'] / found['tokens']:.0%} supervised; "
            f"tokens an example: p50 {p50}, p95 {p95}, longest {found['longest']}"
        )


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, shown: Sequence[Message] = ()
) -> Encoded:
    """Turn a chat into token ids by the model's own template, supervising every assistant turn.

    A turn's supervised tokens are those the template marks as generated, or else what it adds for the turn
    after the generation prompt; both with the end-of-turn token: the model has to learn to stop.

    Args:
        tokenizer: The model's, with a chat template.
        example: The chat.
        max_length: The most tokens of the example itself.
        shown: Turns before its own, not supervised.

    Raises:
        DataError: If the chat is longer than `max_length`, the template refuses it, or which tokens are the
            assistant's cannot be told.
    """
    row, length = _encode(tokenizer, example, shown)
    if length > max_length:
        raise DataError(
            f"example {example.id} has {length} tokens, more than sweep.max_length = {max_length}", _MEND
        )
    return row


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    limits: Limits,
    shown: Sequence[Message] = (),
    *,
    name: str,
) -> Encodings:
    """Encode a set and do with its too long examples what `limits` says.

    `drop` leaves them out. `truncate` cuts their end, so that no end of turn is learnt from a cut answer; a
    chat cut at its front would be none to the template. One whose answer is all cut away is dropped.

    Args:
        tokenizer: The model's.
        examples: The set.
        limits: How long an example may be by itself.
        shown: Turns before each one's own, not supervised.
        name: The set's, for messages.

    Raises:
        DataError: If an example cannot be encoded, is too long where that is refused, or none is left.
        ModelError: If a token is beyond the model's embedding.
    """
    rows: list[Encoded] = []
    lengths: list[int] = []
    too_long: list[tuple[int, str]] = []
    emptied = 0
    for example in examples:
        row, length = _encode(tokenizer, example, shown)
        if limits.rows is not None and max(row.ids) >= limits.rows:
            raise ModelError(
                f"example {example.id}: token {max(row.ids)} is beyond the {limits.rows} the model knows",
                "put the tokenizer that belongs to the model beside it, or resize the model's embedding",
            )
        lengths.append(length)
        if length <= limits.max_length:
            rows.append(row)
            continue
        too_long.append((length, example.id))
        if limits.too_long == "truncate":
            keep = len(row.ids) - (length - limits.max_length)
            cut = Encoded(row.ids[:keep], row.labels[:keep])
            # The first token is never predicted, so that a label there counts for nothing.
            if any(label != IGNORED for label in cut.labels[1:]):
                rows.append(cut)
            else:
                emptied += 1
    if too_long and limits.too_long == "refuse":
        raise DataError(_refusal(too_long, len(examples), limits.max_length, name), _MEND)
    if not rows:
        raise DataError(
            f"{name}: none of {len(examples)} examples is left with sweep.max_length = {limits.max_length} "
            f"and sweep.too_long = {limits.too_long}; the shortest has {min(lengths, default=0)} tokens",
            "raise sweep.max_length" if examples else "add examples",
        )
    if limits.too_long == "drop":
        return Encodings(tuple(rows), tuple(lengths), dropped=len(too_long))
    return Encodings(tuple(rows), tuple(lengths), truncated=len(too_long) - emptied, emptied=emptied)


def encode_train(
    tokenizer: PreTrainedTokenizerBase, dataset: DatasetVersion, sweep: SweepSection, rows: int | None
) -> Encodings:
    """The training set of a trial; `rows` is how many token ids the model knows."""
    limits = Limits(sweep.max_length, sweep.too_long, rows)
    return encode_all(tokenizer, dataset.split("train"), limits, name="train")


def encode_evaluation(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    sweep: SweepSection,
    rows: int | None,
    shown: Sequence[Message] = (),
) -> Encodings:
    """What a trial's evaluation loss is taken over, of the examples that candidates are chosen by.

    The same for every method. Answers are scored on all of them, however long.
    """
    examples = evenly(examples, sweep.loss_examples)
    limits = Limits(sweep.max_length, sweep.too_long, rows)
    return encode_all(tokenizer, examples, limits, shown, name="evaluation")


def evenly(examples: Sequence[Example], count: int | None) -> Sequence[Example]:
    """At most `count` examples (all, if None), spread over the sets, which follow one another."""
    return examples[:: max(1, -(-len(examples) // (count or max(1, len(examples)))))]


def _refusal(too_long: list[tuple[int, str]], total: int, max_length: int, name: str) -> str:
    longest = sorted(too_long, reverse=True)[:_SHOWN]
    told = ", ".join(f"{key} has {length} tokens" for length, key in longest)
    more = f", and {len(too_long) - _SHOWN} more" if len(too_long) > _SHOWN else ""
    return (
        f"{name}: {len(too_long)} of {total} examples are longer than sweep.max_length = {max_length}: "
        f"{told}{more}"
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, shown: Sequence[Message]
) -> tuple[Encoded, int]:
    """The whole example, and the length of its own turns."""
    try:
        own = len(_whole(tokenizer, example.messages)) if shown else None
        first = len(shown) + (example.messages[0].role == "system")
        messages = example.after(shown).messages
        row = _by_marks(tokenizer, messages, first) or _by_prefixes(tokenizer, messages, first)
    except DataError as error:
        raise DataError(f"example {example.id}: {error.problem}", error.mend) from error
    if not row.supervised:
        raise DataError(
            f"example {example.id}: the chat template of this model writes nothing of its answers",
            "use a template that writes the assistant's turns",
        )
    return row, len(row.ids) if own is None else own


def _by_marks(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first: int) -> Encoded | None:
    """Labels where the template marks what is generated; None where it does not, or not turn by turn."""
    marked = render_marked(tokenizer, messages)
    if marked is None:
        return None
    ids, end = _to_last_end(tokenizer, marked.ids), tokenizer.eos_token_id
    labels = [IGNORED] * len(ids)
    spans = [[i for i, _ in run] for said, run in groupby(enumerate(marked.answers), lambda p: p[1]) if said]
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(spans) != len(turns):
        return None
    for turn, span in zip(turns, spans, strict=True):
        if turn < first:
            continue
        start, stop = span[0], span[-1] + 1
        # Marks may leave the end-of-turn token out, or take in the newline behind it.
        if end in marked.ids[start:stop]:
            stop = start + marked.ids[start:stop].index(end) + 1
        elif stop < len(ids) and ids[stop] == end:
            stop += 1
        labels[start:stop] = ids[start:stop]
    return Encoded(tuple(ids), tuple(labels))


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], first: int) -> Encoded:
    """Labels where rendering one turn more adds tokens behind the generation prompt."""
    full = _whole(tokenizer, messages)
    labels = [IGNORED] * len(full)
    for index, message in enumerate(messages):
        if message.role != "assistant" or index < first:
            continue
        before = prompt_ids(tokenizer, messages[:index])
        upto = full if index == len(messages) - 1 else _whole(tokenizer, messages[: index + 1])
        if full[: len(before)] != before or full[: len(upto)] != upto:
            raise DataError(
                "the chat template of this model rewrites earlier turns",
                "split the conversation into single-turn examples, or use a template with generation marks",
            )
        labels[len(before) : len(upto)] = full[len(before) : len(upto)]
    return Encoded(tuple(full), tuple(labels))


def _whole(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    return _to_last_end(tokenizer, render(tokenizer, messages))


def _to_last_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    # Some templates (SmolLM2's among them) write a newline after the last end-of-turn token. Nobody says it.
    end = tokenizer.eos_token_id
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def _quantile(lengths: Sequence[int], share: float) -> int:
    if len(lengths) == 1:
        return lengths[0]
    return round(statistics.quantiles(lengths, n=100, method="inclusive")[round(share * 100) - 1])
