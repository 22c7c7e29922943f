"""A month of a watched model in under an hour: what the monitor saw, decided, and what became of it.

    python benchmarks/month.py --data ../shared/data --quick --out month.md

The clock is accelerated, the components are real (`month_house.py`): SmolLM2-135M, swept once, answers each
day's questions (`month_traffic.py`); the monitor closes the day, decides and acts; a retraining is a Ray job
that is followed to its end before the next day, and the champion of the registry answers from then on.

Ordinary days; known topics in other shares; an attack of junk prompts, of which the reviewer lets most
through, so that a retraining learns junk; a storm of a new topic, which stays; a slow change of the shares;
days of slang; and a day on which serving spoils answers. `--quick` is thirteen days without slang
and slow change.

An alarm is false if every day that its evidence grew over was ordinary. Delays are in days from the first of
the scene to the alarm, the same day being 1. `classified` counts what each scene's alarms were taken for,
beside what was expected. `junk_promotions` counts promotions of what was trained with junk. Quality is
ROUGE-L on every registered evaluation set, of the first champion and of the last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

# Before torch counts the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
sys.path.insert(0, str(Path(__file__).parent))

from month_house import BEGIN, DAY, SESSIONS, House, Lived, house
from month_traffic import EXPECTED, month, quick, read

from jobs.check_drift import Watched
from jobs.console import say
from jobs.evaluate import evaluate_version
from jobs.evaluation_sets import with_registered
from regraft.data.dataset import load_dataset
from regraft.records import DriftReport, ModelVersion
from regraft.selection.resampling import paired_comparison

CALM = ("reference", "ordinary")
COLUMNS = (
    "day", "scene", "version", "rougeL", "status", "p", "effect", "evidence", "expected", "found",
    "decision", "why", "outcome",
)  # fmt: skip
#: Evidence below this is not worth a place in the ledger.
SHOWN = 5


def main() -> None:
    """Live the days, print the ledger and the figures."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    words.add_argument("--quick", action="store_true", help="thirteen days: about ten minutes on two cores")
    words.add_argument("--days", type=int, help="no more than so many of them")
    words.add_argument("--sessions", type=int, default=SESSIONS, help="questions a day")
    words.add_argument("--work", type=Path, help="folder for all that is kept; a temporary one if not given")
    words.add_argument("--out", type=Path, help="file for the ledger, as Markdown")
    given = words.parse_args()
    began = time.monotonic()
    days = (quick() if given.quick else month())[: given.days]
    folder = given.work or Path(tempfile.mkdtemp(prefix="regraft-month-"))
    say(f"{len(days)} days in {folder}")
    with house(folder.resolve(), read(given.data), given.sessions, say) as home:
        first = home.found()
        lived = []
        for day in days:
            lived.append(home.live(day))
            seen = "; ".join(map(brief, lived[-1].watched)) or "no window closed"
            words = f"day {day.number} ({day.scene}: {expected(lived[-1])} expected)"
            say(f"{words}, rougeL {lived[-1].rouge:.3f}: {seen}")
            if given.out is not None:  # each day: a month that breaks off has shown what it came to
                given.out.write_text(markdown(lived), encoding="utf-8")
        sys.stdout.write(f"\n{markdown(lived)}\n")
        found = figures(home, lived) | {"quality": quality(home, first)}
    found["seconds"] = round(time.monotonic() - began)
    sys.stdout.write(json.dumps(found) + "\n")


def figures(home: House, lived: Sequence[Lived]) -> dict[str, Any]:
    """What the days came to."""
    alarms = [
        (one.day, name, evidence.since or w.report.window_start, w.report)
        for one in lived
        for w in one.watched
        for name, evidence in w.report.evidence.items()
        if evidence.alarmed_by == w.report.id
    ]
    submitted, twice = home.runs_of(lived)
    ended = [(one, outcome) for one in lived for outcome in one.outcomes.values()]
    classified: dict[str, Counter[str]] = {one.day.scene: Counter() for one in lived}
    for one in lived:
        classified[one.day.scene].update(str(w.report.kind or w.report.status) for w in one.watched)
    scenes = {one.day.number: one.day.scene for one in lived}
    return {
        "days": len(lived),
        "false_alarms": len({r.id for _, _, since, r in alarms if _calm(since, r, scenes)}),
        "alarms": len({r.id for *_, r in alarms}),
        "alarmed": [f"day {day.number} ({day.scene}): {name}" for day, name, _, _ in alarms],
        "decisions": dict(Counter(w.decision.action for one in lived for w in one.watched)),
        "paged_days": [one.day.number for one in lived if any(w.decision.page for w in one.watched)],
        "reviewed": home.reviews,
        "retrains_submitted": submitted,
        "retrain_jobs_run_twice": twice,
        "promotions": sum(o.status == "promoted" for _, o in ended),
        "classified": {
            scene: {"expected": EXPECTED[scene], "found": dict(found)} for scene, found in classified.items()
        },
        **{f"{scene}_delay_days": delay(lived, scene) for scene in ("mix", "attack", "storm", "fault")},
        "junk_retrains": sum(one.junk > 0 for one, _ in ended),
        "junk_promotions": sum(one.junk > 0 and o.status == "promoted" for one, o in ended),
    }


def delay(lived: Sequence[Lived], scene: str) -> int | None:
    """Days from the first of a scene to a verdict of drift on one of its days; None where there is none."""
    own = [one for one in lived if one.day.scene == scene]
    return next(
        (n for n, one in enumerate(own, start=1) if any(w.report.status == "drift" for w in one.watched)),
        None,
    )


def quality(home: House, first: ModelVersion) -> dict[str, list[float]]:
    """Of each registered set: the objective of the first champion, of the last, and how far it moved.

    The last two figures are the ends of the 95 % interval of the paired difference.
    """
    from regraft.tuning.finals import quietly

    experiment, registry = home.experiment, home.connection.registry
    dataset = with_registered(experiment, load_dataset(experiment.name, experiment.data), registry, say)
    last = home.champion
    with quietly(experiment, home.connection.tracking_uri, say) as worker:
        before, _ = evaluate_version(experiment, dataset, first, worker)
        after = before if last == first else evaluate_version(experiment, dataset, last, worker)[0]
    found = {}
    for name in sorted({e.tags["set"] for e in after.examples}):
        both = paired_comparison(
            after, before, experiment.select.maximise, split=name, of_set=name,
            level=experiment.select.confidence, resamples=experiment.select.resamples,
        )  # fmt: skip
        say(f"{name}: {both.incumbent_mean:.3f} → {both.challenger_mean:.3f}, "
            f"difference {both.difference:+.3f} ({both.low:+.3f} to {both.high:+.3f})")  # fmt: skip
        found[name] = [round(x, 4) for x in (both.incumbent_mean, both.challenger_mean, both.low, both.high)]
    return found


def markdown(lived: Sequence[Lived]) -> str:
    """The ledger of the month."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for one in lived:
        date = f"{BEGIN + (one.day.number - 1) * DAY:%m-%d}"
        for watched in one.watched:
            cells = [date, one.day.scene, *_cells(one, watched)]
            lines.append("| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |")
        if not one.watched:
            lines.append(f"| {date} | {one.day.scene} |" + " – |" * (len(COLUMNS) - 2))
    return "\n".join(lines) + "\n"


def expected(one: Lived) -> str:
    """What a day's alarm should be taken for; a dash where there should be none."""
    return EXPECTED[one.day.scene] or "–"


def brief(watched: Watched) -> str:
    """A check in a few words."""
    report, decision = watched.report, watched.decision
    alarms = f", alarms {', '.join(report.alarms)}" if report.alarms else ""
    kind = f", found {report.kind}" if report.kind else ""
    return (
        f"{report.status} (p {_figure(report.p_value)}{alarms}{kind}) → {decision.action}: {decision.reason}"
    )


def _cells(one: Lived, watched: Watched) -> list[str]:
    report, decision = watched.report, watched.decision
    grown = (
        f"{name} {e.value:.3g}{', alarm' if e.alarmed_by else ''}"
        for name, e in sorted(report.evidence.items())
        if e.value >= SHOWN or e.alarmed_by
    )
    outcome = one.outcomes.get(decision.id)
    return [
        str(report.model_version), f"{one.rouge:.3f}", report.status, _figure(report.p_value),
        _figure(report.effect), "; ".join(grown) or "–", expected(one), report.kind or "–",
        decision.action + (", page" if decision.page else ""), decision.reason,
        f"{outcome.status}: {outcome.detail}" if outcome else "–",
    ]  # fmt: skip


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _calm(since: str, report: DriftReport, scenes: dict[int, str]) -> bool:
    """Whether every day from the begin of an alarm's evidence to its window's end was ordinary."""
    begun, ended = (datetime.fromisoformat(t) for t in (since, report.window_end))
    numbers = range((begun - BEGIN) // DAY + 1, (ended - BEGIN - DAY / 1000) // DAY + 2)
    return all(scenes.get(n, "ordinary") in CALM for n in numbers)


if __name__ == "__main__":
    main()
