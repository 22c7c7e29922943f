"""The driver is killed in the middle of a sweep, then the machine goes down, and comes up again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from jobs.workspace import Workspace
from regraft.tracking.server import start_server, stop_server

COMMAND = [sys.executable, "-c", "from jobs.cli import main; main()", "sweep"]


def until(line: str, file: Path) -> subprocess.Popen[str]:
    """Start the sweep as a person does, and give its process when it says the line."""
    driver = subprocess.Popen(
        [*COMMAND, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=file.parent
    )
    assert driver.stdout is not None
    said = []
    for given in driver.stdout:
        said.append(given)
        if line in given:
            return driver
    raise AssertionError("".join(said))


@pytest.mark.slow
def test_a_sweep_goes_on_after_its_driver_and_then_the_machine_went_down(
    variant: Callable[..., Path], tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("REGRAFT_WORKSPACE", str(tmp_path / "workspace"))
    file = variant(
        tmp_path, "tiny", methods=[{"name": "zero_shot"}, {"name": "lora", "rank": 2, "learning_rate": 0.002}],
        epochs=200, evaluations=20, checkpoint_seconds=0.2, max_concurrent=1,
    )  # fmt: skip

    driver = until("lora rank=2 lr=0.002: 4/20", file)
    driver.kill()
    driver.wait()
    services = Workspace().services()
    assert services.mlflow is not None
    assert services.ray is not None, "both outlive the driver"

    driver = until("lora rank=2 lr=0.002: 9/20", file)
    assert Workspace().services() == services
    family: list[psutil.Process] = []
    for pid in (driver.pid, services.ray.pid, services.mlflow.pid):
        process = psutil.Process(pid)
        family += [process, *process.children(recursive=True)]
    for process in family:  # as when the power goes: nobody can say good-bye
        process.kill()
    psutil.wait_procs(family, timeout=30)
    driver.wait()

    again = subprocess.run(
        [*COMMAND, "--resume", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "found zero_shot: completed, not run again" in again.stdout
    server = start_server(tmp_path / "workspace/mlflow", "127.0.0.1", 0)
    try:
        store = MlflowClient(server.url)
        (where,) = store.search_experiments(filter_string="name = 'tiny'")
        (run,) = store.search_runs([where.experiment_id], "params.method = 'lora'")
        assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", "3")
        curve = store.get_metric_history(run.info.run_id, "eval/loss")
        values = {p.step: {q.value for q in curve if q.step == p.step} for p in curve}
        assert len(values) == 20
        assert all(len(found) == 1 for found in values.values()), "what was done again came out otherwise"
    finally:
        stop_server(server.pid)
