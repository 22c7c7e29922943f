"""Everything up, and down again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from jobs.console import console, say
from jobs.heartbeat import running
from jobs.quickstart import check_ports
from jobs.serve import serve
from jobs.workspace import Service, Workspace
from regraft.cluster import local
from regraft.config import Experiment, experiment_file


def up(path: Path) -> None:
    """Start MLflow, Ray, the endpoint and the monitor, and leave them running.

    Without a champion the endpoint and the monitor wait for a sweep: the rest comes up.
    """
    path = experiment_file(path)
    experiment = Experiment.load(path)
    workspace = Workspace()
    check_ports(experiment, workspace)
    before = workspace.services()
    try:
        lines = _start(path, experiment, workspace)
    except BaseException:
        workspace.stop(tuple(n for n in ("monitor", "ray", "mlflow") if getattr(before, n) is None))
        raise
    console.print("\n".join([*lines, "`regraft down` ends them"]), markup=False)


def _start(path: Path, experiment: Experiment, workspace: Workspace) -> list[str]:
    """Start everything; gives a line for each service."""
    services = workspace.start(experiment, say)
    connection = workspace.connect(experiment)
    local.join(connection.ray_address)
    lines = [f"MLflow    {connection.tracker(experiment).leaderboard_url()}"]
    if services.ray:
        lines.append(f"Ray       {services.ray.url}")
    if connection.registry.by_alias(experiment.name, "champion") is None:
        lines.append("endpoint  not up: no champion yet; run `regraft sweep`, then `regraft up` again")
        return lines
    lines.append(f"endpoint  {serve(experiment, connection)}/v1")
    if services.monitor is None and not running(workspace, experiment.name):
        services = services.model_copy(update={"monitor": _start_monitor(path, workspace)})
        workspace.save(services)
    log = workspace.root / "monitor.log"
    lines.append(f"monitor   every {experiment.monitor.every_seconds:g} s, log {log}")
    return lines


def _start_monitor(path: Path, workspace: Workspace) -> Service:
    with (workspace.root / "monitor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "monitor", "run", str(path.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "REGRAFT_WORKSPACE": str(workspace.root)},
        )
    started = psutil.Process(process.pid).create_time()
    return Service(pid=process.pid, started=started, url="")


def down() -> None:
    """End this workspace's services."""
    ended = Workspace().stop()
    say(f"ended {', '.join(ended)}" if ended else "nothing was running")
