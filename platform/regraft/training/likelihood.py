"""How likely a loaded candidate finds text: the references of examples, and text of any other kind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError
from regraft.evals.generation import base_of
from regraft.records import Example, Likelihood
from regraft.training.batches import IGNORED, Encoded, bucket, collate
from regraft.training.encoding import encode
from regraft.training.loss import supervised_positions_only
from regraft.training.modes import autocast
from regraft.watchdog import alive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Tokens that pass through together: logits of a large vocabulary are what takes the memory.
_TOKENS_AT_ONCE = 1024
_BINS = 10
_NO_LIMIT = 1 << 40


def reference_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], device: str
) -> list[Likelihood | None]:
    """How likely the model finds each example's last turn, end-of-turn token included.

    Args:
        model: A transformers or PEFT model in evaluation mode.
        tokenizer: Its tokenizer.
        examples: The examples, each with all of its turns.
        device: Where the model is.

    Returns:
        One an example; None where the chat template does not let a turn's tokens be told.
    """
    rows: list[Encoded | None] = []
    for example in examples:
        try:
            rows.append(_last_turn(encode(tokenizer, example, _NO_LIMIT)))
        except DataError:
            rows.append(None)
    found = iter(_likelihoods(model, [row for row in rows if row is not None], tokenizer, device))
    return [
        next(found).model_copy(update={"utf8_bytes": len(example.reference.encode())})
        if row is not None
        else None
        for row, example in zip(rows, examples, strict=True)
    ]


def text_nats(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: str) -> float:
    """Mean negative log-probability of a token of plain texts, in nats, without any chat template."""
    rows = []
    for text in texts:
        ids = tuple(tokenizer(text)["input_ids"])
        rows.append(Encoded(ids, (IGNORED, *ids[1:])))
    found = _likelihoods(model, rows, tokenizer, device)
    return sum(f.nats for f in found) / sum(f.tokens for f in found)


def _last_turn(row: Encoded) -> Encoded:
    """Labels on the last run of supervised tokens alone."""
    runs = [
        [i for i, _ in run]
        for said, run in groupby(enumerate(row.labels), lambda pair: pair[1] != IGNORED)
        if said
    ]
    first = runs[-1][0]
    return Encoded(row.ids, (*(IGNORED,) * first, *row.labels[first:]))


def _likelihoods(
    model: Any, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, device: str
) -> list[Likelihood]:
    import torch

    place = {id(row): index for index, row in enumerate(rows)}
    found: list[Likelihood | None] = [None] * len(rows)
    pad_id = int(tokenizer.pad_token_id)
    group: list[Encoded] = []

    def see(logits: torch.Tensor, targets: torch.Tensor, where: torch.Tensor) -> None:
        logs = logits.log_softmax(-1)
        nats = -logs.gather(-1, targets[:, None])[:, 0]
        top, said = logs.max(-1)
        right = said == targets
        for number, row in enumerate(group):
            mine = where == number
            found[place[id(row)]] = _summed(nats[mine], top[mine].exp(), right[mine])

    base = base_of(model)
    with torch.inference_mode(), autocast(model, device), supervised_positions_only(base, see):
        for group in bucket(rows, _TOKENS_AT_ONCE, rng=None):
            model(**collate(group, pad_id).to(device).inputs)
            alive()
    return [f for f in found if f is not None]


def _summed(nats: torch.Tensor, top: torch.Tensor, right: torch.Tensor) -> Likelihood:
    import torch

    bins = (top * _BINS).long().clamp(max=_BINS - 1).cpu()
    counts = torch.bincount(bins, minlength=_BINS).tolist()
    sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, top.double().cpu()).tolist()
    hits = torch.bincount(bins, weights=right.double().cpu(), minlength=_BINS).tolist()
    return Likelihood(
        tokens=int(nats.numel()),
        utf8_bytes=0,
        nats=float(nats.double().sum()),
        bins=tuple((int(n), round(s, 6), int(h)) for n, s, h in zip(counts, sums, hits, strict=True)),
    )
