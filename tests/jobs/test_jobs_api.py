"""The sweep as a Ray job, as a person submits it to a cluster whose nodes have Regraft's wheel and no more."""

import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from jobs.cli import app
from regraft.cluster.jobs import cancel, client, follow, submit_once
from regraft.cluster.local import start_local_ray, stop_local_ray
from regraft.errors import ServiceError
from regraft.tracking.registry import Registry
from regraft.tracking.server import start_server, stop_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel holds, as it lies in a node's site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=300)
    (file,) = folder.glob("regraft-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, wheel: Path):
    folder = tmp_path_factory.mktemp("services")
    server = start_server(folder / "mlflow", "127.0.0.1", 0)
    # Before this checkout on the path: neither jobs nor their workers see it.
    environment = {"MLFLOW_TRACKING_URI": server.url, "REGRAFT_WORKSPACE": str(folder / "workspace")}
    environment |= {"PYTHONPATH": str(wheel)}
    ray = start_local_ray(
        folder / "ray", num_cpus=2, num_gpus=None, dashboard_port=0, environment=environment
    )
    yield server.url, ray.dashboard_url, environment
    stop_local_ray(ray.pid)
    stop_server(server.pid)


@pytest.mark.slow
def test_a_sweep_runs_as_a_job_and_a_second_submission_is_recognised(
    services, wheel: Path, tiny_experiment: Path, monkeypatch: pytest.MonkeyPatch
):
    uri, jobs, environment = services
    # The folder travels to the cluster with the job.
    command = "python -c 'import jobs, regraft; print(jobs, regraft)' && regraft sweep ."
    runtime = {"env_vars": environment, "working_dir": str(tiny_experiment)}
    assert submit_once(jobs, "sweep-once", command, runtime_env=runtime, metadata={"case": "tiny"})
    assert not submit_once(jobs, "sweep-once", command, runtime_env=runtime)
    lines: list[str] = []
    assert follow(jobs, "sweep-once", lines.append) == "SUCCEEDED", "\n".join(lines[-40:])
    assert any(f"{wheel}/jobs" in line and f"{wheel}/regraft" in line for line in lines)
    assert any("Leaderboard of sweep-" in line for line in lines)
    assert any("compare the runs: http" in line for line in lines)
    assert any("the sweep's report: " in line for line in lines)
    store = MlflowClient(uri)
    (where,) = store.search_experiments(filter_string="name = 'tiny'")
    (of_sweep,) = store.search_runs([where.experiment_id], "tags.role = 'sweep'")
    assert {"report.html", "report.md"} <= {f.path for f in store.list_artifacts(of_sweep.info.run_id)}
    # Two of its trials, side by side in the terminal.
    trials = store.search_runs([where.experiment_id], "tags.role = 'trial'")
    two = [r.info.run_id for r in trials if r.data.params["method"] in {"zero_shot", "full"}]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shown = CliRunner().invoke(app, ["compare", *two, "-e", str(tiny_experiment)])
    assert shown.exit_code == 0, shown.output
    for part in ("What was set otherwise", "rougeL", "paired difference", "What is the", "reference: The"):
        assert part in shown.output
    missing = CliRunner().invoke(app, ["compare", two[0], of_sweep.info.run_id, "-e", str(tiny_experiment)])
    assert isinstance(missing.exception, ServiceError)
    assert "has no record of a trial" in str(missing.exception)
    # Whatever the gate said of a model that answers nonsense, the winner was registered.
    assert len(Registry(uri, tiny_experiment / "cache").versions("tiny")) == 1


def test_a_job_with_bad_input_fails_with_the_message_alone(services, tmp_path: Path):
    _, jobs, environment = services
    bad = tmp_path / "regraft.yaml"
    bad.write_text("name: x\nmodle: {}\n")
    submit_once(jobs, "bad", f"python {ROOT}/jobs/sweep.py {bad}", runtime_env={"env_vars": environment})
    lines: list[str] = []
    assert follow(jobs, "bad", lines.append) == "FAILED"
    text = "\n".join(lines)
    assert f"{bad}:2: modle: unknown key; did you mean 'model'?" in text
    assert "Traceback" not in text


def test_a_cancelled_job_ends_as_stopped(services):
    _, jobs, _ = services
    submit_once(jobs, "endless", "python -c 'import threading; threading.Event().wait()'")
    api = client(jobs)
    while str(api.get_job_status("endless")) == "PENDING":
        pass  # each look is a request: this waits for the state, not for a time
    assert cancel(jobs, "endless")
    assert follow(jobs, "endless", lambda _: None) == "STOPPED"


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
def test_a_cancelled_sweep_closes_its_runs_and_leaves_everything_to_one_that_waits(
    services, variant: Callable[..., Path], tmp_path: Path, beside: bool
):
    from ray.util.state import list_actors, list_placement_groups

    uri, jobs, environment = services
    methods = [{"name": "full"}, {"name": "lora", "rank": 2}]
    name = f"cancelled-{beside}".lower()
    file = variant(tmp_path, name, methods=methods, epochs=5000, evaluations=100)
    submit_once(jobs, name, f"regraft sweep {file}", runtime_env={"env_vars": environment})
    api = client(jobs)
    # Both the inline trial and the one in Ray Train are under way.
    while not all(f"{rate}: 1/100" in api.get_job_logs(name) for rate in ("lr=0.0001", "lr=0.002")):
        assert str(api.get_job_status(name)) in {"PENDING", "RUNNING"}, api.get_job_logs(name)
    if beside:  # All there is, is held: the trials of another sweep wait, the one in Ray Train too.
        methods = [{"name": "full"}, {"name": "zero_shot"}]
        waits = variant(tmp_path / "2", "waits", methods=methods)
        submit_once(jobs, "waits", f"regraft sweep {waits}", runtime_env={"env_vars": environment})
        while "this sweep shares the cluster with 1 other" not in api.get_job_logs("waits"):
            assert str(api.get_job_status("waits")) in {"PENDING", "RUNNING"}, api.get_job_logs("waits")
    assert cancel(jobs, name)
    assert follow(jobs, name, lambda _: None) == "STOPPED"
    store = MlflowClient(uri)
    if beside:
        lines: list[str] = []
        assert follow(jobs, "waits", lines.append) == "SUCCEEDED", "\n".join(lines[-40:])
        (where,) = store.search_experiments(filter_string="name = 'waits'")
        runs = store.search_runs([where.experiment_id], "tags.role = 'trial'")
        assert [(r.data.tags["status"], r.data.tags["attempt"]) for r in runs] == [("completed", "1")] * 2
    (where,) = store.search_experiments(filter_string=f"name = '{name}'")
    runs = store.search_runs([where.experiment_id])
    assert {(r.data.tags["role"], r.info.status) for r in runs} == {("sweep", "KILLED"), ("trial", "KILLED")}
    assert len(runs) == 3

    def held() -> list[str]:
        actors = list_actors(address=jobs, filters=[("state", "=", "ALIVE")])
        groups = list_placement_groups(address=jobs)
        names = {a.class_name for a in actors} - {"_AutoscalingCoordinatorActor"}  # one a cluster, Ray's own
        return [*names, *(g.placement_group_id for g in groups if g.state != "REMOVED")]

    deadline = time.monotonic() + 60
    while left := held():  # Ray ends a job's actors after the job
        assert time.monotonic() < deadline, left
