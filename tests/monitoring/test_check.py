from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from traffic import NEW, ORDINARY, exchange, rows

from monitoring.check import check_window
from monitoring.detectors import EvidentlyColumns
from monitoring.windows import Reference, Row, freeze
from regraft.config import MonitorSection
from regraft.records import CapturedExchange

SETTINGS = MonitorSection(permutations=499)
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return freeze(tmp_path_factory.mktemp("reference"), model="shop", version=1, rows=rows(ORDINARY, 100, 0))


@pytest.fixture(scope="module")
def storm() -> list[CapturedExchange]:
    made = [
        Row(id=f"{row.id}{HOSTILE}", prompt=f"{row.prompt} {HOSTILE}", output=f"{row.output} {HOSTILE}")
        for row in rows(NEW, 70, 5, "n")
    ]
    return [exchange(row, second=i) for i, row in enumerate(made)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, reference, storm) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "drift.html"
    report = check_window(reference, storm, SETTINGS, path)
    assert report.report_path == str(path)
    return path


def test_an_ordinary_window_is_stable(reference):
    report = check_window(reference, [exchange(r) for r in rows(ORDINARY, 80, 7, "w")], SETTINGS)
    assert report.status == "stable"
    assert report.summary.startswith("Stable over 80 exchanges")
    assert report.report_path is None


def test_new_topics_are_drift_and_said_in_words(reference, storm):
    report = check_window(reference, storm, SETTINGS)
    assert report.status == "drift"
    assert report.p_value < SETTINGS.alpha
    assert report.effect >= SETTINGS.min_effect
    assert "the prompts are about other things" in report.summary
    assert any(driver.startswith("terms that grew") for driver in report.drivers)
    assert {test.name for test in report.tests} == {"novelty", "prompt topics", "answer topics", "form"}


def test_significance_without_effect_is_not_drift(reference, storm):
    report = check_window(reference, storm, SETTINGS.model_copy(update={"min_effect": 1.0}))
    assert report.status == "stable"
    assert "too little to act on" in report.summary


def test_an_advisory_detector_decides_nothing(reference, storm):
    assert check_window(reference, storm, SETTINGS, detector=EvidentlyColumns()).status == "stable"


def test_too_few_exchanges_are_insufficient_never_stable(reference, storm, tmp_path):
    failed = [e.model_copy(update={"error": "timeout"}) for e in storm[40:]]
    report = check_window(reference, [*storm[:40], *failed], SETTINGS, tmp_path / "few.html")
    assert report.status == "insufficient"
    assert report.p_value is None
    assert report.effect is None
    assert "30 failed" in report.summary
    assert "Insufficient" in (tmp_path / "few.html").read_text()
    assert check_window(reference, [], SETTINGS).status == "insufficient"
    few = reference.model_copy(update={"rows": reference.rows[:30]})
    assert check_window(few, storm, SETTINGS).status == "insufficient"


def test_empty_answers_are_drift_not_a_crash(reference, tmp_path):
    given = [exchange(r, output="" if i % 3 else r.output) for i, r in enumerate(rows(ORDINARY, 80, 7, "w"))]
    report = check_window(reference, given, SETTINGS, tmp_path / "empty.html")
    assert report.status == "drift"
    assert "empty" in report.summary
    every = [e.model_copy(update={"output": ""}) for e in given]
    assert check_window(reference, every, SETTINGS, tmp_path / "all.html").status == "drift"


def test_the_same_window_gives_the_same_report(reference, storm):
    report = check_window(reference, storm, SETTINGS)
    assert check_window(reference, storm[::-1], SETTINGS) == report
    assert check_window(reference, storm[1:], SETTINGS).id != report.id
    assert check_window(reference, storm, SETTINGS.model_copy(update={"alpha": 0.02})).id != report.id
    assert check_window(reference, storm, SETTINGS.model_copy(update={"every_seconds": 5})).id == report.id


class _Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "img", "link", "iframe", "video", "audio", "source", "object", "embed"}:
            self.found += [v for k, v in attrs if k in {"src", "href", "data"} and v]


def test_the_page_is_self_contained_and_escapes_what_users_wrote(page):
    text = page.read_text()
    parser = _Resources()
    parser.feed(text)
    assert [url for url in parser.found if re.match(r"\s*(https?:)?//", url)] == []
    assert "default-src 'none'" in text
    assert HOSTILE not in text
    assert "onerror=window.hacked=1&gt;" in text
    assert os.environ["DO_NOT_TRACK"] == "1"


def test_a_browser_shows_the_decision_and_evidentlys_columns(page, browser):
    requests, problems = [], []
    view = browser.new_page()
    view.on("request", lambda r: requests.append(r.url))
    view.on("pageerror", lambda e: problems.append(str(e)))
    view.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    view.goto(page.as_uri())
    assert view.locator("#regraft-decision h1").inner_text() == "Drift"
    assert view.locator("#regraft-decision").bounding_box()["y"] < 100
    view.get_by_text("Drift in column 'answer_length'").first.wait_for(timeout=30_000)
    view.get_by_text("Calibrated drift test (this one decides)").first.wait_for(timeout=30_000)
    assert view.evaluate("window.hacked") is None
    assert [url for url in requests if url.startswith(("http:", "https:"))] == []
    assert problems == []
