"""The loop on SmolLM2, through the command line, as a user runs it; then what a person sees in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from regraft.processes import free_port

# The first test waits for the whole loop.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1000)]

ROOT = Path(__file__).parents[2]
REGRAFT = [sys.executable, "-m", "jobs.cli"]


def _regraft(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*REGRAFT, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env=_environment(cwd),
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    return output


def _environment(cwd: Path) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "OMP_"))}
    return keep | {"REGRAFT_WORKSPACE": str(cwd / ".regraft"), "COLUMNS": "160"}


def _processes_of(cwd: Path) -> list[str]:
    """Command lines of processes that belong to a workspace."""
    return [
        " ".join(process.info["cmdline"] or [])[:200]
        for process in psutil.process_iter(["cmdline", "environ"])
        if (process.info["environ"] or {}).get("REGRAFT_WORKSPACE") == str(cwd / ".regraft")
    ]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The bundled example, cut down to minutes, played through once."""
    cwd = tmp_path_factory.mktemp("loop")
    shutil.copytree(ROOT / "examples" / "utility-support", cwd / "case")
    traffic = cwd / "case" / "data" / "traffic.jsonl"
    traffic.write_text("".join(traffic.read_text().splitlines(keepends=True)[:60]))
    file = cwd / "case" / "regraft.yaml"
    experiment = yaml.safe_load(file.read_text())
    tracking, dashboard, endpoint = (free_port(0, "") for _ in range(3))
    experiment["sweep"] |= {
        "methods": [
            {"name": "zero_shot"},
            {"name": "lora", "rank": 16, "learning_rate": 2.0e-3},
        ],
        "ray_train": ["lora"],
        "epochs": 0.3,
        "loss_examples": 12,
    }
    # One candidate: little to choose, the more to judge by.
    experiment["evaluate"] |= {"max_new_tokens": 24, "latency_prompts": 1, "final_share": 0.7}
    # What likelihoods say is tested elsewhere, and how long a token takes is no matter of this test.
    experiment["evaluate"]["metrics"] = [{"name": name} for name in ("rouge", "form", "refusal", "pii")]
    experiment["select"]["gate"] = {"at_most_times": {}}
    experiment["retrain"]["epochs"] = 1.4
    experiment |= {"tracking": {"port": tracking}, "cluster": {"dashboard_port": dashboard}}
    experiment["serve"] |= {"port": endpoint}
    file.write_text(yaml.safe_dump(experiment))
    return cwd, _regraft(cwd, "quickstart", "case")


def _journal(cwd: Path, stage: str) -> dict:
    (file,) = (cwd / ".regraft" / "journal").glob(f"{stage}-*.json")
    return json.loads(file.read_text())


def test_the_quickstart_leaves_nothing_running(played):
    cwd, _ = played
    assert _processes_of(cwd) == []


def test_the_winner_beat_the_control_and_became_champion(played):
    cwd, output = played
    sweep = _journal(cwd, "sweep")
    assert sweep["decision"]["outcome"] == "promote"
    assert sweep["decision"]["incumbent"] == "the untuned base (zero_shot)"
    (overall, *_) = sweep["decision"]["evidence"]
    assert overall["low"] > 0
    assert "utility-support/1 is the champion" in output


def test_the_ordinary_week_is_stable_and_the_storm_week_drifts(played):
    cwd, _ = played
    ordinary, storm = _journal(cwd, "ordinary"), _journal(cwd, "storm")
    assert (ordinary["report"]["status"], ordinary["decision"]["action"]) == ("stable", "nothing")
    assert (storm["report"]["status"], storm["decision"]["action"]) == ("drift", "retrain")
    assert ordinary["report"]["rows"] == 61, "those of the week, and the first question"
    assert storm["report"]["rows"] == 120
    assert storm["report"]["run_id"]


def test_the_challenger_beats_the_champion_on_both_sets_together_and_takes_its_place(played):
    cwd, output = played
    done = _journal(cwd, "retraining")
    assert done["version"]["version"] == 2
    evidence = {c["split"]: c for c in done["decision"]["evidence"] if c["against"] == "utility-support/1"}
    beaten = [c["against"] for c in done["decision"]["evidence"] if c["split"] == "all sets"]
    assert beaten == ["utility-support/1", "the untuned base (zero_shot)"]
    assert done["decision"]["parity"]["paths"].keys() == {"served", "merged", "recorded"}
    assert set(evidence) == {"all sets", "evaluation", "storm"}
    assert done["decision"]["outcome"] == "promote", done["decision"]["reason"]
    assert evidence["all sets"]["low"] > 0
    assert evidence["storm"]["challenger_mean"] > evidence["storm"]["incumbent_mean"]
    assert "the endpoint answers from utility-support/2" in output


def test_a_second_quickstart_finds_everything_and_runs_nothing(played):
    cwd, _ = played
    output = _regraft(cwd, "quickstart", "case")
    assert "finished already" in output
    assert "started" not in output
    assert _processes_of(cwd) == []


@pytest.fixture(scope="module")
def running(played):
    """`regraft up` after the loop, with the URLs that it printed."""
    cwd, _ = played
    output = _regraft(cwd, "up", "case")
    yield cwd, dict(re.findall(r"^(MLflow|Ray|endpoint) +(http\S+)", output, flags=re.MULTILINE))
    _regraft(cwd, "down")
    assert _processes_of(cwd) == []


def test_up_serves_the_newest_champion_to_the_openai_client(running):
    from openai import OpenAI

    _, urls = running
    client = OpenAI(base_url=urls["endpoint"], api_key="unused")
    messages = [{"role": "user", "content": "When is my bill due?"}]
    answer = client.chat.completions.create(model="utility-support", messages=messages, max_tokens=24)
    assert answer.model == "utility-support/2"
    assert answer.choices[0].message.content
    chunks = client.chat.completions.create(
        model="utility-support", messages=messages, max_tokens=24, stream=True
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content


def test_rollback_moves_the_endpoint_back_without_a_restart(running):
    from jobs.serve import wait_for_champion

    cwd, urls = running
    base = urls["endpoint"].removesuffix("/v1")
    _regraft(cwd, "rollback", "case", "1")
    wait_for_champion(base, "utility-support", 1)
    _regraft(cwd, "rollback", "case", "2")
    wait_for_champion(base, "utility-support", 2)
    assert httpx.get(f"{base}/health").status_code == 200


@pytest.fixture
def page(browser):
    return browser.new_page(viewport={"width": 1600, "height": 1000})


def test_the_leaderboard_link_shows_every_trial_with_its_score(running, page):
    _, urls = running
    page.goto(urls["MLflow"])
    for label in ("zero_shot", "lora rank=16 lr=0.002"):
        page.get_by_text(label, exact=True).first.wait_for(timeout=60_000)
    page.get_by_text("eval/rougeL").first.wait_for(timeout=60_000)
    if folder := os.environ.get("REGRAFT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/leaderboard.png")


def test_the_storm_report_says_drift_on_top_and_why(played, page):
    cwd, _ = played
    storm = _journal(cwd, "storm")
    page.goto(Path(storm["html"]).as_uri())
    page.get_by_text("Drift over 120 exchanges", exact=False).first.wait_for(timeout=60_000)
    body = page.locator("body").inner_text()
    assert "utility-support" in body
    assert f"{storm['report']['p_value']:.3f}" in body or "0.003" in body
    if folder := os.environ.get("REGRAFT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/drift.png")
