"""What is logged while MLflow is away: nothing is lost, and nobody waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient

from regraft.data.dataset import make_dataset
from regraft.errors import ServiceError
from regraft.processes import free_port
from regraft.records import Example, LossPoint, Message
from regraft.tracking.background import InOrder, patiently
from regraft.tracking.runs import Tracker
from regraft.tracking.server import start_server, stop_server


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


def test_a_trial_goes_on_while_the_server_is_away_and_all_of_it_arrives(tmp_path: Path) -> None:
    turns = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    dataset = make_dataset(
        "d", {"train": (Example(id="1", messages=turns),)}, sources={}, leakage_jaccard=1.0
    )  # fmt: skip
    port = free_port(0, "tracking.port", "127.0.0.1")
    server = start_server(tmp_path, "127.0.0.1", port)
    tracker = Tracker(server.url, "away")
    sweep = tracker.start_sweep("s", params={}, dataset=dataset)
    run = tracker.start_trial(sweep, sweep_id="s", key="k", label="k", params={}, dataset=dataset)
    stop_server(server.pid)
    with pytest.raises(ServiceError) as caught:
        tracker.find_trial("k")
    assert caught.value.away
    for step in range(1, 6):  # returns though nobody answers: the server comes back only afterwards
        run.log_curve([LossPoint(step=step, tokens_seen=step, train_loss=1 / step, learning_rate=0.1)])
    server = start_server(tmp_path, "127.0.0.1", port)
    try:
        run.settle()
        history = MlflowClient(server.url).get_metric_history(run.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == [(step, 1 / step) for step in range(1, 6)]
    finally:
        stop_server(server.pid)
