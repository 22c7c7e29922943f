"""Whether known topics are answered as well as before: asked where they come in other shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from monitoring.attribution import sort_rows
from monitoring.baseline import QualityBaseline
from monitoring.detectors import Calibrated
from monitoring.measures import unit_of
from monitoring.quality import baseline_of_rows, by_segment
from monitoring.windows import Row, hashed
from regraft.monitor_sections import MonitorSection
from regraft.records import CapturedExchange, Feedback

#: Fewer reference rows of a topic than this say nothing of how well it was answered.
_FEWEST = 20
#: Exchanges that are sorted at most: each prompt is embedded.
_MOST = 5000


def worse_segments(
    exchanges: Sequence[CapturedExchange],
    reference: Sequence[Row],
    settings: MonitorSection,
    *,
    feedback: Sequence[Feedback] = (),
    cache: Path | None = None,
    detector: Calibrated | None = None,
) -> tuple[str, ...]:
    """Names of the reference's topics whose quality fell, significantly and by more than is allowed.

    Topics are those that a report names (`monitoring.topics`), of prompts; what is like none of the
    reference's was never answered before, and is left out. Each topic is held against its own answers in the
    reference. Of those the texts alone are known: empty, refusing and repetitive answers; of the others, what
    the settings allow.

    Args:
        exchanges: Of the window, those that failed too; of more than 5000 whole sessions, chosen by hash.
        reference: Rows that the window was compared with.
        settings: How much worse is worse; `alpha` is shared by all topics and measures.
        feedback: On any answers.
        cache: Folder that keeps embeddings between processes.
        detector: Embeds and finds topics; the calibrated one by the settings of `detector`, if not given.

    Raises:
        DataError: If the reference is too small to have topics.
        ModelError: If the embedding model cannot be had.
    """
    asked = [e for e in exchanges if e.prompt_text.strip()]
    if not asked:
        return ()
    asked = sorted(asked, key=lambda e: (hashed(unit_of(e)), hashed(e.id)))[:_MOST]
    if detector is None:
        given = {k: v for k, v in settings.detector.items() if k in ("embedding_model", "topics", "seed")}
        detector = Calibrated.model_validate(given | {"cache": cache})
    before = sorted(reference, key=lambda row: hashed(row.id))
    now = [Row(id=e.id, prompt=e.prompt_text, output=e.output) for e in asked]
    found = sort_rows("prompt", reference, [*before, *now], detector)
    names = [found.names[g] if 0 <= g < found.known else None for g in found.group.tolist()]
    members: dict[str, list[Row]] = defaultdict(list)
    for name, row in zip(names, before, strict=False):
        if name is not None:
            members[name].append(row)
    signals = by_segment(
        asked,
        {
            e.id: name
            for e, name in zip(asked, names[len(before) :], strict=True)
            if name is not None and len(members[name]) >= _FEWEST
        },
        QualityBaseline(),
        settings.quality,
        baselines={name: baseline_of_rows(rows) for name, rows in members.items()},
        feedback=feedback,
    )
    return tuple(
        name
        for name, own in signals.items()
        if any(s.worse and s.p_value is not None and s.p_value * len(own) <= settings.alpha for s in own)
    )
