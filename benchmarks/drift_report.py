"""What a drift report costs beside bare Evidently, and whether its memory depends on the traffic.

    python benchmarks/drift_report.py --data ../shared/data --quick

A line of progress for each process, and one JSON object at the end:

- `report_100k_vs_evidently`: CPU time of our whole report over 100,000 captured exchanges (closing windows,
  streaming and sampling, quality, the calibrated test and what explains it, the page) divided by that of bare
  Evidently over the same exchanges: reading their texts as a table, descriptors of every prompt and answer,
  its DataDriftPreset with its defaults and the page. The descriptors are ours on both sides. Both are held
  against the same 1,500 exchanges. The larger figure of two kinds of texts: `requests` (CLINC150, 10 tokens;
  the same text as prompt and answer) and `support` (Bitext's requests and their answers of 150 tokens, which
  take ten times as long to embed). If quick, requests alone.
- `report_100k_vs_evidently_own_descriptors`: the same with seven descriptors of Evidently's own in place of
  ours, as its users have them. They take longer than our ten. Not if quick.
- `sampled_10m`: the same report over 1 and 10 million exchanges, and the peak of resident memory of each
  (`--only-millions --millions 1 10`; 10 million take 400 MB of the temporary folder).

The exchanges lie in an archive of Parquet files, each text as often as it takes, with ids and sessions of
their own, two exchanges a session. Each report is made by a process of its own with one thread, so that CPU
time and wall clock agree; neither imports nor loading the embedding model are counted. The vectors of the
reference are kept from former checks, as they are in use; the window's are not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ["DO_NOT_TRACK"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from drift_evidently import Clock, Found, evidently, evidently_own, opened
from drift_traffic import read

from monitoring.windows import Row, freeze

START = datetime(2026, 3, 4, tzinfo=UTC)
DAY = timedelta(days=1)
REFERENCE = 1500
_FILE = 65_000  # exchanges of a spool file of 64 MB
_GROUP = 5000
Pairs = list[tuple[str, str]]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    words.add_argument("--quick", action="store_true", help="one kind of texts, and no millions")
    words.add_argument(
        "--millions", type=float, nargs="*", default=[1, 10], help="sizes of `sampled_10m`; none: not asked"
    )
    words.add_argument("--only-millions", action="store_true", help="not the comparison with Evidently")
    words.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    words.add_argument("--by", choices=["ours", "evidently", "evidently_own"], help=argparse.SUPPRESS)
    settings = words.parse_args()
    if settings.made is not None:
        make = {"ours": ours, "evidently": evidently, "evidently_own": evidently_own}[settings.by]
        found = make(settings.made)
    else:
        found = {} if settings.only_millions else report_100k(settings.data, settings.quick)
        counts = [] if settings.quick else [round(millions * 1e6) for millions in settings.millions]
        if counts:
            found["sampled_10m"] = sampled_10m(settings.data, counts)
    sys.stdout.write(json.dumps(found) + "\n")


def report_100k(data: Path, quick: bool, exchanges: int = 100_000) -> Found:
    """Our report and Evidently's over the same exchanges.

    Raises:
        DataError: If a data set is missing.
    """
    found: Found = {"report_exchanges": exchanges}
    others = {"evidently": "report_100k_vs_evidently"}
    if not quick:
        others["evidently_own"] = "report_100k_vs_evidently_own_descriptors"
    for kind in ("requests",) if quick else ("requests", "support"):
        with made(pairs(data, kind), exchanges) as folder:
            found[f"report_of_{kind}"] = {by: child(folder, by, data) for by in ("ours", *others)}
    for other, name in others.items():
        ratios = {
            key.removeprefix("report_of_"): round(each["ours"]["cpu_seconds"] / each[other]["cpu_seconds"], 3)
            for key, each in found.items()
            if key.startswith("report_of_")
        }
        found |= {name: max(ratios.values()), f"{name}_by_texts": ratios}
    return found


def sampled_10m(data: Path, counts: Sequence[int] = (1_000_000, 10_000_000)) -> dict[str, Found]:
    """Reports over ever more exchanges, with the peak of memory.

    Raises:
        DataError: If a data set is missing.
    """
    found = {}
    for count in counts:
        with made(pairs(data, "requests"), count) as folder:
            found[str(count)] = child(folder, "ours", data)
    return found


def pairs(data: Path, kind: str) -> Pairs:
    """Distinct prompts with their answers, in a random order that is always the same."""
    if kind == "requests":
        texts = [text for text, _ in read(data, ordinary=18_000, new=1).ordinary]
        return [(text, text) for text in texts]
    import drift_kinds

    known = {pair for some in drift_kinds.exchanges(data).values() for pair in some}
    distinct = sorted(dict(sorted(known)).items())
    return random.Random(0).sample(distinct, len(distinct))


@contextmanager
def made(given: Pairs, exchanges: int) -> Iterator[Path]:
    """A folder with an archive of one day, and a frozen reference with vectors; deleted afterwards."""
    from monitoring.detectors import Calibrated

    with tempfile.TemporaryDirectory(prefix="regraft-drift-report-") as name:
        folder = Path(name)
        rows = [Row(id=f"r{i}", prompt=p, output=o) for i, (p, o) in enumerate(given[:REFERENCE])]
        freeze(folder, model="support", version=1, rows=rows)
        Calibrated(cache=folder / "vectors").embed([t for row in rows for t in (row.prompt, row.output)])
        _archive(folder / "archive", given[REFERENCE:], exchanges)
        yield folder


def child(folder: Path, by: str, data: Path) -> Found:
    """One report by a process of its own."""
    command = [sys.executable, __file__, "--made", str(folder), "--by", by, "--data", str(data)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f"{by}: {json.dumps(found)}\n")
    return found


def ours(folder: Path) -> Found:
    """Windows, sample, quality, test and page, as a check makes them."""
    from monitoring import evidently_view  # noqa: F401 - as much is imported before the clock starts
    from monitoring.check import check_window, detector_of
    from monitoring.detectors import Calibrated
    from monitoring.quality import quality_signals
    from monitoring.report import write_report
    from monitoring.sampling import sampled_exchanges
    from monitoring.schedule import close_windows, due
    from regraft.config import MonitorSection

    settings = MonitorSection()
    reference, store = opened(folder)
    detector = detector_of(settings, folder / "vectors")
    Calibrated().embed(["imports and loads what it needs"])
    clock = Clock()
    times = store.times(every=DAY, most=settings.min_rows, model="support", version=1)
    (span,) = close_windows(times, START, due(START, START + DAY, DAY), settings.min_rows).closed
    clock.lap("times")
    parts = store.parts(start=span[0], end=span[1], model="support", version=1)
    sampled = sampled_exchanges(parts)
    clock.lap("sampling")
    quality = quality_signals(sampled.exchanges, reference.quality, settings.quality)
    clock.lap("quality")
    checked = check_window(reference, sampled.exchanges, settings, detector=detector, quality=quality)
    clock.lap("test")
    page = folder / "ours.html"
    write_report(
        page, checked.report, detection=checked.detection, reference=checked.reference, window=checked.window
    )
    clock.lap("page")
    return clock.found(page) | {
        "exchanges": sampled.total,
        "sampled": len(sampled.exchanges),
        "rows": len(checked.window),
        "sessions": sampled.sessions,
        "status": checked.report.status,
    }


def _archive(folder: Path, given: Pairs, exchanges: int) -> None:
    """Files as a shipper leaves them, begun at even distances over a day, in no order of the texts."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from regraft.data.capture_archive import schema

    asked = pa.array([json.dumps([{"role": "user", "content": prompt}]) for prompt, _ in given])
    told = pa.array([output for _, output in given])
    draw = np.random.default_rng(0)
    day = folder / f"day={START.date().isoformat()}"
    day.mkdir(parents=True)
    first = np.datetime64(START.replace(tzinfo=None), "us")
    step = DAY // timedelta(microseconds=1) / exchanges
    for number, at in enumerate(range(0, exchanges, _FILE)):
        places = np.arange(at, min(at + _FILE, exchanges))
        which = pa.array(draw.integers(0, len(given), len(places)))
        constant = {
            "model": "support", "model_version": 1, "finish_reason": "stop", "prompt_tokens": 20,
            "completion_tokens": 100, "latency_ms": 900.0, "first_token_ms": 80.0, "stream": False,
            "parameters": "{}", "error": None, "key": None, "choice": 0, "variant": "champion",
        }  # fmt: skip
        full = schema()
        columns = {
            name: pa.repeat(pa.scalar(value, full.field(name).type), len(places))
            for name, value in constant.items()
        } | {
            "id": pa.array([f"chatcmpl-{i:032x}" for i in places.tolist()]),
            "created": pa.array(first + (places * step).astype("timedelta64[us]")),
            "messages": asked.take(which),
            "output": told.take(which),
            "session": pa.array([f"s-{i // 2}" for i in places.tolist()]),
        }
        table = pa.table([columns[name].cast(full.field(name).type) for name in full.names], schema=full)
        file = day / f"{START.date().isoformat()}-1-{number:016x}.parquet"
        pq.write_table(table, file, row_group_size=_GROUP, compression="zstd")


if __name__ == "__main__":
    main()
