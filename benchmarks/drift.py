"""How often the calibrated drift detector is wrong, and how much it finds, beside Evidently's default preset.

    python benchmarks/drift.py --data ../shared/data --quick

Questions on real texts (see `drift_traffic.py`), with a line of progress for each job and one JSON
object at the end:

- `false_alarm_rate_30_checks`: streams of 30 windows without drift, 100 sessions of up to three turns each,
  against one reference; the share of streams in which the sequential alarm (Shiryaev-Roberts, `monitor.arl`
  at its default) is raised. Evidently's figure is the share in which its verdict is "drift" at any of the 30.
- `power_new_topics_20pct_n100`, `power_new_topics_10pct_n200`: single windows of one-turn sessions, of which
  a share is about new topics; found are those with p <= 0.05 and a novelty lift of at least 3 points above
  chance, beside the p-value alone (`p_only`) and a gate at 5 points (`gate_5`). `single_false_alarm_rate` is
  the same rule on windows without drift. `..._interval` is Student's at 95 % over references, which are drawn
  from the same texts. These windows get 999 labellings, which tell whether p <= 0.05. How novel texts are
  told was chosen on other domains of CLINC150 than those that are new here.
- `alarm_delay_windows_median`: windows with 20 % of sessions on new topics until the sequential alarm, after
  three ordinary ones; a stream that raises none within twelve counts as infinite (null).

- `quality_..._found_in_one_window`: a fifth, or two fifths, of the answers go wrong, held against 1,500
  exchanges, as many as are frozen by default, or 300 (`drift_quality.py`).
- `report_100k_vs_evidently`: what a report over 100,000 exchanges costs (`drift_report.py`).
- `seconds`, and `cpu_seconds` of all processes together, which two cores of their own would do in half.

And, unless quick, how often an alarm is explained rightly (`drift_kinds.py`).

`evidently_...` is the verdict of Evidently's DataDriftPreset with its defaults on the descriptors of the same
texts and the same reference, if quick for the first of the references alone; `evidently_1000_...`, unless
quick, with the reference cut to 1,000 rows, where it takes other tests.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# One thread a process, before anything counts the cores: the jobs share them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DO_NOT_TRACK"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import drift_kinds
import drift_quality
import drift_report
import numpy as np
import pandas as pd
from drift_traffic import SOURCES, Texts, flat, read, sessions

from monitoring.descriptors import describe
from monitoring.detectors import Calibrated
from monitoring.sequential import step
from monitoring.windows import Row
from regraft.config import MonitorSection
from regraft.errors import DataError
from regraft.records import Evidence

CHECKS = 30
REFERENCE = 1500
WINDOW = 100
ALPHA, LIFT = 0.05, 0.03
ARL = MonitorSection().arl
ORDINARY_FIRST, MOST_DELAY = 3, 12
POWER = {"20pct_n100": (100, 0.2), "10pct_n200": (200, 0.1)}
Found = dict[str, Any]


def main() -> None:
    """Embed the texts, run the jobs, print the figures."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    words.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "regraft-drift-vectors",
        help="folder that keeps embeddings between runs",
    )
    words.add_argument("--quick", action="store_true", help="few streams: at most five minutes on two cores")
    words.add_argument("--streams", type=int, help="streams without drift, and of each source with drift")
    words.add_argument("--references", type=int, help="references that single windows are compared with")
    words.add_argument("--kinds", type=int, help="streams of each kind of drift to explain; none if quick")
    words.add_argument("--workers", type=int, default=2)
    settings = words.parse_args()
    streams = settings.streams or (8 if settings.quick else 60)
    drifting = max(1, streams // 4)
    references = settings.references or (40 if settings.quick else 80)
    twins = min(references, 8 if settings.quick else 30)
    if min(streams, references, settings.workers) < 1:
        words.error("--streams, --references and --workers are at least 1")
    kinds = settings.kinds if settings.kinds is not None else 0 if settings.quick else 20
    began = time.monotonic()
    # A stream takes 4,500 sessions of two turns on average.
    try:
        texts = read(
            settings.data, ordinary=9600 if settings.quick else 18_000, new=400 if settings.quick else 4000
        )
    except DataError as error:
        sys.exit(str(error))
    detector = Calibrated(cache=settings.cache)
    wanted = texts.all + (drift_kinds.texts(settings.data) if kinds else [])
    jobs: list[Callable[[], Found]] = [
        partial(calm, texts, detector, seed, small=not settings.quick) for seed in range(streams)
    ]
    jobs += [partial(storm, texts, detector, seed, s) for seed in range(drifting) for s in SOURCES]
    jobs += [
        partial(single, texts, detector, seed, twin=seed < twins, small=not settings.quick)
        for seed in range(references)
    ]
    jobs += [
        partial(drift_kinds.explained, settings.data, detector, seed, kind)
        for seed in range(kinds)
        for kind in drift_kinds.KINDS
    ]
    jobs += [
        partial(drift_quality.collapse, settings.data, seed, kind, wrong, reference)
        for reference in drift_quality.REFERENCES
        for kind, wrong in drift_quality.SETTINGS
        for seed in range(streams if kind == "none" else 5 * streams)
    ]
    with ProcessPoolExecutor(settings.workers, mp_context=get_context("spawn")) as pool:
        parts = [wanted[i :: settings.workers] for i in range(settings.workers)]
        for embedded in pool.map(partial(embed, detector), parts):
            say(f"{embedded} texts embedded after {time.monotonic() - began:.0f} s")
        found = []
        for result in pool.map(call, jobs):
            found.append(result)
            say(json.dumps({k: v for k, v in result.items() if k != "p_values"}))
    report = drift_report.report_100k(settings.data, settings.quick)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = {
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in used)),
    }
    sys.stdout.write(json.dumps(figures(found) | report | spent) + "\n")


def call(job: Callable[[], Found]) -> Found:
    """Run a job; a function of the module, so that it reaches another process."""
    return job()


def embed(detector: Calibrated, texts: list[str]) -> int:
    """Embed texts into the detector's cache."""
    return len(detector.embed(texts))


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def calm(texts: Texts, detector: Calibrated, seed: int, *, small: bool) -> Found:
    """A stream of 30 windows without drift; `small` asks Evidently with the cut reference too."""
    reference, windows = ordinary(texts, seed, CHECKS)
    evidence, highest = Evidence(), 0.0
    found: Found = {"job": "calm", "evidently": False, "p_values": []}
    found |= {"evidently_1000": False} if small else {}
    for check, window in enumerate(windows):
        detection = detector.detect(reference, window)
        evidence = step(evidence, detection.counted, report_id=str(check), begun="", arl=ARL)
        found["p_values"].append(detection.p_value)
        # Its verdicts do not add up: after the first "drift" the stream has its figure.
        found["evidently"] = found["evidently"] or evidently(reference, window)
        if small:
            found["evidently_1000"] = found["evidently_1000"] or evidently(reference[:1000], window)
        highest = max(highest, evidence.value)
    return found | {"alarm": evidence.alarmed_by is not None, "highest": highest}


def storm(texts: Texts, detector: Calibrated, seed: int, source: str) -> Found:
    """A stream that drifts after three windows: how many more it takes to see it."""
    reference, windows = ordinary(texts, 10_000 + seed, ORDINARY_FIRST + MOST_DELAY)
    draw = random.Random(f"storm {seed}")
    new = sessions(texts.new[source], 3, "n", draw)
    evidence = Evidence()
    delay: dict[str, float] = {"calibrated": math.inf, "evidently": math.inf}
    early = dict.fromkeys(delay, False)
    for check, window in enumerate(windows):
        drifted = check >= ORDINARY_FIRST
        rows = mixed(window, new, WINDOW // 5, draw) if drifted else window
        detection = detector.detect(reference, rows)
        evidence = step(evidence, detection.counted, report_id=str(check), begun="", arl=ARL)
        alarmed = evidence.alarmed_by is not None
        seen = early["evidently"] or delay["evidently"] < math.inf
        for name, alarm in (("calibrated", alarmed), ("evidently", not seen and evidently(reference, rows))):
            if alarm and not drifted:
                early[name] = True
            elif alarm and delay[name] == math.inf:
                delay[name] = check - ORDINARY_FIRST + 1
        if alarmed and (seen or early["evidently"] or delay["evidently"] < math.inf):
            break
    # What alarmed before anything changed has not found the change.
    return {"job": "storm", "source": source} | {n: None if early[n] else d for n, d in delay.items()}


def single(texts: Texts, detector: Calibrated, seed: int, *, twin: bool, small: bool) -> Found:
    """Single windows of every source and power setting, and as many without drift, against one reference.

    `twin` asks Evidently too, `small` also with the cut reference.
    """
    detector = detector.model_copy(update={"most_permutations": detector.permutations})
    draw = random.Random(f"single {seed}")
    known = sessions(texts.ordinary, 1, "o", draw)
    reference, known = flat(known[:REFERENCE]), known[REFERENCE:]
    found: Found = {"job": "single"}
    for name, (count, share) in POWER.items():
        for source in (None, *SOURCES):
            rows = flat(known[:count])
            known = known[count:]
            if source:
                new = sessions(texts.new[source], 1, "n", draw)
                rows = mixed(rows, new, round(count * share), draw)
            detection = detector.detect(reference, rows)
            found[f"{name} {source or 'none'}"] = {
                "calibrated": detection.p_value <= ALPHA and detection.effect >= LIFT,
                "p_only": detection.p_value <= ALPHA,
                "gate_5": detection.p_value <= ALPHA and detection.effect >= 0.05,
            }
            if twin:
                found[f"{name} {source or 'none'}"]["evidently"] = evidently(reference, rows)
            if twin and small:
                found[f"{name} {source or 'none'}"]["evidently_1000"] = evidently(reference[:1000], rows)
    return found


def ordinary(texts: Texts, seed: int, windows: int) -> tuple[list[Row], list[list[Row]]]:
    """A reference and windows without drift, no session twice."""
    made = sessions(texts.ordinary, 3, "o", random.Random(seed))
    if len(made) < REFERENCE + windows * WINDOW:
        raise ValueError(f"{len(made)} sessions are too few for {windows} windows")
    rest = made[REFERENCE:]
    return flat(made[:REFERENCE]), [flat(rest[i * WINDOW : (i + 1) * WINDOW]) for i in range(windows)]


def mixed(window: Sequence[Row], new: list[list[Row]], count: int, draw: random.Random) -> list[Row]:
    """A window with `count` of its sessions replaced by new ones."""
    names = list(dict.fromkeys(row.session for row in window))
    kept = set(draw.sample(names, len(names) - count))
    return [*(row for row in window if row.session in kept), *flat(draw.sample(new, count))]


def evidently(reference: Sequence[Row], window: Sequence[Row]) -> bool:
    """The preset's default verdict, whether half of the descriptors drift, without drawing its pictures."""
    from evidently import Report
    from evidently.metrics import DriftedColumnsCount

    from monitoring.detectors.evidently_columns import dataset

    before, now = described(tuple(row.output for row in reference)), describe([row.output for row in window])
    # A column that never varies breaks some of its tests.
    columns = [c for c in before if before[c].nunique() > 1]
    with np.errstate(invalid="ignore"):  # correlations of columns that are constant on one side
        metric = DriftedColumnsCount(columns=columns)
        run = Report([metric]).run(dataset(now[columns]), dataset(before[columns]))
    verdict = run.dict()["metrics"][0]
    if not verdict["metric_name"].startswith("DriftedColumnsCount"):
        raise ValueError(f"Evidently's first metric is {verdict['metric_name']}")
    return bool(verdict["value"]["share"] >= verdict["config"]["drift_share"])


@cache
def described(texts: tuple[str, ...]) -> pd.DataFrame:
    """Descriptors of a reference, made once a process."""
    return describe(list(texts))


def figures(found: list[Found]) -> Found:
    """Shares over all jobs, with their counts."""
    calms = [f for f in found if f["job"] == "calm"]
    storms = [f for f in found if f["job"] == "storm"]
    singles = [f for f in found if f["job"] == "single"]
    p_values = [p for f in calms for p in f["p_values"]]
    made: Found = {
        "streams": len(calms),
        "false_alarm_rate_30_checks": share([f["alarm"] for f in calms]),
        "highest_evidence_of_streams": sorted((round(f["highest"], 1) for f in calms), reverse=True)[:5],
        "evidently_false_alarm_rate_30_checks": share([f["evidently"] for f in calms]),
        "p_below_0.05_in_any_of_30_checks": share([min(f["p_values"]) <= ALPHA for f in calms]),
        "p_below_0.05_rate": share([p <= ALPHA for p in p_values]),
        "windows_each_power": len(singles) * len(SOURCES),
        "references": len(singles),
    }
    if small := [f["evidently_1000"] for f in calms if "evidently_1000" in f]:
        made["evidently_1000_false_alarm_rate_30_checks"] = share(small)
    for rule in ("calibrated", "p_only", "gate_5", "evidently", "evidently_1000"):
        prefix = "" if rule == "calibrated" else f"{rule}_"
        asked = [f for f in singles if rule in f[f"{next(iter(POWER))} none"]]
        if not asked:
            continue
        for name in POWER:
            by_source = {s: share([f[f"{name} {s}"][rule] for f in asked]) for s in SOURCES}
            made[f"{prefix}power_new_topics_{name}"] = round(statistics.mean(by_source.values()), 4)
            made[f"{prefix}power_new_topics_{name}_interval"] = interval(
                [statistics.mean(f[f"{name} {s}"][rule] for s in SOURCES) for f in asked]
            )
            made[f"{prefix}power_new_topics_{name}_by_source"] = by_source
        ordinary_windows = [f[f"{name} none"][rule] for f in asked for name in POWER]
        made[f"{prefix}single_false_alarm_rate"] = share(ordinary_windows)
    made |= drift_quality.tabled([f for f in found if f["job"] == "quality"])
    if explained := [f for f in found if f["job"] == "kind"]:
        made["explained"] = drift_kinds.tabled(explained)
    made["drift_streams"] = len(storms)
    for rule in ("calibrated", "evidently"):
        prefix = "" if rule == "calibrated" else f"{rule}_"
        told = [f[rule] for f in storms if f[rule] is not None]
        middle = statistics.median(told) if told else math.inf
        made[f"{prefix}alarm_delay_windows_median"] = middle if middle < math.inf else None
        made[f"{prefix}alarm_found_rate"] = share(
            [f[rule] is not None and f[rule] < math.inf for f in storms]
        )
        made[f"{prefix}alarm_before_drift_rate"] = share([f[rule] is None for f in storms])
    return made


def interval(shares: list[float]) -> list[float] | None:
    """Student's interval at 95 % of a mean over references; None for a single one."""
    from scipy.stats import t

    if len(shares) < 2:
        return None
    half = float(t.ppf(0.975, len(shares) - 1)) * statistics.stdev(shares) / math.sqrt(len(shares))
    middle = statistics.mean(shares)
    return [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)]


def share(given: list[bool]) -> float:
    return round(sum(given) / len(given), 4)


if __name__ == "__main__":
    main()
