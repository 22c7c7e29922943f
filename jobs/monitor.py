"""The monitor as a process: rounds of checks on a schedule, or one round.

What was checked, decided and done is in MLflow. So each of them goes on where another left off, and two at
once do not check a window twice: the round itself sees to that, not the schedule.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from jobs.console import say
from jobs.heartbeat import Found, Heartbeat, heartbeat_file, sole
from jobs.workspace import Workspace
from monitoring.gauges import Gauges
from monitoring.schedule import run_forever, settling
from regraft.config import Experiment, experiment_file
from regraft.errors import RegraftError, ServiceError

#: Status with which `regraft monitor once` ends if it found an alarm.
ALARM = 3
#: A round that takes longer hangs, and is ended: all that it does may be cut short anywhere.
_LONGEST_ROUND_SECONDS = 6 * 3600.0


#: One round: the experiment's file and the present, to what was found in the windows that were due.
Round = Callable[[Path, datetime], Sequence[Found]]


class Loop:
    """A monitor's rounds on the grid of its interval, and its heartbeat.

    Args:
        path: The experiment's file; each round reads it anew.
        name: The experiment's name.
        every: From one check to the next.
        settle: How long after a tick its round runs.
        where: What the heartbeat says of it.
        work: A round.
        file: Where the heartbeat is written at each change; nowhere if None.
        metrics: Where Prometheus' textfile collector looks, if anywhere.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        every: timedelta,
        settle: timedelta,
        *,
        where: Literal["process", "actor"],
        work: Round,
        file: Path | None = None,
        metrics: Path | None = None,
    ) -> None:
        self._path, self._every, self._settle, self._work = path, every, settle, work
        self._file, self._metrics = file, metrics
        self.gauges = Gauges()
        self.beat = Heartbeat(
            model=name,
            where=where,
            pid=os.getpid(),
            host=socket.gethostname(),
            since=datetime.now(UTC),
            every_seconds=every.total_seconds(),
        )
        self._note()

    def run(self, stop: threading.Event) -> None:
        """Run rounds until `stop` is set; one under way is finished first."""
        run_forever(
            self._round,
            self._every.total_seconds(),
            stop,
            settle_seconds=self._settle.total_seconds(),
            planned=self._planned,
        )

    def _round(self) -> None:
        now = datetime.now(UTC)
        self._note(began=now)
        for found in self._work(self._path, now):
            # What users wrote stays in the report's own page and run.
            plain = found.report.model_copy(update={"attribution": None})
            self._note(newest=found.model_copy(update={"report": plain}))
            self.gauges.update(found.report, found.decision)
            if self._metrics is not None:
                self.gauges.write(self._metrics)

    def _planned(self, due: datetime, failure: Exception | None) -> None:
        if failure is None and self.beat.failures:
            say(f"a round succeeded again after {self.beat.failures} that failed")
        if failure is not None:
            self.gauges.failed(self.beat.model)
        self._note(
            ended=datetime.now(UTC),
            due=due,
            rounds=self.beat.rounds + 1,
            failures=self.beat.failures + 1 if failure else 0,
            problem=str(failure) or type(failure).__name__ if failure else "",
        )

    def _note(self, **update: Any) -> None:
        self.beat = self.beat.model_copy(update=update)
        if self._file is None:
            return
        scratch = self._file.with_suffix(".part")
        scratch.write_text(self.beat.model_dump_json(indent=1), encoding="utf-8")
        scratch.replace(self._file)


def one_round(path: Path, now: datetime) -> Sequence[Found]:
    """Check the windows that are due, decide, and carry out what was decided.

    Args:
        path: The experiment's file.
        now: The present.

    Raises:
        RegraftError: If a service cannot be reached or there is nothing to watch yet.
    """
    experiment = Experiment.load(path)
    connection = Workspace().connect(experiment)
    # After the services are known to be there: this takes seconds.
    from jobs.check_drift import watch

    watched = watch(path, experiment, connection, now=now)
    return [Found(report=each.report, decision=each.decision) for each in watched]


def in_child(work: Round, path: Path, now: datetime) -> Sequence[Found]:
    """Run a round in a process of its own.

    What ends that process ends no monitor: Ray ends any that it has lost its cluster in, and memory may run
    out. Nor does the monitor hold a gigabyte of libraries and models between two rounds.

    Raises:
        RegraftError: What the round raised, or that its process ended or hung.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, path, now, there), name="monitoring round")
    process.start()
    there.close()
    try:
        hangs = not here.poll(_LONGEST_ROUND_SECONDS)
        found = None if hangs else here.recv()
    except EOFError:
        found = None
        hangs = False
    finally:
        here.close()
    if hangs:
        process.kill()
    process.join()
    if isinstance(found, RegraftError):
        raise found
    if found is None:
        why = f"hung for {_LONGEST_ROUND_SECONDS / 3600:g} hours" if hangs else _end(process.exitcode)
        raise ServiceError(f"the process of the round {why}", "see what it wrote above; it is tried again")
    return [Found.model_validate_json(text) for text in found]


def _child(work: Round, path: Path, now: datetime, gave: Any) -> None:
    # An interrupt at the terminal is for the monitor, which lets this round end.
    os.setsid()
    try:
        found: Any = [each.model_dump_json() for each in work(path, now)]
    except RegraftError as error:
        found = error
    gave.send(found)


def _end(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def run(path: Path, work: Round = one_round) -> None:
    """Watch in the foreground, until SIGTERM or an interrupt; a round under way is finished first.

    Raises:
        ConfigError: If the experiment's file is wrong.
        ServiceError: If a monitor of this model runs in this workspace already.
    """
    path = experiment_file(path).resolve()
    experiment = Experiment.load(path)
    workspace = Workspace()
    with sole(workspace, experiment.name):
        stop = threading.Event()

        def end(*_: object) -> None:
            # Not from here: the event's own lock may be held by what this interrupts.
            threading.Thread(target=stop.set).start()

        before = {name: signal.signal(name, end) for name in (signal.SIGTERM, signal.SIGINT)}
        every = timedelta(seconds=experiment.monitor.every_seconds)
        say(f"watching {experiment.name} every {every.total_seconds():g} s, process {os.getpid()}")
        try:
            loop = Loop(
                path,
                experiment.name,
                every,
                settling(experiment.serve),
                where="process",
                work=lambda path, now: in_child(work, path, now),
                file=heartbeat_file(workspace, experiment.name),
                metrics=experiment.monitor.metrics_file,
            )
            if (port := experiment.monitor.metrics_port) is not None:
                say(f"metrics at http://127.0.0.1:{loop.gauges.serve(port=port)}/metrics")
            loop.run(stop)
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
        say("ended")


def once(path: Path, work: Round = one_round) -> bool:
    """One round here and now, for a scheduler that is there already; whether a window alarms."""
    path = experiment_file(path).resolve()
    found = work(path, datetime.now(UTC))
    gauges = Gauges()
    for each in found:
        say(str(each))
        gauges.update(each.report, each.decision)
    if found and (file := Experiment.load(path).monitor.metrics_file) is not None:
        gauges.write(file)
    if not found:
        say("no window is due")
    return any(each.alarms for each in found)
