"""What goes wrong in a sweep: processes and nodes that die, memory that runs out, trials that hang."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from regraft.cluster.local import start_local_ray, stop_local_ray
from regraft.config import Experiment, SweepSection
from regraft.data.dataset import load_dataset
from regraft.errors import ServiceError
from regraft.records import TrialResult
from regraft.training.attempt import Attempt


@pytest.fixture(scope="module")
def cluster(two_nodes):
    """Two nodes, which cannot import this file."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return two_nodes


def sweep(
    folder: Path, url: str, storage: Path, name: str, work: type[Attempt] | None, lines: list[str], **changes
) -> dict[str, TrialResult]:
    """Run the control and a LoRA trial of eight steps; gives the results by method."""
    from regraft.tuning.sweep import NothingCompletedError, run_sweep

    experiment = Experiment.load(folder)
    settings = {
        "methods": ({"name": "zero_shot"}, {"name": "lora", "rank": 2, "learning_rate": 0.01}),
        "epochs": 4, "tokens_per_batch": 512, "max_length": 128, "evaluations": 4, "ray_train": (),
        "checkpoint_seconds": 0,
    }  # fmt: skip
    section = SweepSection.model_validate(experiment.sweep.model_dump() | settings | changes)
    experiment = experiment.model_copy(update={"sweep": section, "name": name})
    dataset = load_dataset(experiment.name, experiment.data)
    try:
        swept = run_sweep(
            experiment, dataset, tracking_uri=url, storage=str(storage), say=lines.append, work=work
        )
    except NothingCompletedError:
        pytest.fail("\n".join(lines))
    return {r.method["name"]: r for r in swept.results}


def once(spec, storage: str) -> bool:
    """Whether this is the first time that somebody asks for this trial."""
    mark = Path(storage) / f"asked-{spec.key}"
    if mark.exists():
        return False
    mark.touch()
    return True


def attempts(url: str, result: TrialResult) -> str:
    run = MlflowClient(url).get_run(result.run_id)
    assert run.info.status == ("FAILED" if result.status == "failed" else "FINISHED")
    return str(run.data.tags["attempt"])


@pytest.fixture(scope="module")
def undisturbed(cluster, mlflow_url: str, tiny_experiment: Path, tmp_path_factory) -> TrialResult:
    """What the LoRA trial comes to when nothing happens."""
    return sweep(tiny_experiment, mlflow_url, tmp_path_factory.mktemp("calm"), "calm", None, [])["lora"]


def due(spec) -> bool:
    """Whether something is to go wrong: never with the control, once with LoRA, always with rsLoRA."""
    return spec.parsed.name == "rslora" or (spec.parsed.name == "lora" and once(spec, spec.storage))


BOTH = (
    {"name": "zero_shot"},
    {"name": "lora", "rank": 2, "learning_rate": 0.01},
    {"name": "rslora", "rank": 2, "learning_rate": 0.01},
)


class Killed(Attempt):
    """Its process is killed in the second point."""

    def _on_point(self, point) -> None:
        super()._on_point(point)
        if len(self.points) == 2 and due(self.spec):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    cluster, mlflow_url: str, tiny_experiment: Path, tmp_path: Path
):
    lines: list[str] = []
    only = BOTH[1:2]
    found = sweep(tiny_experiment, mlflow_url, tmp_path, "killed-once", Killed, lines, methods=only)["lora"]
    assert found.status == "completed"
    assert any(line.startswith("lost lora rank=2") and "last checkpoint" in line for line in lines), lines
    assert attempts(mlflow_url, found) == "2"
    assert len(found.curve) == 4


@pytest.mark.slow
def test_a_killed_trial_comes_to_what_it_would_have_and_one_that_dies_again_has_failed(
    cluster, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, undisturbed: TrialResult
):
    lines: list[str] = []
    found = sweep(tiny_experiment, mlflow_url, tmp_path, "killed", Killed, lines, methods=BOTH)
    assert found["zero_shot"].status == found["lora"].status == "completed"
    assert any(line.startswith("lost lora rank=2") and "last checkpoint" in line for line in lines), lines
    assert attempts(mlflow_url, found["lora"]) == attempts(mlflow_url, found["rslora"]) == "2"
    assert found["rslora"].status == "failed"
    assert "died" in found["rslora"].reason
    assert [p.eval_loss for p in found["lora"].curve] == pytest.approx(
        [p.eval_loss for p in undisturbed.curve], rel=1e-5
    )


class Hangs(Attempt):
    """Waits in its second point for what never comes."""

    def _on_point(self, point) -> None:
        super()._on_point(point)
        if len(self.points) == 2 and due(self.spec):
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()


@pytest.mark.slow
def test_a_trial_that_hangs_is_ended_and_says_where(
    cluster, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, undisturbed: TrialResult
):
    lines: list[str] = []
    lora = [{"name": "lora", "rank": 2, "learning_rate": 0.01}, BOTH[0]]
    found = sweep(
        tiny_experiment, mlflow_url, tmp_path, "hangs", Hangs, lines, methods=lora, hang_minutes=0.1
    )
    assert found["zero_shot"].status == found["lora"].status == "completed"
    (line,) = (line for line in lines if line.startswith("lost "))
    assert "lr=0.01: no progress for 0.1 minutes, last in " in line
    assert line.endswith("; again, from its last checkpoint")
    assert attempts(mlflow_url, found["lora"]) == "2"
    assert found["lora"].eval_loss == pytest.approx(undisturbed.eval_loss, rel=1e-5)


class Hungry(Attempt):
    """Asks torch for more memory than there is, in whole batches; rsLoRA in smaller ones too."""

    def _on_point(self, point) -> None:
        super()._on_point(point)
        import torch

        if self.spec.parsed.trains and (self.spec.parsed.name == "rslora" or not self.spec.micro_tokens):
            torch.empty(2**50)


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_is_tried_once_more_in_smaller_parts(
    cluster, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, undisturbed: TrialResult
):
    lines: list[str] = []
    found = sweep(tiny_experiment, mlflow_url, tmp_path, "hungry", Hungry, lines, methods=BOTH)
    assert found["zero_shot"].status == found["lora"].status == "completed"
    assert any("out of memory" in line and "micro-batches of 256 tokens" in line for line in lines), lines
    assert attempts(mlflow_url, found["lora"]) == attempts(mlflow_url, found["rslora"]) == "2"
    assert found["rslora"].status == "infeasible"
    assert "in micro-batches of 256 tokens too" in found["rslora"].reason
    assert found["lora"].key == undisturbed.key
    assert found["lora"].data["micro_batch_tokens"] == 256
    assert [p.eval_loss for p in found["lora"].curve] == pytest.approx(
        [p.eval_loss for p in undisturbed.curve], rel=1e-4
    )


@pytest.mark.slow
def test_a_sweep_goes_on_while_mlflow_is_away_and_loses_nothing(
    cluster, tiny_experiment: Path, tmp_path: Path, undisturbed: TrialResult
):
    from regraft.processes import free_port
    from regraft.tracking.server import start_server, stop_server

    port = free_port(0, "")
    server = start_server(tmp_path / "mlflow", "127.0.0.1", port)

    class Lines(list[str]):
        """Stops the server with the first point of a trial, and starts it with the last one of both."""

        def append(self, line: str) -> None:
            nonlocal server
            super().append(line)
            points = [said for said in self if ": 1/4" in said or ": 4/4" in said]
            if ": 1/4" in line and len(points) == 1:
                stop_server(server.pid)
            if sum(": 4/4" in said for said in self) == 2 and ": 4/4" in line:
                server = start_server(tmp_path / "mlflow", "127.0.0.1", port)

    lines = Lines()
    try:
        found = sweep(tiny_experiment, server.url, tmp_path, "away", None, lines, methods=BOTH[1:])
        assert {r.status for r in found.values()} == {"completed"}
        client = MlflowClient(server.url)
        for result in found.values():
            assert attempts(server.url, result) == "1"
            curve = client.get_metric_history(result.run_id, "eval/loss")
            assert len({point.step for point in curve}) == 4
        assert [p.eval_loss for p in found["lora"].curve] == pytest.approx(
            [p.eval_loss for p in undisturbed.curve], rel=1e-5
        )
    finally:
        stop_server(server.pid)


def test_the_same_sweep_does_not_run_twice_at_once(
    cluster, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from regraft.cluster import sweeps

    monkeypatch.setattr(sweeps, "_PATIENCE", 0.0)
    with sweeps.announced("one", lambda _: None) as count:
        assert count() == 1
        with (
            pytest.raises(ServiceError, match=r"one runs already: process \d+ on "),
            sweeps.announced("one", lambda _: None),
        ):
            pass
        with sweeps.announced("another", lambda _: None) as both:
            assert both() == 2
    with sweeps.announced("one", lambda _: None):
        pass


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
import ray
import test_sweep_faults as here
from regraft.cluster.local import set_environment
set_environment()
ray.init(address={address!r}, log_to_driver=False, logging_level="ERROR")
ray.cloudpickle.register_pickle_by_value(here)
lines = []
found = here.sweep(Path({folder!r}), {url!r}, Path({storage!r}), "watched", here.Swells, lines, max_concurrent=1)
print("\\n".join(lines))
print("RESULT", found["lora"].status, found["lora"].data.get("micro_batch_tokens"), found["zero_shot"].status)
"""


class Swells(Attempt):
    """Takes memory until Ray's monitor ends it, in whole batches."""

    def _on_point(self, point) -> None:
        super()._on_point(point)
        held = []
        while self.spec.parsed.trains and not self.spec.micro_tokens and len(held) < 100:
            held.append(bytearray(b"x" * (100 << 20)))
            threading.Event().wait(0.02)


@pytest.mark.slow
def test_a_trial_that_the_memory_monitor_ends_does_not_end_the_sweep(
    mlflow_url: str, tiny_experiment: Path, tmp_path: Path
):
    memory = psutil.virtual_memory()
    limit = min(0.9, (memory.total - memory.available + 4.0 * 2**30) / memory.total)
    ray = start_local_ray(
        tmp_path / "ray", num_cpus=2, num_gpus=None, dashboard_port=0,
        environment={"RAY_memory_usage_threshold": f"{limit:.3f}", "RAY_memory_monitor_refresh_ms": "100"},
    )  # fmt: skip
    script = MEMORY.format(
        tests=str(Path(__file__).parent), address=ray.address, folder=str(tiny_experiment), url=mlflow_url,
        storage=str(tmp_path),
    )  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        stop_local_ray(ray.pid)
    assert "RESULT completed 256 completed" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "out of memory: Ray ended a process of this trial" in done.stdout


LEAVES = """
import ray, sys
ray.init(address={address!r}, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, name="outlives", namespace="test", lifetime="detached")
class Outlives:
    def take(self):
        from ray.util.placement_group import placement_group
        self.group = placement_group([{{"CPU": 1}}])
        ray.get(self.group.ready())

ray.get(Outlives.remote().__ray_ready__.remote())
"""


def test_what_a_dead_job_holds_is_given_back(cluster):
    import ray

    from regraft.cluster.sweeps import remove_leftovers

    subprocess.run([sys.executable, "-c", LEAVES.format(address=cluster.address)], check=True, timeout=120)
    actor = ray.get_actor("outlives", namespace="test")
    ray.get(actor.take.remote())
    lines: list[str] = []
    assert remove_leftovers(lines.append) == 1
    assert lines == ["gave back what 1 placement groups of dead jobs held"]
    assert remove_leftovers(lines.append) == 0
    ray.kill(actor)


class TakesItsNode(Attempt):
    """Kills the raylet of its node, which is not the head, and then itself."""

    def _on_point(self, point) -> None:
        super()._on_point(point)
        import ray

        head = (Path(self.spec.storage) / "head").read_text()
        if len(self.points) == 2 and ray.get_runtime_context().get_node_id() != head:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_sweep_that_loses_a_node_goes_on_on_the_others(
    cluster, mlflow_url: str, tiny_experiment: Path, tmp_path: Path
):
    # Last here: the node does not come back.
    import ray

    (tmp_path / "head").write_text(ray.get_runtime_context().get_node_id())
    lines: list[str] = []
    methods = [
        {"name": "lora", "rank": 4}, {"name": "dora", "rank": 4}, {"name": "rslora", "rank": 4}
    ]  # fmt: skip
    found = sweep(tiny_experiment, mlflow_url, tmp_path, "node", TakesItsNode, lines, methods=methods)
    assert {r.status for r in found.values()} == {"completed"}, lines
    assert len(found) == 3
    assert sum(line.startswith("lost ") for line in lines) == 1, lines
    deadline = time.monotonic() + 60
    while len([n for n in ray.nodes() if n["Alive"]]) == 2:  # Ray notices after several seconds
        assert time.monotonic() < deadline
