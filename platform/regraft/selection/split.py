"""The two parts of every evaluation set: one to choose by, one to judge what was chosen.

The best of many candidates owes some of its lead to luck on the examples that it was chosen by. What it is
worth shows on examples that played no part in the choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from regraft.records import Example


def is_final(example_id: str, share: float) -> bool:
    """Whether an example is of the final part.

    By a hash of its id alone: whatever else a set holds or comes to hold, an example that once was chosen by
    is never judged by.

    Args:
        example_id: Its id.
        share: The share of examples that the final part gets, on average.
    """
    digest = hashlib.sha256(f"part:{example_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def selection_part(examples: Iterable[Example], share: float) -> tuple[Example, ...]:
    """What candidates are chosen by, in order."""
    return tuple(e for e in examples if not is_final(e.id, share))


def final_part(examples: Iterable[Example], share: float) -> tuple[Example, ...]:
    """What the chosen are judged by, in order; with a share of 0 the same as they are chosen by."""
    return tuple(e for e in examples if share == 0 or is_final(e.id, share))
