"""A report of bare Evidently over captured exchanges, and the clock that ours is timed by too.

Nothing here knows how the exchanges were made; `drift_report.py` says what is compared.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DO_NOT_TRACK"] = "1"

from monitoring.windows import Reference, load
from regraft.data.captures import CaptureStore

Found = dict[str, Any]


def evidently(folder: Path) -> Found:
    """What a user of Evidently does: descriptors of all rows, the preset, the page."""
    import numpy as np
    import pandas  # noqa: F401 - as much is imported before the clock starts
    from evidently import Report
    from evidently.presets import DataDriftPreset

    from monitoring.descriptors import describe_sides
    from monitoring.detectors.evidently_columns import dataset

    reference, store = opened(folder)
    clock = Clock()
    table = store.table(model="support", version=1, columns=["prompt_text", "output"])
    clock.lap("reading")
    before = describe_sides([r.prompt for r in reference.rows], [r.output for r in reference.rows])
    now = describe_sides(table["prompt_text"].tolist(), table["output"].tolist())
    # A column that never varies breaks some of its tests.
    columns = [c for c in before if before[c].nunique() > 1]
    clock.lap("descriptors")
    with np.errstate(invalid="ignore"):
        run = Report([DataDriftPreset(columns=columns)]).run(dataset(now[columns]), dataset(before[columns]))
    clock.lap("preset")
    page = folder / "evidently.html"
    run.save_html(str(page))
    clock.lap("page")
    return clock.found(page) | {"exchanges": len(table), "columns": len(columns)}


def evidently_own(folder: Path) -> Found:
    """As `evidently`, with descriptors of Evidently's own, seven of each text: what it has of ours."""
    from evidently import DataDefinition, Dataset, Report
    from evidently import descriptors as own
    from evidently.presets import DataDriftPreset
    from pandas import DataFrame

    reference, store = opened(folder)
    clock = Clock()
    table = store.table(model="support", version=1, columns=["prompt_text", "output"])
    clock.lap("reading")
    kinds: dict[str, Callable[..., Any]] = {
        "length": own.TextLength,
        "words": own.WordCount,
        "sentences": own.SentenceCount,
        "non_letters": own.NonLetterCharacterPercentage,
        "digits": partial(own.RegExp, reg_exp=r".*\d"),
        "refusal": partial(own.RegExp, reg_exp=r"(?i).*\bi(?:'m| am) (?:sorry|unable|not able)"),
        "question": partial(own.Contains, items=["?"]),
    }
    rows = DataFrame({"prompt_text": [r.prompt for r in reference.rows],
                      "output": [r.output for r in reference.rows]})  # fmt: skip
    before, now = (
        Dataset.from_pandas(
            side,
            DataDefinition(text_columns=["prompt_text", "output"]),
            descriptors=[
                kind(text, alias=f"{text} {name}")
                for text in ("prompt_text", "output")
                for name, kind in kinds.items()
            ],
        )
        for side in (rows, table)
    )
    frame = before.as_dataframe().drop(columns=["prompt_text", "output"])
    columns = [c for c in frame if frame[c].nunique() > 1]
    clock.lap("descriptors")
    run = Report([DataDriftPreset(columns=columns)]).run(now, before)
    clock.lap("preset")
    page = folder / "evidently_own.html"
    run.save_html(str(page))
    clock.lap("page")
    return clock.found(page) | {"exchanges": len(table), "columns": len(columns)}


def opened(folder: Path) -> tuple[Reference, CaptureStore]:
    """The reference and the captures of a folder that `drift_report.made` made."""
    return load(folder), CaptureStore(folder / "spool", archive=str(folder / "archive"))


class Clock:
    """CPU and wall time since it was made, and CPU time by stage."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._last, self._laps = self._cpu, dict[str, float]()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.process_time()
        self._laps[stage] = round(now - self._last, 2)
        self._last = now

    def found(self, page: Path) -> Found:
        """What was measured, once a page was written."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "cpu_seconds": round(self._last - self._cpu, 2),
            "wall_seconds": round(time.perf_counter() - self._wall, 2),
            "cpu_seconds_by_stage": self._laps,
            "memory_peak_mib": round(peak / 1024),
            "page_mib": round(page.stat().st_size / 2**20, 1),
        }
