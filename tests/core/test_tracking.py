"""The MLflow layer against a real server."""

import json
import math
import pickle
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from regraft.errors import ModelError, ServiceError
from regraft.records import (
    Comparison,
    Cost,
    DatasetVersion,
    DriftReport,
    EvalReport,
    Example,
    ExampleScore,
    Interval,
    Leaderboard,
    LeaderboardRow,
    LossPoint,
    Message,
    PromotionDecision,
    RetrainDecision,
    Speed,
    TrialResult,
)
from regraft.tracking.registry import PromotionConflictError, Registry
from regraft.tracking.runs import Tracker
from regraft.tracking.server import check_server, start_server, stop_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = start_server(tmp_path_factory.mktemp("mlflow"), "127.0.0.1", 0)
    yield started
    stop_server(started.pid)
    assert not psutil.pid_exists(started.pid)


@pytest.fixture
def tracker(server, request):
    return Tracker(server.url, f"exp-{request.node.name}")


@pytest.fixture
def registry(server, tmp_path):
    return Registry(server.url, tmp_path / "cache")


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)  # load_table asks the process-wide server
    return MlflowClient(server.url)


def example(number: int) -> Example:
    turns = (
        Message(role="user", content=f"question {number}"),
        Message(role="assistant", content=f"answer {number}"),
    )
    return Example(id=f"e{number}", messages=turns)


DATASET = DatasetVersion(
    id="d" * 16,
    name="support",
    splits={
        "train": tuple(example(i) for i in range(3)),
        "evaluation": tuple(example(i) for i in range(3, 28)),
    },
)


def report() -> EvalReport:
    scores = tuple(
        ExampleScore(
            example_id=e.id,
            prompt=e.prompt[0].content,
            reference=e.reference,
            output=f"näher an {e.reference}",
            scores={"rougeL": 0.5, "exact_match": 0.0},
        )
        for e in DATASET.splits["evaluation"]
    )
    return EvalReport(
        dataset_id=DATASET.id, split="evaluation", metric_versions={"rougeL": 1}, examples=scores
    )


def make_adapter(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def start(tracker, key, *, sweep="s1", params=None):
    parent = tracker.start_sweep(sweep, params={"trials": 2}, dataset=DATASET)
    params = params or {"method": "lora", "rank": 8, "learning_rate": 0.001}
    run = tracker.start_trial(
        parent, sweep_id=sweep, key=key, label=f"lora {key}", params=params, dataset=DATASET
    )
    run.settle()
    return run


def result_of(run, key, **changes) -> TrialResult:
    fields = {
        "key": key,
        "sweep_id": "s1",
        "run_id": run.run_id,
        "label": f"lora {key}",
        "method": {"name": "lora", "rank": 8},
        "base_model": "smollm2",
        "base_revision": "abc",
        "dataset_id": DATASET.id,
        "status": "completed",
        "eval_loss": 1.5,
        "cost": Cost(
            train_seconds=3.5, trainable_parameters=100, tokens_seen=40, memory_peak_gib=0.5, adapter_bytes=9
        ),
        "speed": Speed(
            latency_p50_ms=10, latency_p95_ms=20, first_token_p50_ms=5, tokens_per_second=90, how="one by one"
        ),
        "report": report(),
    }
    return TrialResult.model_validate({**fields, **changes})


def trained(tracker, tmp_path, key, content=b"weights") -> TrialResult:
    run = start(tracker, key)
    folder = make_adapter(tmp_path / f"adapter-{key}", content)
    model_id = run.log_adapter(folder, name=f"lora lr=0.001 {key}", params={"base_model": "smollm2"}, step=4)
    result = result_of(run, key, logged_model_id=model_id)
    run.finish(result)
    return result


def decision(number: int, outcome: str = "promote") -> PromotionDecision:
    evidence = Comparison(
        metric="rougeL",
        split="evaluation",
        examples=25,
        challenger_mean=0.5,
        incumbent_mean=0.4,
        difference=0.1,
        low=0.02,
        high=0.18,
        level=0.95,
        p_value=0.01,
    )
    return PromotionDecision(
        id=f"p{number}",
        outcome=outcome,
        reason="better",
        challenger="bot/2",
        incumbent="bot/1",
        evidence=(evidence,),
    )


def test_a_trial_comes_back_as_it_was(tracker, client, tmp_path):
    run = start(tracker, "k1")
    point = LossPoint(step=1, tokens_seen=10, train_loss=2.0, learning_rate=0.1)
    later = {"step": 2, "eval_loss": 1.9, "scores": {"rougeL": 0.25}}
    run.log_curve([point, point.model_copy(update=later)])
    adapter = make_adapter(tmp_path / "adapter")
    model_id = run.log_adapter(adapter, name="lora lr=0.001", params={"base_model": "smollm2"}, step=2)
    result = result_of(run, "k1", logged_model_id=model_id, data={"train_dropped": 3})
    assert tracker.find_trial("k1") is None
    run.finish(result)
    assert tracker.find_trial("k1") == result
    assert tracker.find_trial("other") is None

    logged = client.get_run(run.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.info.run_name == "lora k1"
    assert logged.data.params["rank"] == "8"
    assert logged.data.tags["role"] == "trial"
    assert logged.data.tags["status"] == "completed"
    metrics = logged.data.metrics
    assert metrics["eval/rougeL"] == 0.5
    assert metrics["eval/loss"] == 1.5
    assert metrics["train/tokens_seen"] == 10
    assert metrics["eval/rougeL_at_points"] == 0.25
    assert metrics["data/train_dropped"] == 3
    assert metrics["cost/adapter_bytes"] == 9
    assert metrics["speed/latency_p95_ms"] == 20
    assert [p.step for p in client.get_metric_history(run.run_id, "train/loss")] == [1, 2]
    contexts = {i.dataset.name: (i.dataset.digest, i.tags[0].value) for i in logged.inputs.dataset_inputs}
    assert contexts == {
        "support/train": (DATASET.id, "training"),
        "support/evaluation": (DATASET.id, "eval"),
    }
    assert [m.model_id for m in logged.outputs.model_outputs] == [model_id]

    model = client.get_logged_model(model_id)
    assert model.status == "READY"
    on_model = {m.key: (m.value, m.dataset_name, m.dataset_digest) for m in model.metrics}
    assert on_model["eval/rougeL"] == (0.5, "support/evaluation", DATASET.id)

    table = json.loads(Path(client.download_artifacts(run.run_id, "samples.json", str(tmp_path))).read_text())
    assert table["columns"] == ["prompt", "reference", "output", "exact_match", "rougeL"]
    assert len(table["data"]) == 20
    assert table["data"][0][:3] == ["question 3", "answer 3", "näher an answer 3"]
    assert client.load_table(tracker.experiment_id, "samples.json", [run.run_id]).shape == (20, 5)


def test_a_second_attempt_goes_on_in_the_same_run(tracker, client):
    first = start(tracker, "k1")
    first.finish(result_of(first, "k1", status="failed", reason="node lost"))
    assert client.get_run(first.run_id).info.status == "FAILED"
    assert tracker.find_trial("k1") is None

    second = start(tracker, "k1", params={"method": "lora", "rank": 16, "seed": 1})
    assert second.run_id == first.run_id
    run = client.get_run(second.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["attempt"] == "2"
    assert run.data.params["rank"] == "8"
    assert run.data.params["seed"] == "1"
    assert len(run.inputs.dataset_inputs) == 2
    second.finish(result_of(second, "k1"))
    found = tracker.find_trial("k1")
    assert found is not None and found.status == "completed"
    table = client.load_table(tracker.experiment_id, "samples.json", [second.run_id])
    assert len(table) == 20, "a second attempt must replace the table, not add to it"


def test_losses_that_are_not_numbers_survive(tracker):
    run = start(tracker, "nan")
    run.log_curve(
        [LossPoint(step=1, tokens_seen=1, train_loss=math.nan, eval_loss=math.inf, learning_rate=1)]
    )
    run.finish(result_of(run, "nan", status="stopped", eval_loss=math.nan, report=None, speed=None))
    found = tracker.find_trial("nan")
    assert found is not None and found.eval_loss is not None and math.isnan(found.eval_loss)


def test_an_infeasible_trial_is_settled_and_a_failed_one_is_not(tracker):
    for key, status in (("i", "infeasible"), ("f", "failed")):
        run = start(tracker, key)
        run.finish(result_of(run, key, status=status, reason="no CUDA", report=None, speed=None))
    found = tracker.find_trial("i")
    assert found is not None and found.reason == "no CUDA"
    assert tracker.find_trial("f") is None


def test_close_trial_ends_what_could_not_end_itself(tracker, client):
    killed = start(tracker, "killed")
    tracker.close_trial("s1", "killed", status="stopped", reason="ASHA")
    run = client.get_run(killed.run_id)
    assert (run.info.status, run.data.tags["status"], run.data.tags["reason"]) == (
        "FINISHED",
        "stopped",
        "ASHA",
    )
    assert tracker.find_trial("killed") is None, "it never wrote its record"

    crashed = start(tracker, "crashed")
    tracker.close_trial("s1", "crashed", status="failed", reason="out of memory")
    assert client.get_run(crashed.run_id).info.status == "FAILED"

    done = start(tracker, "done")
    done.finish(result_of(done, "done"))
    tracker.close_trial("s1", "done", status="failed", reason="too late")
    run = client.get_run(done.run_id)
    assert (run.info.status, run.data.tags["status"], run.data.tags["reason"]) == (
        "FINISHED",
        "completed",
        "",
    )
    tracker.close_trial("s1", "unknown", status="failed", reason="never made")


def test_a_sweep_is_resumed_and_its_winner_moves(tracker, client):
    runs = {key: start(tracker, key) for key in ("a", "b")}
    parent = tracker.start_sweep("s1", params={"trials": 3}, dataset=DATASET)
    assert client.get_run(runs["a"].run_id).data.tags["mlflow.parentRunId"] == parent
    for winner in ("a", "b"):
        rows = tuple(
            LeaderboardRow(
                rank=1,
                key=key,
                run_id=run.run_id,
                label=f"lora {key}",
                method={"name": "lora"},
                status="completed",
                quality=Interval(mean=0.5, low=0.4, high=0.6),
                metrics={"rougeL": 0.5},
            )
            for key, run in runs.items()
        )
        board = Leaderboard(
            sweep_id="s1",
            dataset_id=DATASET.id,
            objective="rougeL",
            rows=rows,
            winner_key=winner,
            winner_reason="best",
        )
        assert tracker.start_sweep("s1", params={}, dataset=DATASET) == parent
        assert client.get_run(parent).info.status == "RUNNING"
        tracker.finish_sweep(parent, board)
    done = client.get_run(parent)
    assert done.info.status == "FINISHED"
    assert done.data.metrics["best/rougeL"] == 0.5
    assert done.data.tags["winner"] == "b"
    assert {k for k, r in runs.items() if client.get_run(r.run_id).data.tags.get("winner") == "true"} == {"b"}
    assert {"leaderboard.json", "leaderboard.md"} <= {f.path for f in client.list_artifacts(parent)}


def test_the_view_is_one_however_often_it_is_saved(tracker, client):
    first, second = tracker.leaderboard_url(), tracker.leaderboard_url("token_f1")
    assert first == second
    tags = client.get_experiment(tracker.experiment_id).tags
    assert len([t for t in tags if t.startswith("mlflow.sharedViewState.")]) == 1


def test_drift_and_decisions_are_logged(tracker, client, tmp_path):
    page = tmp_path / "evidently.html"
    page.write_text("<p>größer</p>", encoding="utf-8")
    drift = DriftReport(
        id="r1",
        model="bot",
        model_version=1,
        reference_id="ref",
        window_start="2026-01-05T00:00:00+00:00",
        window_end="2026-01-12T00:00:00+00:00",
        rows=50,
        reference_rows=50,
        status="drift",
        p_value=0.001,
        effect=None,
        alpha=0.01,
        summary="topics moved",
    )
    run_id = tracker.log_drift(drift, page)
    assert tracker.log_drift(drift, None) == run_id
    decided = RetrainDecision(
        id="x",
        drift_report_id="r1",
        model="bot",
        model_version=1,
        action="retrain",
        reason="moved",
        created="now",
    )
    tracker.log_decision(run_id, decided)
    run = client.get_run(run_id)
    assert run.data.tags["role"] == "drift"
    assert run.data.tags["retrain.action"] == "retrain"
    assert run.data.metrics == {"drift/p_value": 0.001, "drift/alpha": 0.01, "drift/rows": 50}
    files = {f.path for f in client.list_artifacts(run_id)}
    assert files == {"report.html", "report.json", "retrain_decision.json"}
    kept = json.loads(Path(client.download_artifacts(run_id, "report.json", str(tmp_path))).read_text())
    assert DriftReport.model_validate(kept) == drift.model_copy(update={"run_id": run_id})


def test_registering_twice_gives_one_version(tracker, registry, tmp_path):
    result = trained(tracker, tmp_path, "k1")
    version = registry.register("bot-once", result)
    assert registry.register("bot-once", result) == version
    assert registry.versions("bot-once") == (version,)
    assert registry.version("bot-once", 1) == version
    assert (version.logged_model_id, version.method) == (result.logged_model_id, result.method)
    assert registry.versions("no-such") == ()
    with pytest.raises(ModelError, match="no version 7"):
        registry.version("bot-once", 7)
    with pytest.raises(ValueError, match="kept no model"):
        registry.register("bot-once", result.model_copy(update={"logged_model_id": None}))


def test_an_alias_that_is_not_there_is_none(tracker, registry, tmp_path):
    assert registry.by_alias("bot-alias", "champion") is None
    version = registry.register("bot-alias", trained(tracker, tmp_path, "k1"))
    assert registry.by_alias("bot-alias", "champion") is None
    registry.set_alias("bot-alias", "challenger", version.version)
    assert registry.by_alias("bot-alias", "challenger") == version


def test_promotion_needs_the_champion_it_was_decided_against(tracker, registry, client, tmp_path):
    lock = tmp_path / "locks" / "promotion.lock"
    one, two, three = (
        registry.register("bot", trained(tracker, tmp_path, k, k.encode())) for k in ("a", "b", "c")
    )
    with pytest.raises(ValueError, match="not 'promote'"):
        registry.promote(one, decision(0, "reject"), expected=None, promotion_lock=lock)
    registry.promote(one, decision(1), expected=None, promotion_lock=lock)
    registry.promote(two, decision(2), expected=one, promotion_lock=lock)
    with pytest.raises(PromotionConflictError, match="bot/2, not bot/1"):
        registry.promote(three, decision(3), expected=one, promotion_lock=lock)
    registry.promote(two, decision(2), expected=one, promotion_lock=lock)  # a retry finds the work done
    assert registry.by_alias("bot", "champion") == two
    tags = client.get_model_version("bot", "2").tags
    assert (tags["promotion.id"], tags["promotion.outcome"]) == ("p2", "promote")
    kept = json.loads(
        Path(client.download_artifacts(two.run_id, "promotion_p2.json", str(tmp_path))).read_text()
    )
    assert PromotionDecision.model_validate(kept) == decision(2)
    assert "promotion.id" not in client.get_model_version("bot", "3").tags
    registry.promote(one, decision(4), expected=two, promotion_lock=lock)  # a rollback is the same act
    assert registry.by_alias("bot", "champion") == one


def test_of_concurrent_promoters_one_wins(tracker, server, tmp_path):
    lock = tmp_path / "promotion.lock"
    registries = [Registry(server.url, tmp_path / "cache") for _ in range(4)]
    results = [trained(tracker, tmp_path, str(i), bytes([i])) for i in range(4)]
    versions = [registries[0].register("bot-race", r) for r in results]

    def promote(number: int) -> bool:
        try:
            registries[number].promote(versions[number], decision(number), expected=None, promotion_lock=lock)
        except PromotionConflictError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(promote, range(4)))
    assert sum(won) == 1
    assert registries[0].by_alias("bot-race", "champion") == versions[won.index(True)]


def test_fetch_downloads_once(tracker, registry, server, tmp_path, monkeypatch):
    result = trained(tracker, tmp_path, "k1")
    folder = registry.fetch(result.logged_model_id)
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert [f.name for f in registry.cache.iterdir()] == [result.logged_model_id], "nothing temporary is left"
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda **_: pytest.fail("downloaded again"))
    assert registry.fetch(result.logged_model_id) == folder


@pytest.fixture
def stored(tracker, client, server, tmp_path):
    """A logged model's id, and its files in the server's artifact store."""
    result = trained(tracker, tmp_path, "k1")
    location = client.get_logged_model(result.logged_model_id).artifact_location
    folder = (
        Path(psutil.Process(server.pid).cwd()) / "artifacts" / location.removeprefix("mlflow-artifacts:/")
    )
    assert (folder / "adapter_model.safetensors").exists()
    return result.logged_model_id, folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "extra.json"])
def test_tampered_files_are_refused(stored, registry, name):
    model_id, folder = stored
    (folder / name).write_bytes(b"evil")
    with pytest.raises(ModelError, match="not those that were logged"):
        registry.fetch(model_id)
    assert not list(registry.cache.iterdir())


def test_pickled_files_are_refused_both_ways(stored, registry, tracker, tmp_path):
    model_id, folder = stored
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickled file"):
        registry.fetch(model_id)
    pickled = make_adapter(tmp_path / "pickled")
    (pickled / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"optimizer\.pt"):
        start(tracker, "p").log_adapter(pickled, name="p", params={}, step=0)


def test_artifacts_come_back_under_their_name(tracker, registry, tmp_path):
    run = start(tracker, "k1")
    source = make_adapter(tmp_path / "source")
    registry.save_artifact(run.run_id, "reference", source)
    registry.save_artifact(run.run_id, "notes/reference.json", source / "adapter_config.json")
    folder = registry.load_artifact(run.run_id, "reference", tmp_path / "back")
    assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert registry.load_artifact(run.run_id, "notes/reference.json", tmp_path / "back").read_text() == "{}"
    with pytest.raises(ServiceError):
        registry.load_artifact(run.run_id, "missing", tmp_path / "back")


def test_a_tracker_can_be_sent_to_an_actor(tracker, client):
    run = start(tracker, "far")
    sent = pickle.loads(pickle.dumps(tracker))
    sent.close_trial("s1", "far", status="stopped", reason="closed from afar")
    assert client.get_run(run.run_id).data.tags["reason"] == "closed from afar"


def test_a_dead_server_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unanswered.getsockname()[1]}"
        with pytest.raises(ServiceError, match=url):
            check_server(url)
        began = time.monotonic()
        with pytest.raises(ServiceError, match=url):
            Registry(url, tmp_path).by_alias("bot", "champion")
        assert time.monotonic() - began < 10
        with pytest.raises(ServiceError, match=url):
            Tracker(url, "x").find_trial("k")
    with pytest.raises(ServiceError, match="not an http"):
        check_server("sqlite:///x.db")


def test_a_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} .* already in use\n  mend: .*tracking\.port"):
            start_server(tmp_path, "127.0.0.1", port)
    assert not list(tmp_path.iterdir())


def test_a_server_that_cannot_start_leaves_nothing_running(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(ServiceError, match="not a database"):
        start_server(tmp_path, "127.0.0.1", 0)
    assert not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_command(p))]


def test_stopping_what_is_not_ours_does_nothing():
    bystander = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        stop_server(bystander.pid)
        assert bystander.poll() is None
    finally:
        bystander.communicate()
    stop_server(bystander.pid)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
