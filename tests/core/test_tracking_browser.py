"""What a person sees who opens the leaderboard. MLflow's view format is undocumented: a browser reads it."""

import re

import pytest

from regraft.records import (
    Cost,
    DatasetVersion,
    EvalReport,
    Example,
    ExampleScore,
    LossPoint,
    Message,
    Speed,
    TrialResult,
)
from regraft.tracking.runs import Tracker
from regraft.tracking.view import PRICES

TRIALS = {
    "lora rank=8 lr=0.001": ({"method": "lora", "rank": 8, "learning_rate": 0.001}, 0.4321),
    "p_tuning tokens=20 lr=0.03": ({"method": "p_tuning", "learning_rate": 0.03}, 0.2987),
    "zero_shot": ({"method": "zero_shot"}, 0.1654),
}


@pytest.fixture
def url(mlflow_url):
    return log_sweep(Tracker(mlflow_url, "leaderboard"))


def log_sweep(tracker: Tracker) -> str:
    turns = (
        Message(role="user", content="When is the bill due?"),
        Message(role="assistant", content="On the 5th."),
    )
    example = Example(id="e1", messages=turns)
    dataset = DatasetVersion(
        id="d" * 16, name="support", splits={"train": (example,), "evaluation": (example,)}
    )
    sweep = tracker.start_sweep("s1", params={"trials": len(TRIALS)}, dataset=dataset)
    for number, (label, (params, score)) in enumerate(TRIALS.items()):
        run = tracker.start_trial(
            sweep, sweep_id="s1", key=f"k{number}", label=label, params=params, dataset=dataset
        )
        run.log_curve(
            [
                LossPoint(step=s, tokens_seen=s * 9, train_loss=3 / s, eval_loss=4 / s, learning_rate=0.1)
                for s in range(1, 5)
            ]
        )
        answer = ExampleScore(
            example_id="e1",
            prompt="When is the bill due?",
            reference="On the 5th.",
            output="The 5th",
            scores={"rougeL": score, "rouge1": 0.9, "token_f1": 0.8, "exact_match": 0.0},
        )
        run.finish(
            TrialResult(
                key=f"k{number}",
                sweep_id="s1",
                run_id=run.run_id,
                label=label,
                method={"name": params["method"]},
                base_model="smollm2",
                base_revision="abc",
                dataset_id=dataset.id,
                status="completed",
                eval_loss=1.0,
                cost=Cost(train_seconds=12.5 + number, trainable_parameters=1000, memory_peak_gib=0.5),
                speed=Speed(
                    latency_p50_ms=10,
                    latency_p95_ms=20 + number,
                    first_token_p50_ms=5,
                    tokens_per_second=90,
                    how="one by one",
                ),
                report=EvalReport(
                    dataset_id=dataset.id,
                    split="evaluation",
                    metric_versions={"rougeL": 1},
                    examples=(answer,),
                ),
            )
        )
    return tracker.leaderboard_url()


def test_the_leaderboard_shows_every_trial_with_its_quality(url, browser, tmp_path):
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 2400, "height": 1200})
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    page.goto(url)
    for label, (_, score) in TRIALS.items():
        expect(page.get_by_text(label, exact=True).first).to_be_visible()
        expect(page.get_by_text(re.compile(rf"^{score}\d*$")).first).to_be_visible()
    page.screenshot(path=tmp_path / "leaderboard.png")
    page.locator("label:has(input[value=CHART])").click()
    for title in (
        "Leaderboard",
        "Parallel Coordinates",
        *(f"{price} vs. eval/rougeL" for price in PRICES),
        "Learning curves",
    ):
        expect(page.get_by_text(title, exact=True).first).to_be_visible()
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    # Every trial is a point of every scatter: what it cost and how good it is.
    for price in PRICES:
        card = page.locator("[data-testid='experiment-view-compare-runs-card']").filter(
            has_text=f"{price} vs. eval/rougeL"
        )
        expect(card.locator(".scatterlayer .point")).to_have_count(len(TRIALS))
    page.screenshot(path=tmp_path / "charts.png")
