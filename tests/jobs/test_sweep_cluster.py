"""The sweep on a cluster of two nodes, with a real MLflow server."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from regraft.config import Experiment, SweepSection
from regraft.data.dataset import load_dataset


@pytest.fixture
def elsewhere():
    """The URL of an endpoint whose model knows the form of every answer, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            choice = {"message": {"content": "The number is 0."}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 9, "completion_tokens": 5}
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [choice], "usage": usage}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_sweep_uses_both_nodes_and_records_every_trial(
    two_nodes, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, elsewhere
):
    import ray

    from jobs.console import show_leaderboard
    from regraft.selection.rank import rank
    from regraft.tuning.sweep import run_sweep

    url, asked = elsewhere
    experiment = Experiment.load(tiny_experiment)
    endpoint = {"name": "endpoint", "url": url, "model": "larger", "price_out": 100}
    sweep = experiment.sweep.model_copy(update={"methods": (*experiment.sweep.methods, endpoint)})
    experiment = experiment.model_copy(update={"sweep": sweep})
    dataset = load_dataset(experiment.name, experiment.data)
    lines: list[str] = []
    _, run_id, results, *_ = run_sweep(
        experiment, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=lines.append
    )
    assert {r.label: r.status for r in results} == {
        "zero_shot": "completed",
        "lora rank=2 lr=0.01": "completed",
        "lora rank=4 lr=0.01": "completed",
        "full lr=0.001": "completed",
        "prompt_tuning tokens=4 lr=0.01": "completed",
        f"endpoint larger at {url}": "completed",
    }
    assert run_id
    trained = [r for r in results if not r.is_control]
    assert all(r.logged_model_id and r.cost.adapter_bytes > 0 for r in trained)
    assert all(r.report is not None and 0 < len(r.report.examples) < 12 for r in results)
    assert len([n for n in ray.nodes() if n["Alive"]]) == 2
    # Both nodes' single cores were needed at once: the full trial's worker and an inline trial.
    assert any(line.startswith("started full") for line in lines)

    # The same sweep again: everything is found, nothing is run.
    again: list[str] = []
    _, same_run, found, *_ = run_sweep(
        experiment, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=again.append
    )
    assert same_run == run_id
    assert {r.run_id for r in found} == {r.run_id for r in results}
    assert not any(line.startswith("started") for line in again)

    # What answers elsewhere was asked once, is best, and wins nothing.
    best = results[-1]
    count = len(best.report.examples)
    assert best.method["name"] == "endpoint"
    assert (best.eval_loss, best.cost.answer_money) == (None, pytest.approx(count * 5 * 100 / 1e6))
    assert len([body for body in asked if not body.get("stream")]) == count
    params = MlflowClient(mlflow_url).get_run(best.run_id).data.params
    assert (params["method"], params["url"], params["model"]) == ("endpoint", url, "larger")
    board = rank(
        results, sweep_id="s", objective="rougeL", constraints=(), tie_break=None, level=0.95, resamples=200
    )
    assert board.rows[0].key == best.key
    assert board.rows[0].is_control
    assert board.winner_key in {r.key for r in trained}
    show_leaderboard(board)  # copes with a trial that has no loss


@pytest.mark.slow
def test_a_trial_that_cannot_fit_is_infeasible_with_its_reason_and_the_sweep_goes_on(
    two_nodes, mlflow_url: str, tiny_experiment: Path, tmp_path: Path
):
    from regraft.selection.rank import rank
    from regraft.tuning.sweep import run_sweep

    experiment = Experiment.load(tiny_experiment)
    # A process alone is most of what a tiny model's trial needs; a rank far too high is what stands out.
    from regraft.models import resolve
    from regraft.training.memory import least_gib
    from regraft.training.preflight import Batching

    sweep = experiment.sweep.model_copy(
        update={"methods": ({"name": "zero_shot"}, {"name": "lora", "rank": [2, 1024]}), "ray_train": ()}
    )
    base = resolve(experiment.model.source).path
    batching = Batching.of(sweep, experiment.evaluate)
    assert batching.tokens_per_batch < batching.max_length, "a batch must not be cut into smaller ones"
    small, large = (
        least_gib(method, base, experiment.model.dtype, "cpu", batching)
        for method in sweep.expanded()
        if method.name == "lora"
    )
    sweep = sweep.model_copy(update={"trial_memory_gib": (small + large) / 2})
    experiment = experiment.model_copy(update={"sweep": sweep, "name": "tight"})
    dataset = load_dataset(experiment.name, experiment.data)
    plan, _, results, *_ = run_sweep(
        experiment, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=lambda _: None
    )
    by_rank = {r.method.get("rank"): r for r in results}
    assert by_rank[1024].status == "infeasible"
    assert "needs at least" in by_rank[1024].reason
    assert by_rank[2].status == by_rank[None].status == "completed"
    board = rank(
        results,
        sweep_id=plan.sweep_id,
        objective="rougeL",
        constraints=(),
        tie_break=None,
        level=0.95,
        resamples=200,
    )
    row = next(r for r in board.rows if r.method.get("rank") == 1024)
    assert row.rank is None
    assert "needs at least" in row.reason


@pytest.mark.slow
def test_a_search_learns_repeats_its_best_and_begins_the_next_with_what_it_knows(
    two_nodes, mlflow_url: str, tiny_experiment: Path, tmp_path: Path
):
    from regraft.tuning.sweep import run_sweep

    experiment = Experiment.load(tiny_experiment)
    methods = (
        {"name": "zero_shot"},
        {"name": "lora", "rank": [2, 4], "learning_rate": {"loguniform": [1e-3, 1e-1]}},
    )

    def swept(trials: int):
        search = {"name": "tpe", "trials": trials, "startup": 2}
        changes = {
            "methods": methods,
            "search": search,
            "finalists": {"count": 1, "seeds": 2},
            "ray_train": (),
        }
        sweep = SweepSection.model_validate(experiment.sweep.model_dump() | changes)
        named = experiment.model_copy(update={"sweep": sweep, "name": "learned"})
        dataset = load_dataset(named.name, named.data)
        lines: list[str] = []
        found = run_sweep(named, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=lines.append)
        return found.results, lines

    results, _ = swept(4)
    assert [r.status for r in results] == ["completed"] * 5
    best = max(
        (r for r in results if not r.is_control and not r.repeat_of), key=lambda r: r.figures["rougeL"]
    )
    (repeat,) = (r for r in results if r.repeat_of)
    assert (repeat.repeat_of, repeat.method, repeat.seed) == (best.key, best.method, best.seed + 1)

    more, lines = swept(6)
    assert "the search begins with what 4 earlier trials came to" in lines
    assert len({r.key for r in more if not r.repeat_of}) == 6


@pytest.mark.slow
def test_a_trial_that_the_budget_cut_short_is_killed_and_goes_on_when_started_again(
    two_nodes, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from regraft.tuning import sweep as sweeps

    experiment = Experiment.load(tiny_experiment)
    changes = {
        "methods": ({"name": "lora", "rank": 2, "learning_rate": 0.01}, {"name": "ia3"}),
        "checkpoint_seconds": 0, "epochs": 4, "tokens_per_batch": 128, "evaluations": 4, "ray_train": (),
        "max_concurrent": 1,
    }  # fmt: skip
    sweep = experiment.sweep.model_copy(update=changes)
    experiment = experiment.model_copy(update={"sweep": sweep, "name": "cut"})
    dataset = load_dataset(experiment.name, experiment.data)
    lines: list[str] = []

    class UsedUp(sweeps.Ledger):
        """A budget that is used up with the second point of the first trial."""

        @property
        def over(self) -> str | None:
            return "the sweep's budget is used up" if any(": 2/4" in line for line in lines) else None

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "Ledger", UsedUp)
        with pytest.raises(sweeps.NothingCompletedError, match="cancelled: the sweep's budget is used up"):
            sweeps.run_sweep(
                experiment, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=lines.append
            )
    client = MlflowClient(mlflow_url)
    (where,) = client.search_experiments(filter_string="name = 'cut'")
    (run,) = client.search_runs([where.experiment_id], "tags.role = 'trial'")
    assert (run.info.status, run.data.tags["status"]) == ("KILLED", "cancelled")

    swept = sweeps.run_sweep(
        experiment, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=lines.append
    )
    assert [r.status for r in swept.results] == ["completed", "completed"]
    assert swept.left_out == ()
    again = client.get_run(run.info.run_id)
    assert (again.info.status, again.data.tags["attempt"]) == ("FINISHED", "2")
    curve = client.get_metric_history(run.info.run_id, "eval/loss")
    assert len({point.step for point in curve}) == 4
    first = [p.value for p in curve if p.step == min(point.step for point in curve)]
    assert len(set(first)) == 1, "what was reported before it was cut is reported again, and the same"


@pytest.mark.slow
def test_a_trial_sharded_over_two_workers_is_scored_and_kept_as_any_other(
    two_nodes, mlflow_url: str, tiny_experiment: Path, tmp_path: Path
):
    from regraft.tuning.sweep import run_sweep

    experiment = Experiment.load(tiny_experiment)
    sweep = experiment.sweep.model_copy(
        update={"methods": ({"name": "full", "learning_rate": 1e-3},), "workers_per_trial": 2, "shard": True}
    )
    experiment = experiment.model_copy(update={"sweep": sweep, "name": "two-workers"})
    dataset = load_dataset(experiment.name, experiment.data)
    _, _, (result,), *_ = run_sweep(
        experiment, dataset, tracking_uri=mlflow_url, storage=str(tmp_path), say=lambda _: None
    )
    assert result.status == "completed", result.reason
    assert result.logged_model_id
    assert result.eval_loss is not None
    assert result.cost.adapter_bytes > 0
    assert result.report is not None
    assert len(result.report.examples) == 12


def fragile(config):
    """A worker that ends itself in the fourth step; at the next try in the eighth, and its node with it."""
    import os
    import signal

    import ray
    import torch

    from regraft.training import steps
    from regraft.training.checkpoints import Checkpoints
    from regraft.training.ray_trainer import train_worker

    diary, own = Path(config["diary"]), ray.get_runtime_context().get_node_id()
    restore, rate = Checkpoints.restore, steps.share_of_rate

    def note(self, *args):
        found = restore(self, *args)
        workers = self._workers
        entry = [
            workers.size,
            found.step if found else 0,
            torch.get_num_threads(),
            os.environ["OMP_NUM_THREADS"],
        ]
        (diary / f"{time.monotonic_ns()}-{workers.rank}").write_text(json.dumps(entry))
        return found

    def fail(schedule, total, warmup, step):
        done = [f for f in ("process", "node") if (diary / f).exists()]
        if own != config["head"] and len(done) < 2 and step == (3, 7)[len(done)]:
            (diary / ("process", "node")[len(done)]).touch()
            if done:
                os.kill(os.getppid(), signal.SIGKILL)  # the node's raylet
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(schedule, total, warmup, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "restore", note)
        patch.setattr(steps, "share_of_rate", fail)
        train_worker(config)


@pytest.mark.slow
def test_a_trial_that_loses_a_worker_and_then_a_node_comes_to_the_end_it_would_have_had(
    two_nodes, mlflow_url: str, tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Last here: the node does not come back. Ray notices that a while after its processes are gone, and waits
    # this long for a group that no longer has room.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray

    from regraft.models import resolve
    from regraft.tracking.runs import Tracker
    from regraft.training.candidate import BaseCache
    from regraft.training.distributed import Workers
    from regraft.training.ray_trainer import make_trainer
    from regraft.training.trial import run_trial
    from regraft.tuning.plan import plan_sweep

    experiment = Experiment.load(tiny_experiment)
    changes = {
        "methods": ({"name": "lora", "rank": 2, "learning_rate": 0.01, "dropout": 0.1},),
        "workers_per_trial": 2, "min_workers": 1, "worker_failures": 2,
        "checkpoint_seconds": 0, "epochs": 6, "tokens_per_batch": 128, "evaluations": 3,
    }  # fmt: skip
    dataset = load_dataset(experiment.name, experiment.data)
    sweep = experiment.sweep.model_copy(update=changes)
    results = []
    for name in ("whole", "lossy"):
        named = experiment.model_copy(update={"sweep": sweep, "name": name})
        (spec,) = plan_sweep(named, dataset, resolve(named.model.source), mlflow_url).specs
        tracker = Tracker(mlflow_url, name)
        run_id = tracker.start_sweep(spec.sweep_id, params={}, dataset=dataset)
        spec = spec.model_copy(update={"sweep_run_id": run_id, "storage": str(tmp_path / name)})
        if name == "whole":
            one = Workers(requested=2)
            run_trial(spec, dataset, report=lambda _: None, bases=BaseCache(), workers=one)
        else:
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            trainer = make_trainer(spec, [ray.put(dataset)], name=name, storage=spec.storage, work=fragile)
            trainer.train_loop_config |= {
                "diary": str(tmp_path), "head": ray.get_runtime_context().get_node_id()
            }  # fmt: skip
            trainer.fit()
        result = tracker.find_trial(spec.key)
        assert result is not None
        assert result.status == "completed", result.reason
        curve = MlflowClient(mlflow_url).get_metric_history(result.run_id, "eval/loss")
        results.append({m.step: m.value for m in curve})
    entries = [json.loads(f.read_text()) for f in sorted(tmp_path.glob("[0-9]*-*"))]
    assert entries == [[2, 0, 1, "1"]] * 2 + [[2, 3, 1, "1"]] * 2 + [[1, 7, 1, "1"]]
    whole, lossy = results
    assert len(whole) == 3
    assert lossy == pytest.approx(whole, rel=1e-5)
