"""What is told of a window's quality, and that what is told by chance stays rare."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from traffic import ORDINARY, exchange, rows

from jobs.quality import judge_scores, late_scores
from jobs.references import scores_of
from monitoring import exact
from monitoring.baseline import Count, QualityBaseline
from monitoring.measures import loops
from monitoring.quality import baseline_of, baseline_of_rows, by_segment, quality_signals
from monitoring.sequential import e_value
from monitoring.windows import Row
from regraft.config import Experiment
from regraft.errors import ConfigError
from regraft.monitor_sections import QualitySection
from regraft.records import CapturedExchange, Feedback, QualitySignal

SETTINGS = QualitySection()
LOOP = "Take the soil and the rake. " * 20
REFUSAL = "I'm sorry, but I cannot help with that."
FAULTS: dict[str, dict[str, object]] = {
    "error_rate": {"error": "timeout", "finish_reason": "error", "output": ""},
    "empty_rate": {"output": " \n"},
    "refusal_rate": {"output": REFUSAL},
    "truncated_rate": {"finish_reason": "length"},
    "repetition_rate": {"output": LOOP},
}


def window(count: int, seed: int, **changes: object) -> list[CapturedExchange]:
    """Ordinary answers; times vary from one to the next."""
    draw = np.random.default_rng(seed)
    return [
        exchange(
            row,
            **{"latency_ms": 400 * draw.lognormal(0, 0.3), "first_token_ms": 90 * draw.lognormal(0, 0.3)}
            | changes,
        )
        for row in rows(ORDINARY, count, seed, f"w{seed}-")
    ]


def worsened(exchanges: list[CapturedExchange], share: float, **changes: object) -> list[CapturedExchange]:
    bad = round(share * len(exchanges))
    return [e.model_copy(update=changes) if i < bad else e for i, e in enumerate(exchanges)]


def said(answers: list[CapturedExchange], scores: list[float], **more: str) -> list[Feedback]:
    return [
        Feedback(id=f"f{e.id}", created="2026-01-02T00:00:00.000000+00:00", answer_id=e.id, score=s, **more)
        for e, s in zip(answers, scores, strict=False)
    ]


def named(signals: tuple[QualitySignal, ...]) -> dict[str, QualitySignal]:
    found = {signal.name: signal for signal in signals}
    assert len(found) == len(signals)
    return found


@pytest.fixture(scope="module")
def baseline() -> QualityBaseline:
    return baseline_of(window(300, 0))


@pytest.mark.parametrize("name", FAULTS)
def test_one_window_of_a_collapse_is_enough_for_an_alarm(name, baseline):
    assert baseline.counts[name] == Count(bad=0, of=300)
    found = named(quality_signals(worsened(window(100, 1), 0.2, **FAULTS[name]), baseline, SETTINGS))
    signal = found[name]
    assert signal.worse
    assert signal.value == pytest.approx(0.2)
    assert signal.p_value < 1e-5
    # However many signals share the alarm's bound.
    assert e_value(signal.p_value) > 1000 * len(found)
    others = [s for s in found.values() if s.name != name]
    assert not any(s.worse for s in others)
    assert min(s.p_value for s in others) > 0.01


def test_an_ordinary_window_is_not_worse(baseline):
    signals = named(quality_signals(window(200, 2), baseline, SETTINGS))
    assert set(signals) == {*FAULTS, "latency_p95_ms", "first_token_p95_ms"}
    for signal in signals.values():
        assert not signal.worse
        assert signal.p_value > 0.05
        assert signal.low <= signal.value <= signal.high
    assert quality_signals([], baseline, SETTINGS) == ()


def test_a_significant_change_within_what_is_allowed_is_not_worse():
    before = QualityBaseline(counts={"refusal_rate": Count(bad=10, of=2000)})
    given = worsened(window(1000, 3), 0.03, output=REFUSAL)
    signal = named(quality_signals(given, before, SETTINGS))["refusal_rate"]
    assert signal.p_value < 1e-3
    assert not signal.worse


def test_slower_answers_show_and_quicker_ones_do_not(baseline):
    slow = [
        e.model_copy(update={"latency_ms": 3 * e.latency_ms, "first_token_ms": e.first_token_ms / 3})
        for e in window(100, 4)
    ]
    found = named(quality_signals(slow, baseline, SETTINGS))
    assert found["latency_p95_ms"].worse
    assert found["latency_p95_ms"].p_value < 1e-9
    assert not found["first_token_p95_ms"].worse
    assert found["first_token_p95_ms"].p_value == 1
    # What was given up on counts with the time it was waited for; what failed does not.
    left = worsened(window(100, 4), 0.2, finish_reason="aborted", latency_ms=60_000.0)
    failed = worsened(window(100, 4), 0.2, error="timeout", latency_ms=60_000.0)
    assert named(quality_signals(left, baseline, SETTINGS))["latency_p95_ms"].worse
    assert not named(quality_signals(failed, baseline, SETTINGS))["latency_p95_ms"].worse


def test_an_answer_nobody_waited_for_is_no_empty_one(baseline):
    given = worsened(window(100, 5), 0.5, finish_reason="aborted", output="")
    found = named(quality_signals(given, baseline, SETTINGS))
    assert found["empty_rate"].value == 0
    assert found["empty_rate"].count == 50
    assert found["error_rate"].count == 100


def test_turns_of_one_session_count_once(baseline):
    looping = [e.model_copy(update={"session": "one", "output": LOOP}) for e in window(60, 6)]
    found = named(quality_signals([*window(100, 7), *looping], baseline, SETTINGS))["repetition_rate"]
    assert found.value == pytest.approx(60 / 160)
    assert found.count == 160
    assert found.p_value > 0.2
    assert "in 101 sessions" in found.detail
    # Choices of one request are alike too.
    choices = [
        e.model_copy(update={"id": f"r-{i}", "choice": i, "output": LOOP}) for i, e in enumerate(looping)
    ]
    choices = [e.model_copy(update={"session": None}) for e in choices]
    assert named(quality_signals([*window(100, 7), *choices], baseline, SETTINGS))[
        "repetition_rate"
    ].p_value == pytest.approx(found.p_value)


def test_the_order_given_is_of_no_account(baseline):
    turns = [e.model_copy(update={"session": f"s{i % 50}"}) for i, e in enumerate(window(200, 7))]
    turns = worsened(turns, 0.4, output=LOOP)
    assert quality_signals(turns[::-1], baseline, SETTINGS) == quality_signals(turns, baseline, SETTINGS)
    assert baseline_of(turns[::-1]).counts == baseline_of(turns).counts
    assert baseline_of(turns).counts["repetition_rate"].rate == pytest.approx(0.4)


def test_too_few_are_shown_and_not_tested(baseline):
    few = worsened(window(29, 8), 1.0, output="")
    found = named(quality_signals(few, baseline, SETTINGS))
    assert all(signal.p_value is None for signal in found.values())
    assert found["empty_rate"].value == 1
    assert "not tested, below min_count (30)" in found["empty_rate"].detail
    many_turns = [
        e.model_copy(update={"session": e.id[-1]}) for e in worsened(window(300, 8), 1.0, output="")
    ]
    assert named(quality_signals(many_turns, baseline, SETTINGS))["empty_rate"].p_value is None


def test_without_a_count_the_allowed_share_is_the_bound():
    before = baseline_of_rows([Row(id=f"e{i}", prompt="q", output=f"answer {i}") for i in range(40)], [0.5])
    assert set(before.counts) == {"empty_rate", "refusal_rate", "repetition_rate"}
    assert before.scores == (0.5,)
    found = named(quality_signals(worsened(window(100, 9), 0.2, error="x"), before, SETTINGS))
    assert found["error_rate"].reference == SETTINGS.error_rate
    assert found["error_rate"].worse
    assert found["error_rate"].p_value == pytest.approx(exact.bound_p(20, 100, 0.02))
    assert found["error_rate"].p_value < 1e-5
    # Times have nothing to be held against.
    assert found["latency_p95_ms"].value > 0
    assert found["latency_p95_ms"].reference is found["latency_p95_ms"].p_value is None


def test_worse_feedback_shows_and_feedback_on_other_answers_does_not():
    first, now = window(200, 10), window(100, 11)
    before = baseline_of(first, said(first, [1.0] * 160 + [-1.0] * 40))
    assert len(before.feedback) == 200
    down = said(now, [-1.0] * 30 + [1.0] * 30)
    later = [
        f.model_copy(update={"id": f"g{f.id}", "created": "2026-01-03T00:00:00+00:00", "score": 1.0})
        for f in down[:1]
    ]
    elsewhere = said(window(100, 12), [-1.0] * 100)
    found = named(quality_signals(now, before, SETTINGS, feedback=[*later, *down, *elsewhere]))[
        "feedback_score"
    ]
    assert found.count == 60
    assert found.value == pytest.approx(2 / 60)
    assert found.reference == pytest.approx(0.6)
    assert found.worse
    assert found.p_value < 1e-3
    lower = named(quality_signals(now, before, SETTINGS, feedback=said(now, [1.0] * 77 + [-1.0] * 23)))
    assert lower["feedback_score"].value == pytest.approx(0.54)
    assert not lower["feedback_score"].worse
    same = named(quality_signals(now, before, SETTINGS, feedback=said(now, [1.0] * 48 + [-1.0] * 12)))
    assert same["feedback_score"].p_value > 0.3
    assert not same["feedback_score"].worse


def test_lower_scores_show_whatever_their_scale():
    draw = np.random.default_rng(1)
    now = window(60, 13)
    before = QualityBaseline(
        scores=tuple(draw.normal(60, 10, 200)), judge=tuple(draw.choice([0.5, 0.75, 1], 100))
    )
    late = dict(zip((e.id for e in now), draw.normal(45, 10, 60), strict=True))
    judged = dict(zip((e.id for e in now), draw.choice([0.5, 0.75, 1], 60), strict=True))
    found = named(quality_signals(now, before, SETTINGS, late_scores=late, judged=judged))
    assert found["reference_score"].worse
    assert found["reference_score"].p_value == 1 / (1 + exact.PERMUTATIONS)
    assert found["judge_score"].p_value > 0.05
    assert found["judge_score"].low < found["judge_score"].value < found["judge_score"].high
    nothing = named(quality_signals(now, QualityBaseline(), SETTINGS, judged=judged))["judge_score"]
    assert (nothing.p_value, nothing.reference, nothing.worse) == (None, None, False)


def test_a_segment_is_told_apart_and_pays_for_their_number(baseline):
    given = window(200, 14)
    segments = {e.id: "garden" if i < 60 else "music" for i, e in enumerate(given[:160])}
    given = worsened(given, 0.1, output=REFUSAL)
    found = by_segment(given, segments, baseline, SETTINGS)
    assert list(found) == ["music", "garden"]
    garden, music = named(found["garden"])["refusal_rate"], named(found["music"])["refusal_rate"]
    assert (garden.count, music.count) == (60, 100)
    assert garden.worse
    assert not music.worse
    assert garden.p_value == pytest.approx(2 * exact.rate_p(20, 60, 0, 300), abs=0)
    assert music.p_value == 1
    harder = baseline.model_copy(update={"counts": {"refusal_rate": Count(bad=30, of=90)}})
    own = by_segment(given, segments, baseline, SETTINGS, baselines={"garden": harder})
    assert not named(own["garden"])["refusal_rate"].worse


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "draw",
    [
        lambda g: exact.rate_p(int(g.binomial(150, 0.05)), 150, int(g.binomial(300, 0.05)), 300),
        lambda g: exact.bound_p(int(g.binomial(150, 0.05)), 150, 0.05),
        lambda g: exact.quantile_p(g.lognormal(size=100).tolist(), g.lognormal(size=200).tolist()),
        lambda g: exact.mean_p(g.beta(3, 2, 40).round(2).tolist(), g.beta(3, 2, 100).round(2).tolist()),
        lambda g: exact.mean_p(
            g.choice([-1, 1], 40, p=[0.2, 0.8]).tolist(), g.choice([-1, 1], 60, p=[0.2, 0.8]).tolist()
        ),
    ],
    ids=["rate", "bound", "quantile", "mean", "thumbs"],
)
def test_without_a_change_p_values_are_no_smaller_than_uniform_ones(
    draw: Callable[[np.random.Generator], float], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "PERMUTATIONS", 499)
    generator = np.random.default_rng(seed)
    count = 300
    found = np.array([draw(generator) for _ in range(count)])
    assert found.min() > 0
    assert found.max() <= 1
    for level in (0.01, 0.05, 0.2, 0.5):
        # Three standard errors of a uniform p-value's share.
        assert (found <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / count)


def test_many_checks_against_one_lucky_reference_raise_no_more_false_alarms_than_may_be():
    # None of 300 failed, where 1 % do: a reference that one time in twenty comes out so. Fisher's test alone
    # alarms in 40 of these 50 streams.
    generator = np.random.default_rng(2)
    alarmed = 0
    for _ in range(50):
        evidence, most = 0.0, 0.0
        for bad in generator.binomial(200, 0.01, 100):
            evidence = e_value(exact.rate_p(int(bad), 200, 0, 300)) * (evidence + 1)
            most = max(most, evidence)
        alarmed += most >= 1000
    assert alarmed <= 5, "5,000 checks at an average run length of 1,000"


def test_a_reference_of_a_few_cannot_be_what_makes_a_p_value_small():
    # That all 30 lie on one side of all 5 comes about once in so many orders.
    once = 1 / math.comb(35, 5)
    assert exact.rate_p(30, 30, 0, 5) == pytest.approx(once, rel=1e-6, abs=0)
    assert exact.quantile_p(list(range(10, 40)), list(range(5))) == pytest.approx(once, rel=1e-6, abs=0)
    assert exact.rate_p(30, 30, 5, 5) == exact.rate_p(0, 30, 0, 5) == 1
    assert exact.mean_p([1.0] * 5, [1.0] * 5) == 1


def test_intervals_cover_what_they_are_of():
    generator = np.random.default_rng(3)
    missed = np.zeros(3)
    for _ in range(200):
        low, high = exact.rate_interval(generator.binomial(80, 0.1) / 80, 80)
        missed[0] += not low <= 0.1 <= high
        low, high = exact.quantile_interval(generator.uniform(size=150).tolist())
        missed[1] += not low <= 0.95 <= (1 if high is None else high)
        low, high = exact.mean_interval(generator.uniform(size=50).tolist())
        missed[2] += not low <= 0.5 <= high
    assert (missed / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)).all()
    assert exact.rate_interval(0.2, 100) == pytest.approx((0.12666, 0.29184), abs=1e-5)  # Clopper-Pearson
    assert exact.quantile_interval([1.0] * 20)[1] is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LOOP, True),
        ("no " * 40, True),
        ("是的，请看说明书。" * 12, True),
        ("ha ha ha", False),
        ("", False),
        ("First drain the pond, then rake the lawn; the hedge can wait until the tulips are over.", False),
        ("https://example.org/a/very/long/path?with=parameters&and=more&so=on#and-a-fragment", False),
    ],
)
def test_a_loop_is_told_from_a_text(text, found):
    assert loops(text) is found


@pytest.fixture
def experiment(tmp_path) -> Callable[..., Experiment]:
    def make(metrics: list[dict[str, object]], maximise: str = "exact_match", samples: int = 0) -> Experiment:
        for name in ("t", "e"):
            (tmp_path / f"{name}.jsonl").touch()
        path = tmp_path / "regraft.yaml"
        content = {
            "name": "shop",
            "model": {"source": "m"},
            "data": {"train": "t.jsonl", "evaluation": "e.jsonl"},
            "sweep": {"methods": [{"name": "zero_shot"}]},
            "evaluate": {"metrics": metrics},
            "select": {"maximise": maximise},
            "monitor": {"quality": {"judge_samples": samples}},
        }
        path.write_text(json.dumps(content))
        return Experiment.load(path)

    return make


def test_answers_are_scored_on_references_that_came_later(experiment):
    right, wrong, corrected, both, failed, silent = given = window(6, 15, output="yes")
    given[4] = failed.model_copy(update={"error": "timeout"})
    time = "2026-01-02T00:00:00.000000+00:00"
    later = time.replace("-02T", "-03T")
    told = {
        right.id: {"reference": "yes"},
        wrong.id: {"reference": "no"},
        corrected.id: {"correction": "yes!"},
        both.id: {"reference": "yes", "correction": "no"},
        failed.id: {"reference": "yes"},
        silent.id: {"score": 1.0},
        "of another window": {"reference": "yes"},
    }
    feedback = [Feedback(id=f"f{i}", created=time, answer_id=i, **more) for i, more in told.items()]
    made = experiment([{"name": "exact_match"}])
    found = late_scores(made, given, feedback)
    assert set(found) == {right.id, wrong.id, corrected.id, both.id}
    assert (found[right.id], found[wrong.id], found[both.id]) == (1, 0, 1)
    assert corrected.id not in late_scores(made, given, feedback, corrections=False)
    changed = Feedback(id="a", created=later, answer_id=wrong.id, reference="yes")
    assert late_scores(made, given, [changed, *feedback])[wrong.id] == 1
    assert late_scores(made, given, []) == {}
    heard: list[str] = []
    unable = experiment([{"name": "calibration"}], "token_accuracy")
    assert late_scores(unable, given, feedback, heard.append) == {}
    assert "needs the model itself" in heard[0]


def test_traffic_whose_references_came_is_held_against_itself_and_not_the_evaluation(experiment):
    made = experiment([{"name": "exact_match"}])
    given = [
        e.model_copy(update={"session": f"s{i // 2}"}) for i, e in enumerate(window(80, 21, output="yes"))
    ]
    feedback = [
        f.model_copy(update={"reference": "yes" if i % 4 else "no"})
        for i, f in enumerate(said(given, [0.0] * 80))
    ]
    scores = scores_of(made, given, feedback, print)
    assert sorted(scores) == [0.5] * 20 + [1.0] * 20, "one of each session"
    assert scores_of(made, given[:50], feedback, print) == [], "25 sessions are fewer than min_count"
    before = baseline_of(given, scores=scores)
    (same,) = quality_signals(given, before, SETTINGS, late_scores=late_scores(made, given, feedback))[-1:]
    assert (same.name, same.worse) == ("reference_score", False)
    assert same.p_value > 0.4
    easier = baseline_of(given, scores=[1.0] * 40)
    assert quality_signals(given, easier, SETTINGS, late_scores=late_scores(made, given, feedback))[-1].worse


@pytest.fixture
def judge(tmp_path, monkeypatch) -> Iterator[dict[str, object]]:
    """A judge that finds answers with `fine` in them perfect, cannot say of others with `odd`, and counts."""
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0][
                "content"
            ]
            asked.append(question)
            verdict = (
                "no idea"
                if "odd" in question
                else json.dumps({"why": "so", "score": 5 if "fine" in question else 1})
            )
            body = json.dumps(
                {"choices": [{"message": {"content": verdict}, "finish_reason": "stop"}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield {
            "name": "judge",
            "url": f"http://127.0.0.1:{server.server_port}/v1",
            "model": "m",
            "asked": asked,
        }
        server.shutdown()


def test_the_judge_looks_at_so_many_sessions_and_its_failures_are_no_zeros(experiment, judge):
    asked = judge.pop("asked")
    metrics: list[dict[str, object]] = [{"name": "exact_match"}, judge]
    given = [
        e.model_copy(update={"output": "fine", "session": f"s{i // 2}"}) for i, e in enumerate(window(24, 16))
    ]
    found = judge_scores(experiment(metrics, samples=5), given)
    assert len(found) == len(asked) == 5
    assert set(found.values()) == {1.0}
    assert len({e.session for e in given if e.id in found}) == 5
    assert judge_scores(experiment(metrics, samples=5), given[::-1]) == found
    assert len(asked) == 5  # verdicts are kept
    poor = [
        e.model_copy(update={"output": "odd" if i % 3 == 0 else "poor", "error": "x" if i == 1 else None})
        for i, e in enumerate(window(12, 17))
    ]
    heard: list[str] = []
    found = judge_scores(experiment(metrics, samples=100), poor, heard.append)
    assert found == {e.id: 0.0 for i, e in enumerate(poor) if i % 3 and i != 1}
    assert len(heard) == 1
    assert heard[0].startswith("judge: 4 of 11 answers have no score")


def test_without_a_judge_nothing_is_judged_and_one_that_compares_is_an_error(experiment, judge):
    asked = judge.pop("asked")
    given = window(10, 18)
    assert judge_scores(experiment([{"name": "exact_match"}], samples=5), given) == {}
    assert judge_scores(experiment([{"name": "exact_match"}, judge], samples=0), given) == {}
    pairwise = experiment([{"name": "exact_match"}, judge | {"mode": "pairwise"}], samples=5)
    with pytest.raises(ConfigError, match=r"monitor\.quality\.judge_samples"):
        judge_scores(pairwise, given)
    assert asked == []
