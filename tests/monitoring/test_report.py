from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from made import HOSTILE, QUALITY, decision, report, stream, told_by_users
from traffic import ORDINARY, rows

from jobs import console
from monitoring.advice import to_do
from monitoring.detectors import EvidentlyColumns
from monitoring.detectors.base import NovelExchange, Term
from monitoring.markup import safe
from monitoring.report import write_report
from monitoring.sequential import DRIFT
from monitoring.timeline import COLUMNS, history_table
from monitoring.windows import Row
from regraft.records import DriftReport

DRAWN = re.compile(r"<circle |<rect ")


def page(tmp_path, about: DriftReport, **more) -> str:
    path = tmp_path / "deep" / "drift.html"
    write_report(path, about, None, (), (), **more)
    assert [file.name for file in path.parent.iterdir()] == ["drift.html"]
    return path.read_text(encoding="utf-8")


class _Words(HTMLParser):
    """What a reader sees of a page, and the tags that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._hidden = tag in {"style", "script", "title"}

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_decision_stands_before_what_it_rests_on(tmp_path):
    checks = stream([0.5, 0.4, *[1e-4] * 3], kind="new_content", quality=QUALITY, attribution=told_by_users())
    made = decision(checks[-1], waiting=("12 reviewed, 20 needed",), page=True)
    seen = str(_Words(page(tmp_path, checks[-1], decision=made, history=checks[:-1])))
    order = [
        "Drift: users ask about new things",
        "A person should look now.",
        "nothing is trained yet. Because.",
        "Still waited for: 12 reviewed, 20 needed.",
        "Facts",
        "The evidence over time",
        "Topics, before and now",
        "signal verdict this window reference 95 % interval count evidence compared",
        "refusal rate worse in this window 20.0% 2.0% 16.0% to 24.0%",
        "feedback score too few to test",
    ]
    places = [seen.find(words) for words in order]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("kind", "action", "automatic", "words"),
    [
        ("behaviour", "roll_back", False, "Nothing until a person says so. Proposed: go back"),
        ("behaviour", "roll_back", True, "The endpoint goes back to the former champion."),
        ("new_content", "retrain", True, "A challenger is trained as job j-1, and put before the gate."),
        ("prompt_mix", "watch", True, "The next windows are watched."),
        ("quality", "nothing", True, "Nothing."),
    ],
)
def test_each_decision_says_what_is_done_and_what_to_do(tmp_path, kind, action, automatic, words):
    about = stream([1e-4] * 4, kind=kind)[-1]
    made = decision(about, action, automatic=automatic, job_id="j-1" if action == "retrain" else None)
    seen = str(_Words(page(tmp_path, about, decision=made)))
    assert f"What is being done {words}" in seen
    steps = to_do(about, made)
    assert all(step in seen for step in steps)
    assert any("regraft rollback" in step for step in steps) == (action == "roll_back" and not automatic)


def test_what_users_wrote_is_shown_as_words_and_cut(tmp_path):
    about = stream(
        [1e-4] * 4,
        kind="new_content",
        attribution=told_by_users(),
        drivers=(HOSTILE,) * 500,
        summary=f"{HOSTILE} {'long ' * 100_000}",
        model=HOSTILE,
    )[-1]
    text = page(tmp_path, about, decision=decision(about, reason=HOSTILE))
    seen = _Words(text)
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "asked ⟨U+202E⟩</script><script>window.hacked=1</script>" in str(seen)
    assert "(500,000 characters)" in str(seen)
    assert len(text) < 100_000
    assert str(seen).count("asked ⟨") == 3


def test_right_to_left_letters_stay_and_only_what_is_unseen_is_named():
    assert safe("שלום \u200f?") == "שלום \u200f?"
    assert safe("a\x00b\u2066c") == "a⟨U+0000⟩b⟨U+2066⟩c"
    assert safe("<'\"&>") == "&lt;&#x27;&quot;&amp;&gt;"
    assert safe("a" * 700, 600).endswith("… (700 characters)")


def test_the_evidence_is_drawn_check_by_check_against_the_same_reference(tmp_path):
    checks = stream([0.5, 0.4, 0.3, 1e-4, 1e-4, 1e-4])
    others = [report(20), checks[0].model_copy(update={"id": "x", "reference_id": "other"})]
    text = page(tmp_path, checks[-1], history=[*checks[::-1], *others])
    # Evidence, p-value and rows of six checks: neither twice, nor the later one, nor the other reference's.
    assert len(DRAWN.findall(text)) == 18
    assert text.count("<svg ") == 3
    assert ">alarm</text>" in text
    alone = page(tmp_path, checks[0])
    assert len(DRAWN.findall(alone)) == 3
    many = stream([0.5] * 150)
    assert len(DRAWN.findall(page(tmp_path, many[-1], history=many))) == 300


def test_extreme_evidence_is_drawn_within_the_picture(tmp_path):
    checks = stream([1.0, 1e-12, 1e-12, 1.0])
    text = page(tmp_path, checks[-1], history=checks)
    heights = [float(y) for y in re.findall(r'cy="([^"]+)"', text)]
    assert heights
    assert all(0 <= y <= 230 for y in heights)


def test_a_window_without_a_verdict_or_a_place_in_time_has_a_page_too(tmp_path):
    nothing = report(
        0, None, 0.5, status="insufficient", p_value=None, effect=None, evidence={}, rows=0, window_end="",
        window_start="", arl=None,
    )  # fmt: skip
    seen = str(_Words(page(tmp_path, nothing)))
    assert "Insufficient: too few exchanges to tell" in seen
    assert "Nothing: this was only looked at" in seen


def test_a_browser_shows_it_whole_on_narrow_and_wide_screens_and_loads_nothing(tmp_path, browser):
    window = [
        Row(id=f"{r.id}{HOSTILE}", prompt=f"{r.prompt} {HOSTILE}", output=r.output)
        for r in rows(ORDINARY, 60, 3)
    ]
    reference = rows(ORDINARY, 60, 2)
    detection = EvidentlyColumns().detect(reference, window)
    detection = detection.model_copy(
        update={
            "novel": (NovelExchange(row=window[0], score=1.0),),
            "terms": (Term(text=HOSTILE, reference_share=0, window_share=1),),
        }
    )
    checks = stream([0.5, *[1e-4] * 4], kind="new_content", attribution=told_by_users(), quality=QUALITY)
    path = tmp_path / "drift.html"
    write_report(
        path, checks[-1], detection, reference, window, decision=decision(checks[-1]), history=checks
    )
    requests, problems = [], []
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    view.on("request", lambda r: requests.append(r.url))
    view.on("pageerror", lambda e: problems.append(str(e)))
    view.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    view.goto(path.as_uri())
    view.get_by_text("Calibrated drift test (this one decides)").first.wait_for(timeout=30_000)
    assert view.locator("#regraft-decision h1").inner_text() == "Drift: users ask about new things"
    for width in (1280, 390):
        view.set_viewport_size({"width": width, "height": 900})
        assert view.evaluate("document.querySelector('.regraft').scrollWidth") <= width
    assert view.evaluate("window.hacked") is None
    assert [url for url in requests if url.startswith(("http:", "https:"))] == []
    assert problems == []


def test_a_terminal_shows_checks_quality_and_topics_as_plain_words(capsys):
    checks = stream([0.5, *[1e-4] * 3], kind="new_content", quality=QUALITY, attribution=told_by_users())
    made = decision(checks[-1])
    console.show_drift([(f"check {c.id}", c) for c in checks], {checks[-1].id: made})
    console.show_details(checks[-1])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "check r3" in shown
    assert "new content" in shown
    assert "collect" in shown
    assert "20.0%" in shown
    assert "new: rocket" in shown
    assert "\x1b" not in shown.replace("\x1b[", "")
    assert "\x1b[31m" not in shown
    assert "\u202e" not in shown
    console.show_details(report())
    assert capsys.readouterr().out == ""


def test_the_history_is_a_table_with_what_was_decided():
    checks = stream([0.5, *[1e-4] * 3], kind="new_content")
    table = history_table(checks, {checks[-1].id: decision(checks[-1])})
    first = checks[0].evidence[DRIFT].value
    assert all(len(row) == len(COLUMNS) for row in table)
    assert table[0] == (
        "2026-01-01 01:00",
        "200",
        "stable",
        "0.5000",
        "+0.21",
        f"{first:.3g} of 1,000",
        "–",
        "–",
        "–",
    )
    assert table[-1][6:] == ("drift", "new content", "collect")
