"""The report of a sweep: what it draws from the records, and that it can be read without anything beside it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from regraft.records import Cost, EvalReport, ExampleScore, LossPoint, Speed, TrialResult
from regraft.selection.chart import scatter
from regraft.selection.rank import rank
from regraft.selection.render import markdown, page
from regraft.selection.sweep_report import SweepReport, report_on


def trial(label: str, scores: list[float], seconds: float = 10.0, **more: Any) -> TrialResult:
    name, _, size = label.partition(" rank=")
    examples = tuple(
        ExampleScore(
            example_id=str(i), prompt=f"<b>Question {i}</b>", reference="right", output=f"{label} says {i}",
            scores={"rougeL": score},
        )
        for i, score in enumerate(scores)
    )  # fmt: skip
    settings: dict[str, Any] = {
        "key": label, "sweep_id": "s", "run_id": f"run {label}", "label": label,
        "method": {"name": name} | ({"rank": int(size)} if size else {}),
        "base_model": "b", "base_revision": "v", "dataset_id": "d", "status": "completed",
        "cost": Cost(train_seconds=seconds, memory_peak_gib=2.0, trainable_parameters=int(size or 100)),
        "speed": Speed(
            latency_p50_ms=1, latency_p95_ms=50, first_token_p50_ms=1, tokens_per_second=1, how="timed"
        ),
        "report": EvalReport(dataset_id="d", split="e", metric_versions={}, examples=examples),
    } | more  # fmt: skip
    return TrialResult(**settings)


def noisy(mean: float, shift: float = 0.0) -> list[float]:
    return [mean + 0.1 * ((i * 7 + 3 * shift) % 5 - 2) / 2 for i in range(60)]


TRIALS = [
    trial("zero_shot", noisy(0.1), 0.0),
    trial("full", noisy(0.5), 100.0, cost=Cost(train_seconds=100, memory_peak_gib=8.0)),
    trial("lora rank=8", noisy(0.45, 1), 20.0),
    trial("lora rank=16", noisy(0.5, 1), 25.0),
    trial("ia3", noisy(0.3), 15.0),
    trial("qlora", [], status="stopped", report=None),
    trial("vera", [], status="infeasible", reason="needs 9 GiB", report=None),
]


def made(trials: list[TrialResult], **more: Any) -> SweepReport:
    board = rank(
        trials, sweep_id="s", objective="rougeL", constraints=(), tie_break=None, level=0.95, resamples=400
    )
    return report_on(board, trials, level=0.95, resamples=400, **more)


def test_each_method_stands_beside_full_fine_tuning_and_the_control() -> None:
    facts = {f.method: f for f in made(TRIALS).methods}
    assert list(facts) == ["lora", "full", "ia3"]
    lora = facts["lora"]
    assert lora.best.label == "lora rank=16"
    assert lora.seconds_ratio == pytest.approx(0.25)
    assert lora.memory_ratio == pytest.approx(0.25)
    assert lora.against_full is not None
    assert lora.against_full.low <= 0 <= lora.against_full.high
    assert lora.against_control is not None
    assert lora.against_control.difference == pytest.approx(0.4)
    assert facts["full"].against_full is None
    assert facts["ia3"].against_full is not None
    assert facts["ia3"].against_full.high < 0


def test_what_rank_bought_is_paired_with_the_rank_below() -> None:
    below, above = made(TRIALS).ranks
    assert (below.rank, above.rank, below.over_lower) == (8, 16, None)
    assert above.over_lower is not None
    assert above.over_lower.difference == pytest.approx(0.05)


def test_the_recommendation_names_gain_and_what_is_cheaper_within_noise() -> None:
    slower = [t if t.label != "full" else trial("full", noisy(0.501), 100.0) for t in TRIALS]
    words = made(slower).recommendation
    assert words.startswith("Take full: highest rougeL")
    assert "Over 60 examples it gains +0.401" in words
    assert "lora rank=16 is within noise of it and trained 4.0 times faster" in words


def test_a_lead_within_noise_is_not_sold_as_one() -> None:
    close = [trial("zero_shot", noisy(0.5), 0.0), trial("lora rank=8", noisy(0.502, 1))]
    assert "is within noise: prompting alone may do as well" in made(close).recommendation


def test_a_sweep_without_a_winner_says_so() -> None:
    report = made([trial("zero_shot", noisy(0.5))])
    assert report.recommendation.startswith("Nothing to serve")
    assert page(report)
    assert markdown(report)


def test_infeasible_trials_and_what_the_budget_left_out_are_listed() -> None:
    report = made(TRIALS, left_out=["lora rank=64: over the budget"])
    text = markdown(report)
    assert "| vera | infeasible | needs 9 GiB |" in text
    assert "| lora rank=64: over the budget |" in text
    assert "Left out by the budget: 1." in report.recommendation
    assert "qlora" in text


class Reader(HTMLParser):
    """Checks that tags close in order, and collects what a page would load."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [str(v) for k, v in attributes if k in {"src", "href"}]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [str(v) for k, v in attributes if k in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_loads_nothing_and_escapes_what_people_wrote() -> None:
    text = page(made(TRIALS))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.loads == []
    assert "<script" not in text
    assert "<b>Question" not in text
    assert "<b>Question 0</b>" in reader.text
    assert text.count("<svg") == 3
    assert text.count("<circle") == 3 * 4 + 2, "the control trains for no time and has no place on that axis"


def test_a_chart_keeps_its_points_inside_whatever_the_values() -> None:
    for points in (
        [(1.0, 0.5, "a", True, False), (1.0, 0.5, "b", False, True)],
        [(0.001, 0.1, "a", True, False), (1e6, 0.9, "b", True, False)],
        [(5.0, -0.2, "a", True, False), (6.0, 0.0, "b", False, False), (7.0, 3.0, "c", True, False)],
    ):
        drawn = scatter(points, "price", "quality")
        places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
        assert len(places) == len(points)
        assert all(52 <= x <= 406 and 12 <= y <= 260 for x, y in places)
        assert "nan" not in drawn
        written = re.findall(r'text-anchor="end">(-?[\d.,]+)<', drawn)
        assert len(written) >= 3
        assert len(set(written)) == len(written), "two ticks are written alike"


def test_learning_curves_are_drawn_of_all_that_have_one_the_stopped_too() -> None:
    def curve(*losses: float) -> tuple[LossPoint, ...]:
        return tuple(
            LossPoint(step=i, tokens_seen=100 * i, train_loss=loss, eval_loss=loss, learning_rate=0.1)
            for i, loss in enumerate(losses, start=1)
        )

    trials = [
        trial("zero_shot", noisy(0.1), 0.0, curve=curve(3.0)),
        trial("full", noisy(0.5), 100.0, curve=curve(3.0, 2.0, 1.0)),
        trial("ia3", [], status="stopped", report=None, curve=curve(3.0, 2.9, float("nan"))),
    ]
    report = made(trials)
    assert report.curves == (
        ("full", ((100.0, 3.0), (200.0, 2.0), (300.0, 1.0))),
        ("ia3", ((100.0, 3.0), (200.0, 2.9))),
    )
    text = page(report)
    assert 'aria-label="evaluation loss over tokens seen"' in text
    assert "nan" not in text
    reader = Reader()
    reader.feed(text)
    assert reader.open == []


def test_the_labels_of_points_close_together_do_not_cover_each_other() -> None:
    points = [(10.0 + i / 10, 0.5 + i / 1000, f"lora rank={2**i}", True, False) for i in range(6)]
    drawn = scatter([*points, (30.0, 0.9, "full", True, False)], "seconds", "rougeL")
    words = r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(start|end)">((?:lora|full)[^<]*)</text>'
    boxes = []
    for x, y, anchor, label in re.findall(words, drawn):
        left = float(x) - (6 * len(label) if anchor == "end" else 0)
        boxes.append((left, left + 6 * len(label), float(y)))
    assert 3 <= len(boxes) <= 7, "what has no room is left to the title of its point"
    assert any("full" in found for found in re.findall(words, drawn)[-1])
    for i, (left, right, y) in enumerate(boxes):
        for other in boxes[:i]:
            assert right <= other[0] or other[1] <= left or abs(y - other[2]) >= 12
    assert drawn.count("<title>") == 7


def test_the_winners_weak_kinds_of_examples_are_named_and_chance_ones_are_not() -> None:
    intents = ("billing", "outage", "moving", "rare")

    def tagged(scores: list[float]) -> EvalReport:
        examples = [
            e.model_copy(
                update={
                    "tags": {
                        "intent": "rare" if i < 3 else intents[i % 3],
                        "id": str(i),  # a value each: no kind of example
                        "set": "evaluation",  # all the same
                    }
                }
            )
            for i, e in enumerate(trial("lora", scores).report.examples)  # type: ignore[union-attr]
        ]
        return EvalReport(dataset_id="d", split="e", metric_versions={}, examples=tuple(examples))

    even = [0.5 + 0.1 * ((i * 7) % 5 - 2) for i in range(60)]
    weak = [s - (0.3 if i >= 3 and intents[i % 3] == "outage" else 0) for i, s in enumerate(even)]
    found = made([trial("zero_shot", noisy(0.1), 0.0), trial("lora", weak, report=tagged(weak))])
    first, *others = [(s.field, s.value, s.examples, s.weak) for s in found.slices]
    assert first == ("intent", "outage", 19, True)
    assert sorted(others) == [("intent", "billing", 19, False), ("intent", "moving", 19, False)]
    assert "It is weak, by rougeL, at intent outage" in found.recommendation
    assert "Where the winner is weakest" in markdown(found)
    assert "outage" in page(found)
    calm = made([trial("zero_shot", noisy(0.1), 0.0), trial("lora", even, report=tagged(even))])
    assert not any(s.weak for s in calm.slices)
    assert "weak" not in calm.recommendation
