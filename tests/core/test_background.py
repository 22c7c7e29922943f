"""What is logged while MLflow is away: nothing is lost, and nobody waits."""

from __future__ import annotations

import threading

import pytest

from regraft.errors import ServiceError
from regraft.tracking.background import InOrder, patiently


def test_calls_are_made_in_order_and_nobody_waits_for_them() -> None:
    gate, made = threading.Event(), []
    later = InOrder()
    later.put(gate.wait)
    for number in range(5):
        later.put(lambda number=number: made.append(number))
    assert made == []
    gate.set()
    later.wait()
    assert made == [0, 1, 2, 3, 4]


def test_a_call_is_made_again_while_nobody_answers_and_those_behind_it_wait() -> None:
    tries, made = iter([True, True, False]), []

    def away() -> None:
        if next(tries):
            raise ServiceError("gone", away=True)
        made.append("first")

    later = InOrder(pause=0)
    later.put(away)
    later.put(lambda: made.append("second"))
    later.wait()
    assert made == ["first", "second"]


def test_a_server_that_refuses_or_stays_away_is_an_error_once() -> None:
    def refused() -> None:
        raise ServiceError("no such run")

    def away() -> None:
        raise ServiceError("gone", away=True)

    later, made = InOrder(patience=0, pause=0), []
    later.put(refused)
    later.put(lambda: made.append("after"))
    with pytest.raises(ServiceError, match="no such run"):
        later.wait()
    assert made == ["after"]
    later.wait()
    with pytest.raises(ServiceError, match="gone"):
        patiently(away, patience=0, pause=0)
