"""The monitor's process, once and as an actor: what ends it, what does not, and that two never check twice."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.heartbeat import Found, Heartbeat, heartbeat, running
from jobs.monitor import Loop, in_child, once, run
from jobs.monitor_actor import deploy, deployed, run_status, withdraw
from jobs.workspace import Connection, Workspace
from monitoring.schedule import EPOCH
from regraft.config import Experiment
from regraft.errors import ServiceError
from regraft.records import DriftReport

EVERY = timedelta(seconds=0.5)


def found(status: str = "stable", **more: Any) -> Found:
    given = {
        "id": "r", "model": "tiny", "model_version": 1, "reference_id": "f", "window_start": "a",
        "window_end": "b", "rows": 200, "reference_rows": 1000, "status": status, "p_value": 0.5,
        "effect": 0.0, "alpha": 0.01, "summary": "All is as it was.",
    }  # fmt: skip
    return Found(report=DriftReport.model_validate(given | more))


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def case(tmp_path: Path, tiny_experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny experiment, checked often, with a workspace of its own and no services."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REGRAFT_WORKSPACE", str(tmp_path / "workspace"))
    shutil.copytree(tiny_experiment, tmp_path / "case")
    file = tmp_path / "case" / "regraft.yaml"
    experiment = yaml.safe_load(file.read_text())
    experiment["monitor"] = {"every_seconds": EVERY.total_seconds()}
    file.write_text(yaml.safe_dump(experiment))
    return file


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "monitor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_process_outlives_missing_services_is_alone_and_is_ended_in_order(
    case: Path, closed_port: int, capsys
):
    experiment = yaml.safe_load(case.read_text())
    experiment["tracking"] = {"uri": f"http://127.0.0.1:{closed_port}"}
    case.write_text(yaml.safe_dump(experiment))
    nobody = Heartbeat(model="", where="process", pid=0, host="", since=datetime.now(UTC), every_seconds=1)
    monitor = command("run", str(case))
    try:
        assert monitor.stdout is not None
        said = []
        for line in monitor.stdout:
            said.append(line)
            if "the next is due at" in line:
                break
        text = "".join(said)
        assert "a monitoring round failed: no MLflow server answers" in text
        assert "Traceback" not in text
        assert running(Workspace(), "tiny")
        until(lambda: (heartbeat(Workspace(), "tiny") or nobody).failures > 0)
        beat = heartbeat(Workspace(), "tiny")
        assert beat is not None
        assert (beat.pid, beat.where, beat.model) == (monitor.pid, "process", "tiny")
        assert f"no MLflow server answers at http://127.0.0.1:{closed_port}" in beat.problem

        with pytest.raises(ServiceError, match=f"runs in .* already: process {monitor.pid} since"):
            run(case)
        assert run_status(case)
        out = capsys.readouterr().out
        assert f"process {monitor.pid} on" in out
        assert "rounds failed one after the other, the last: no MLflow server answers" in out

        stop = command("stop", str(case))  # sends SIGTERM
        assert f"ended process {monitor.pid}" in stop.communicate(timeout=60)[0]
        assert stop.returncode == 0
        out, _ = monitor.communicate(timeout=60)
        assert monitor.returncode == 0, out
        assert out.rstrip().endswith("ended")
    finally:
        monitor.kill()
    assert not running(Workspace(), "tiny")
    assert not run_status(case)
    out = capsys.readouterr().out
    assert f"process {monitor.pid} of {socket.gethostname()} has ended" in out
    assert "nothing watches tiny" in out


@pytest.fixture
def works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rounds that another process can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "pretended_rounds.py").write_text(
        textwrap.dedent("""
        import os
        from regraft.errors import ServiceError
        from jobs.heartbeat import Found

        def checks(path, now):
            return [Found.model_validate_json(path.read_text())]

        def dies(path, now):
            os.kill(os.getpid(), 9)

        def refuses(path, now):
            raise ServiceError("no MLflow", "start it", away=True)

        def errs(path, now):
            raise KeyError("a fault of the program")
        """)
    )
    monkeypatch.syspath_prepend(folder)
    import pretended_rounds

    return pretended_rounds


def test_a_round_in_a_child_gives_its_reports_and_its_death_is_an_error(works: Any, tmp_path: Path, capfd):
    file = tmp_path / "report.json"
    file.write_text(found().model_dump_json())
    now = datetime.now(UTC)
    assert in_child(works.checks, file, now) == [found()]
    with pytest.raises(ServiceError, match="the process of the round was ended by SIGKILL"):
        in_child(works.dies, file, now)
    with pytest.raises(ServiceError, match="no MLflow\n  mend: start it") as caught:
        in_child(works.refuses, file, now)
    assert caught.value.away
    with pytest.raises(ServiceError, match="ended with status 1"):
        in_child(works.errs, file, now)
    assert "a fault of the program" in capfd.readouterr().err


def test_the_heartbeat_tells_of_failures_and_of_the_verdict(tmp_path: Path, capsys):
    stop, beats = threading.Event(), []
    file = tmp_path / "beat.json"

    def work(path: Path, now: datetime) -> list[Found]:
        beats.append(Heartbeat.model_validate_json(file.read_text()))
        if len(beats) < 3:
            raise ServiceError("Ray is away")
        stop.set()
        return [found(), found("drift", summary="A new topic.")]

    loop = Loop(
        tmp_path, "tiny", timedelta(seconds=0.01), timedelta(0), where="process", work=work, file=file,
        metrics=tmp_path / "regraft.prom",
    )  # fmt: skip
    loop.run(stop)
    assert [b.under_way for b in beats] == [True] * 3
    assert [(b.rounds, b.failures, b.problem) for b in beats] == [
        (0, 0, ""), (1, 1, "Ray is away"), (2, 2, "Ray is away"),
    ]  # fmt: skip
    last = Heartbeat.model_validate_json(file.read_text())
    assert last == loop.beat
    assert (last.rounds, last.failures, last.problem) == (3, 0, "")
    assert str(last.newest) == "a to b: drift: A new topic."
    assert not last.under_way
    assert last.due is not None
    assert last.began is not None
    assert last.due > last.began
    figures = generate_latest(loop.gauges.registry).decode()
    assert 'regraft_monitor_failures_total{model="tiny",version=""} 2.0' in figures
    assert 'regraft_monitor_checks_total{model="tiny",status="drift",version="1"} 1.0' in figures
    assert (
        'last_verdict{model="tiny",status="drift",version="1"} 1.0' in (tmp_path / "regraft.prom").read_text()
    )
    assert "succeeded again after 2 that failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("windows", "alarm"),
    [
        ([], False),
        ([found()], False),
        ([found("insufficient")], False),
        ([found("suspected")], False),
        ([found("drift"), found()], True),
        ([found(alarms=("error_rate",))], True),
    ],
)
def test_one_round_says_whether_there_is_an_alarm(windows: list[Found], alarm: bool, case: Path):
    text = case.read_text().replace("monitor:\n", "monitor:\n  metrics_file: regraft.prom\n")
    case.write_text(text)
    assert once(case, lambda path, now: windows) is alarm
    written = case.with_name("regraft.prom")
    assert written.exists() is bool(windows)


def test_once_says_what_is_missing(case: Path):
    with pytest.raises(ServiceError, match="no MLflow server is known"):
        once(case.parent)


@pytest.mark.parametrize(("alarm", "status"), [(True, 3), (False, 0)])
def test_cron_sees_an_alarm_by_the_status(alarm: bool, status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.monitor.once", lambda path: alarm)
    assert CliRunner().invoke(app, ["monitor", "once", "."]).exit_code == status


def counting(folder: Path, *, whole: bool = False) -> Callable[[Path, datetime], list[Found]]:
    """A round as the real one is: under the model's lock it checks what is due, and writes that down.

    The lock is the cluster's if `whole`, else a file's, which is quicker.
    """

    def work(path: Path, now: datetime) -> list[Found]:
        from monitoring.schedule import due
        from regraft.cluster.locks import cluster_lock

        noted = folder / "checked"
        with noted.open("ab") as held, cluster_lock("pretended:tiny") if whole else nullcontext():
            if not whole:
                fcntl.flock(held, fcntl.LOCK_EX)
            lines = noted.read_text().splitlines()
            covered = datetime.fromisoformat(lines[-1].split()[0])
            time.sleep(0.1)  # a check takes its time: without the lock, another would begin the same one
            for tick in due(covered, now, EVERY):
                with noted.open("a") as file:
                    file.write(f"{tick.isoformat()} {os.getpid()}\n")
        return []

    start = EPOCH + (datetime.now(UTC) - EPOCH) // EVERY * EVERY - 3600 * EVERY
    if not (folder / "checked").exists():
        (folder / "checked").write_text(f"{start.isoformat()} {os.getpid()}\n")
    return work


def checked(folder: Path) -> list[tuple[datetime, int]]:
    """The windows that were checked, in the order in which they were, and by which process."""
    rows = [line.split() for line in (folder / "checked").read_text().splitlines()]
    return [(datetime.fromisoformat(when), int(who)) for when, who in rows]


def each_once(folder: Path) -> None:
    times = [when for when, _ in checked(folder)]
    assert times == [times[0] + n * EVERY for n in range(len(times))]


def goes_on(folder: Path, by: int | None = None, not_by: int | None = None) -> int:
    """Wait until two more windows are checked, by that process or by another; gives by which."""
    seen = len(checked(folder))

    def more() -> list[int]:
        new = [who for _, who in checked(folder)[seen:]]
        return [who for who in new if (by is None or who == by) and who != not_by]

    until(lambda: len(more()) >= 2)
    return more()[-1]


def connection(tmp_path: Path) -> Connection:
    return Connection(
        tracking_uri="http://127.0.0.1:9", ray_address="", jobs_url=None, workspace=tmp_path / "workspace"
    )


DRIVER = """
import importlib.util, sys
from pathlib import Path
from jobs.monitor_actor import deploy, local
from regraft.config import Experiment
path, address, tests, whole = *sys.argv[1:4], sys.argv[4] == 'whole'
spec = importlib.util.spec_from_file_location("pretended", tests)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
local.join(address)
folder = Path(path).parents[1]
deploy(Path(path), Experiment.load(path), module.connection(folder), module.counting(folder, whole=whole))
"""


def deploy_elsewhere(case: Path, address: str, lock: str) -> None:
    """Deploy from a driver that ends, as the command line does."""
    driver = [sys.executable, "-c", DRIVER, str(case), address, __file__, lock]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_actor_outlives_its_driver_and_is_there_once(two_nodes, case: Path, tmp_path: Path):
    import ray

    deploy_elsewhere(case, two_nodes.address, "file")
    assert deployed("other") is None
    first = deployed("tiny")
    assert first is not None
    try:
        goes_on(tmp_path, by=first.pid)
        experiment = Experiment.load(case)
        again = deploy(case, experiment, connection(tmp_path), lambda path, now: [])
        assert (again.pid, again.since) == (first.pid, first.since), "what watches already is left as it is"

        ray.kill(ray.get_actor("monitor:tiny", namespace="regraft"), no_restart=False)
        second = goes_on(tmp_path, not_by=first.pid)
        beat = deployed("tiny")
        assert beat is not None
        assert beat.pid == second
        assert beat.where == "actor"

        # Two schedulers at once: this process beside the actor.
        stop = threading.Event()
        loop = Loop(case, "tiny", EVERY, timedelta(0), where="process", work=counting(tmp_path))
        thread = threading.Thread(target=loop.run, args=(stop,))
        thread.start()
        goes_on(tmp_path, by=second)
        goes_on(tmp_path, by=os.getpid())
        stop.set()
        thread.join(60)
        assert loop.beat.failures == 0, loop.beat.problem
    finally:
        assert withdraw("tiny")
    assert deployed("tiny") is None
    assert not withdraw("tiny")
    each_once(tmp_path)


@pytest.mark.slow
def test_the_actor_goes_on_elsewhere_when_its_node_dies(two_nodes, case: Path, tmp_path: Path):
    # Last here: the node does not come back.
    import psutil
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET

    (node,) = two_nodes.worker_nodes
    raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    deploy_elsewhere(case, two_nodes.address, "whole")
    try:
        beat = deployed("tiny")
        for _ in range(30):  # Ray chooses the node
            assert beat is not None
            if psutil.Process(beat.pid).ppid() == raylet:
                break
            withdraw("tiny")
            beat = deploy(case, Experiment.load(case), connection(tmp_path), counting(tmp_path, whole=True))
        assert psutil.Process(beat.pid).ppid() == raylet
        goes_on(tmp_path, by=beat.pid)
        two_nodes.remove_node(node, allow_graceful=False)
        other = goes_on(tmp_path, not_by=beat.pid)
        assert psutil.Process(other).ppid() != raylet
        each_once(tmp_path)
    finally:
        withdraw("tiny")
