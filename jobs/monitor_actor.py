"""The monitor as a detached actor of the cluster, and what can be said of all that watch a model.

An actor and not a Ray Serve deployment: while Serve updates a deployment, the old replica and the new one run
side by side; and `serve deploy` with the endpoint's config ends every application that is not in it. The
cluster restarts a detached actor as well, on another node if need be, and has one of a name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from jobs.console import say
from jobs.heartbeat import Found, Heartbeat, heartbeat, running
from jobs.monitor import Loop, Round, one_round
from jobs.workspace import Connection, Workspace
from monitoring.schedule import settling
from regraft.cluster import local
from regraft.cluster.locks import NAMESPACE
from regraft.config import Experiment, experiment_file
from regraft.errors import RegraftError, ServiceError
from regraft.processes import end_process
from regraft.tracking.ledger import Ledger

#: How long an actor may take to answer; one that is being restarted takes as long as its node.
_PATIENCE = 60.0
#: How long a round may take to end when the actor is to stop; after that it is cut short.
_LAST_ROUND = 600.0


class Monitor:
    """Watches a model from within the cluster; see `Loop` for the arguments.

    Its loop begins with the actor, so that a restarted one goes on without anybody's call.
    """

    def __init__(
        self, path: str, name: str, every: timedelta, settle: timedelta, work: Round, metrics: Path | None
    ) -> None:
        import ray

        # For what a round starts; the variable of a job's driver, which this is not.
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        self._path = Path(path)
        self._stop = threading.Event()
        self._loop = Loop(self._path, name, every, settle, where="actor", work=work, metrics=metrics)
        self._thread = threading.Thread(target=self._run, name="monitor")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run(self._stop)
        except BaseException:
            logging.getLogger(__name__).exception("the monitor's loop ended: the actor is to be restarted")
            os._exit(1)

    def beat(self) -> dict[str, Any]:
        """How it is: a `Heartbeat`, as JSON."""
        return self._loop.beat.model_dump(mode="json")

    def problem(self) -> str:
        """Why this node cannot read the experiment; empty if it can."""
        try:
            Experiment.load(self._path)
        except RegraftError as error:
            return error.problem
        return ""

    def stop(self) -> bool:
        """End the loop after the round under way; whether it ended in time."""
        self._stop.set()
        self._thread.join(_LAST_ROUND)
        return not self._thread.is_alive()


def actor_name(name: str) -> str:
    """What the actor that watches a model is called on its cluster."""
    return f"monitor:{name}"


def deploy(path: Path, experiment: Experiment, connection: Connection, work: Round = one_round) -> Heartbeat:
    """Have the connected cluster watch a model; one that watches it already goes on.

    Args:
        path: The experiment's file, at the same place on all nodes.
        experiment: The same, read.
        connection: Where things are.
        work: A round.

    Raises:
        ServiceError: If the actor does not start, or its node cannot read the experiment.
    """
    import ray

    actor = (
        ray.remote(Monitor)
        .options(
            name=actor_name(experiment.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            # A round must not wait for a sweep to end, and answers come while one runs.
            num_cpus=0,
            max_concurrency=4,
            runtime_env={
                "env_vars": {
                    "MLFLOW_TRACKING_URI": connection.tracking_uri,
                    "REGRAFT_WORKSPACE": str(connection.workspace),
                }
            },
        )
        .remote(
            str(path.resolve()),
            experiment.name,
            timedelta(seconds=experiment.monitor.every_seconds),
            settling(experiment.serve),
            work,
            experiment.monitor.metrics_file,
        )
    )
    try:
        if problem := ray.get(actor.problem.remote(), timeout=_PATIENCE):
            ray.kill(actor)
            raise ServiceError(
                f"the monitor's node cannot read the experiment: {problem}",
                f"have {path.resolve().parent} on all nodes, in their image or on a shared disk",
            )
        return Heartbeat.model_validate(ray.get(actor.beat.remote(), timeout=_PATIENCE))
    except ray.exceptions.RayError as error:
        raise ServiceError(
            f"the monitor of {experiment.name} does not start: {str(error).splitlines()[0]}",
            f"see the actor {actor_name(experiment.name)} in Ray's dashboard",
        ) from error


def deployed(name: str) -> Heartbeat | None:
    """How the actor is that watches a model on the connected cluster; None if there is none.

    Raises:
        ServiceError: If it does not answer.
    """
    import ray

    try:
        actor = ray.get_actor(actor_name(name), namespace=NAMESPACE)
    except ValueError:
        return None
    try:
        return Heartbeat.model_validate(ray.get(actor.beat.remote(), timeout=_PATIENCE))
    except ray.exceptions.RayError as error:
        raise ServiceError(
            f"the actor {actor_name(name)} has not answered for {_PATIENCE:.0f} s",
            "see in Ray's dashboard whether it is being restarted",
        ) from error


def withdraw(name: str) -> bool:
    """End the actor that watches a model on the connected cluster, after its round; whether there was one."""
    import ray

    try:
        actor = ray.get_actor(actor_name(name), namespace=NAMESPACE)
    except ValueError:
        return False
    try:
        ended = ray.get(actor.stop.remote(), timeout=_LAST_ROUND + _PATIENCE)
    except ray.exceptions.RayError as error:
        say(f"the actor is killed: {str(error).splitlines()[0]}")
    else:
        if not ended:
            say(f"the actor's round has not ended in {_LAST_ROUND:.0f} s and is cut short")
    ray.kill(actor, no_restart=True)
    return True


def run_deploy(path: Path) -> None:
    """Deploy from the command line."""
    path = experiment_file(path)
    experiment = Experiment.load(path)
    connection = Workspace().connect(experiment)
    local.join(connection.ray_address)
    before = deployed(experiment.name)
    beat = deploy(path, experiment, connection)
    if before is None:
        say(f"{experiment.name} is watched every {beat.every_seconds:g} s on {beat.host}, process {beat.pid}")
    else:
        say(f"{experiment.name} is watched already, since {_time(beat.since)}: left as it is")


def run_stop(path: Path) -> None:
    """End what watches a model: the process of this workspace, and the actor of its cluster."""
    experiment, workspace = Experiment.load(path), Workspace()
    ended = []
    beat = heartbeat(workspace, experiment.name)
    if beat is not None and running(workspace, experiment.name):
        _end(workspace, beat)
        ended.append(f"process {beat.pid}")
    if _join(experiment, workspace) and withdraw(experiment.name):
        ended.append(f"actor {actor_name(experiment.name)}")
    say(f"ended {', '.join(ended)}" if ended else f"nothing watched {experiment.name}")


def _end(workspace: Workspace, beat: Heartbeat) -> None:
    """End a monitor's process, after its round.

    Raises:
        ServiceError: If it runs on another machine.
    """
    if beat.host != socket.gethostname():
        raise ServiceError(
            f"the monitor of {beat.model} is process {beat.pid} on {beat.host}",
            "end it there: `regraft monitor stop`",
        )
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(beat.pid)
        if "monitor" in process.cmdline():
            process.terminate()
    deadline = time.monotonic() + _LAST_ROUND
    # Its lock and not the process, which may stay as a zombie where nobody waits for it.
    while running(workspace, beat.model):
        if time.monotonic() > deadline:
            say(f"its round has not ended in {_LAST_ROUND:.0f} s and is cut short")
            end_process(beat.pid, named="monitor")
            return
        time.sleep(0.2)


def run_status(path: Path) -> bool:
    """Say what watches a model, and what was found last; whether anything watches it."""
    experiment, workspace = Experiment.load(path), Workspace()
    watched = False
    beat = heartbeat(workspace, experiment.name)
    if beat is not None and running(workspace, experiment.name):
        watched = True
        _show(beat)
    elif beat is not None:
        say(f"process {beat.pid} of {beat.host} has ended; its last round began {_time(beat.began)}")
    if _join(experiment, workspace):
        try:
            beat = deployed(experiment.name)
        except ServiceError as error:
            say(str(error))
        else:
            if beat is not None:
                watched = True
                _show(beat)
    try:
        newest = Ledger(workspace.tracking_uri(experiment), experiment.name).reports(experiment.name, limit=1)
    except ServiceError as error:
        say(f"the last verdict is not known: {error.problem}")
    else:
        say(f"last verdict: {Found(report=newest[0])}" if newest else "last verdict: none yet")
    if not watched:
        say(f"nothing watches {experiment.name}: `regraft monitor run` or `regraft monitor deploy` does")
    return watched


def _join(experiment: Experiment, workspace: Workspace) -> bool:
    """Reach the cluster, where one is known; say why not."""
    services = workspace.services()
    address = experiment.cluster.address or (services.ray_address if services.ray else None)
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return False
    try:
        local.join(address)
    except ServiceError as error:
        say(f"not asked: {error.problem}")
        return False
    return True


def _show(beat: Heartbeat) -> None:
    kind = "process" if beat.where == "process" else f"actor {actor_name(beat.model)}, process"
    say(f"{kind} {beat.pid} on {beat.host}, since {_time(beat.since)}, every {beat.every_seconds:g} s")
    if beat.under_way:
        say(f"  a round is under way since {_time(beat.began)}")
    else:
        say(f"  last round {_time(beat.began)} to {_time(beat.ended)}, next {_time(beat.due)}")
    if beat.failures:
        say(f"  {beat.failures} rounds failed one after the other, the last: {beat.problem}")
    say(f"  last window it checked: {beat.newest}" if beat.newest else "  no window checked by it yet")


def _time(when: Any) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S %Z}" if when else "never"
