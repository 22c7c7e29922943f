"""A whole retraining on a real cluster: trained, judged, accounted for, and not done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from jobs.decisions import fresh_examples
from jobs.retrain import conclude, outcome_file
from jobs.sweep import sweep
from jobs.workspace import Connection
from regraft.cluster.local import join, start_local_ray, stop_local_ray
from regraft.config import Experiment
from regraft.data.chats import write_chats
from regraft.data.dataset import load_dataset
from regraft.records import Example, Message, PromotionDecision, RetrainDecision
from regraft.tracking.ledger import Ledger


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this test's own, joined."""
    import ray

    started = start_local_ray(
        tmp_path_factory.mktemp("ray"), num_cpus=2, num_gpus=None, dashboard_port=0, environment={}
    )
    join(started.address)
    yield
    ray.shutdown()
    stop_local_ray(started.pid)


@pytest.mark.slow
def test_a_retraining_cut_short_before_its_outcome_finds_what_is_finished(
    cluster: None,
    mlflow_url: str,
    variant: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = [{"name": "zero_shot"}, {"name": "lora", "rank": 2, "learning_rate": 0.01}]
    file = variant(tmp_path, "retrained", methods=methods)
    turns = [("Where is the shelter?", "At the school."), ("Is it open at night?", "Yes, it is.")]
    fresh = [
        Example(
            id=f"f{i}",
            messages=(Message(role="user", content=asked), Message(role="assistant", content=told)),
        )
        for i, (asked, told) in enumerate(turns)
    ]
    write_chats(tmp_path / "reviewed.jsonl", fresh)
    raw = yaml.safe_load(file.read_text()) | {"retrain": {"reviewed": "reviewed.jsonl", "old_per_fresh": 2}}
    file.write_text(yaml.safe_dump(raw))
    experiment = Experiment.load(file)
    connection = Connection(
        tracking_uri=mlflow_url, ray_address="", jobs_url=None, workspace=tmp_path / "workspace"
    )
    _, results, _ = sweep(experiment, load_dataset(experiment.name, experiment.data), connection)
    champion = connection.registry.register(
        experiment.name, next(r for r in results if r.method["name"] == "lora")
    )
    word = PromotionDecision(id="p", outcome="promote", reason="", challenger="", incumbent="", evidence=())
    connection.registry.promote(champion, word, expected=None, promotion_lock=connection.promotion_lock)
    ledger = Ledger(connection.tracker(experiment))
    decision = ledger.note(
        RetrainDecision(
            id="d", drift_report_id="r", model=experiment.name, model_version=champion.version,
            action="retrain", reason="New content.", created="2026-01-01T00:00:00+00:00", alarm_id="a", job_id="j",
        )
    )  # fmt: skip
    assert fresh_examples(experiment, ledger) == 2

    def killed(*_: object) -> None:
        raise Killed

    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "note_outcome", killed)
        with pytest.raises(Killed):
            conclude(experiment, decision, connection, ledger, lines.append)
    assert any("6 to train on" in line for line in lines)
    assert [d.id for d in ledger.open(experiment.name)] == ["d"]
    lines.clear()
    outcome = conclude(experiment, decision, connection, ledger, lines.append)
    assert not any(line.startswith("started") for line in lines)
    assert outcome.status in {"promoted", "rejected"}
    assert outcome.version == champion.version + 1
    assert outcome.cpu_hours > 0
    assert outcome.gpu_hours == 0
    assert outcome_file(connection, "d").exists()
    assert fresh_examples(experiment, ledger) == 0
    assert ledger.open(experiment.name) == ()
    assert conclude(experiment, decision, connection, ledger, lines.append) == outcome
