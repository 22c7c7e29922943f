from __future__ import annotations

import pytest
from pydantic import ValidationError

from regraft.records import (
    Cost,
    DatasetVersion,
    EvalReport,
    Example,
    ExampleScore,
    Leaderboard,
    LeaderboardRow,
    Message,
    Record,
    Speed,
    TrialResult,
    content_hash,
)

CHAT = Example(
    id="q1",
    messages=(
        Message(role="user", content="Wer zahlt? →\u2028😀"),
        Message(role="assistant", content="Wir."),
    ),
    tags={"intent": "billing"},
)
SCORED = ExampleScore(
    example_id="q1",
    prompt="a",
    reference="b",
    output="",
    scores={"rougeL": 1 / 3},
    failures={"judge": "ValueError: no"},
)
REPORT = EvalReport(dataset_id="d", split="evaluation", metric_versions={"rouge": 1}, examples=(SCORED,))
TRIAL = TrialResult(
    key="k",
    sweep_id="s",
    run_id="r",
    label="lora rank=8",
    method={"name": "lora", "rank": 8, "learning_rate": 2e-3, "alpha": "double"},
    base_model="b",
    base_revision="v",
    dataset_id="d",
    status="completed",
    eval_loss=1e-17,
    cost=Cost(train_seconds=0.1, tokens_seen=7),
    speed=Speed(
        latency_p50_ms=1, latency_p95_ms=2, first_token_p50_ms=0.5, tokens_per_second=9.5, how="one by one"
    ),
    report=REPORT,
)
ROW = LeaderboardRow(rank=1, key="k", run_id="r", label="l", method={"name": "lora"}, status="completed")
RECORDS: list[Record] = [
    CHAT,
    DatasetVersion(id="d", name="n", splits={"train": (CHAT,), "evaluation": ()}),
    REPORT,
    TRIAL,
    Leaderboard(sweep_id="s", dataset_id="d", objective="rougeL", rows=(ROW,), winner_key="k"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_record_survives_json_unchanged(record: Record) -> None:
    assert type(record).model_validate_json(record.model_dump_json()) == record


def test_record_refuses_unknown_fields_and_changes() -> None:
    with pytest.raises(ValidationError, match="extra"):
        Message.model_validate({"role": "user", "content": "a", "name": "b"})
    with pytest.raises(ValidationError, match="frozen"):
        CHAT.id = "other"  # type: ignore[misc]


def test_content_hash_does_not_depend_on_key_order_but_on_everything_else() -> None:
    value = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert content_hash(value) == content_hash({"b": {"d": None, "c": [1, 2]}, "a": 1})
    others = [
        {"a": 1, "b": {"c": [2, 1], "d": None}},
        {"a": "1", "b": {"c": [1, 2], "d": None}},
        {"a": 1, "b": {"c": [1, 2]}},
    ]
    assert len({content_hash(v) for v in (value, *others)}) == 4


def test_content_hash_is_the_same_in_every_release() -> None:
    # Trials and datasets are found again by it: another value would orphan all that is recorded.
    assert content_hash({"b": [1, "é"], "a": None}) == "f8f17faab95c0248"
    assert content_hash({}, length=8) == "44136fa3"


def test_missing_split_is_named_with_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no split 'test'.*\['evaluation', 'train'\]"):
        RECORDS[1].split("test")  # type: ignore[attr-defined]


def test_mean_leaves_out_examples_on_which_the_metric_failed() -> None:
    failed = SCORED.model_copy(update={"scores": {}, "failures": {"rougeL": "ValueError: no"}})
    report = REPORT.model_copy(update={"examples": (SCORED, failed)})
    assert report.means == {"rougeL": 1 / 3}
    assert report.failure_count == 2
    with pytest.raises(ValueError, match="no example"):
        report.mean("exact_match")
