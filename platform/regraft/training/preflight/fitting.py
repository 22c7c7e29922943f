"""How a trial gets under a limit: smaller micro-batches, activations computed again, more cards."""

from __future__ import annotations

from pathlib import Path

from regraft.methods import Method
from regraft.methods.base import DTypeName
from regraft.training.preflight.memory import GIB, Batching, predict

#: Memory of the cards people ask about, in bytes.
CARDS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9}


def micro_tokens(
    method: Method, folder: Path, dtype: DTypeName, device: str, batching: Batching, limit_gib: float
) -> int:
    """The largest micro-batch that training fits with: the batch, or half of it, or half of that.

    No smaller than the longest row; whether that fits is for the caller to see.
    """
    tokens = batching.tokens_per_batch
    while tokens // 2 >= batching.max_length:
        tried = batching._replace(tokens_per_batch=tokens)
        if predict(method, folder, dtype, device, tried).training_gib <= limit_gib:
            break
        tokens //= 2
    return tokens


def mend(
    method: Method, folder: Path, dtype: DTypeName, device: str, batching: Batching, limit_gib: float
) -> str:
    """How a trial gets under a limit: in micro-batches, which is done anyway; by other settings; or not."""
    for again in (batching.gradient_checkpointing, True):
        smaller = batching._replace(gradient_checkpointing=again)
        tokens = micro_tokens(method, folder, dtype, device, smaller, limit_gib)
        words = ["gradient_checkpointing"] if again != batching.gradient_checkpointing else []
        rows = batching.answer_rows
        while True:
            fitted = smaller._replace(tokens_per_batch=tokens, answer_rows=rows)
            found = predict(method, folder, dtype, device, fitted)
            if found.gib <= limit_gib or found.training_gib > limit_gib or rows == 1:
                break
            rows //= 2
        if found.gib <= limit_gib:
            words += [f"evaluate.batch_size {rows}"] if rows < batching.answer_rows else []
            words += [f"micro-batches of {tokens} tokens"] if tokens < batching.tokens_per_batch else []
            return "with " + " and ".join(words) if words else "fits"
    return "does not fit with smaller batches either"


def on_card(method: Method, folder: Path, batching: Batching, bytes_of_card: float) -> str:
    """How a trial fits on cards of a size: as it is, mended, or shared among how many of them."""
    limit = bytes_of_card / GIB
    if not (mended := mend(method, folder, "bfloat16", "cuda", batching, limit)).startswith("does not"):
        return mended
    again = batching._replace(
        tokens_per_batch=batching.max_length, gradient_checkpointing=True, answer_rows=1
    )
    for cards in (2, 4, 8, 16, 32, 64):
        if predict(method, folder, "bfloat16", "cuda", again._replace(shards=cards)).gib <= limit:
            return f"sharded over {cards}"
    return "no"
