"""Greedy decoding in slots that are kept full: rows leave as they end, waiting prompts take their places.

A step of a small batch costs nearly what a step of a full one does, as its weights are read either way.
transformers' `generate` goes on with all rows until the last one ends; here a row's slot goes to the next
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from regraft.evals.slots import Slots
from regraft.watchdog import alive

#: Prompts are let in when this share of the slots is free: reading one costs nearly a step, however many come
#: together.
CHANGE_AT = 0.25


def decode(
    base: Any,
    lengths: Sequence[int],
    inputs: Callable[[Sequence[int]], dict[str, Any]],
    *,
    ends: frozenset[int],
    max_new_tokens: int,
    places: int,
) -> Iterator[tuple[int, list[int]]]:
    """Decode prompts greedily, the shortest first.

    Args:
        base: A transformers model that `understands` accepts.
        lengths: Tokens of each prompt.
        inputs: Gives the left-padded inputs of some prompts by their numbers, as `Slots.read` takes them.
        ends: Token ids that end an answer.
        max_new_tokens: Longest answer.
        places: Prompts decoded together at most.

    Yields:
        A prompt's number and its new tokens, without the one that ended them, as soon as it is done.
    """
    waiting = sorted(range(len(lengths)), key=lambda i: lengths[i])
    places = min(places, len(waiting))
    slots = Slots(base, places)
    rows: list[int] = []
    answers: dict[int, list[int]] = {}
    said: list[int] = []
    while waiting or rows:
        free = places - len(rows)
        if waiting and free >= min(max(1, CHANGE_AT * places), len(waiting)):
            some, waiting = waiting[:free], waiting[free:]
            answers |= {prompt: [] for prompt in some}
            new, rows = slots.read(inputs(some)), rows + some
            fresh = range(len(rows) - len(some), len(rows))
        else:
            new, fresh = slots.step(said), range(len(rows))
        # The same as `argmax`, which takes five times as long for bf16 on a CPU (torch 2.13).
        said[fresh.start :] = new.max(-1).indices.tolist()
        alive()
        for slot in reversed(fresh):
            prompt, token = rows[slot], said[slot]
            if token not in ends:
                answers[prompt].append(token)
            if token in ends or len(answers[prompt]) == max_new_tokens:
                slots.leave(slot)
                for own in (rows, said):  # as the slots do
                    own[slot] = own[-1]
                    own.pop()
                yield prompt, answers.pop(prompt)
