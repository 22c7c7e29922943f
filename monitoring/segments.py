"""Whether known topics are answered as well as before: asked where they come in other shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monitoring.baseline import QualityBaseline
from monitoring.detectors import Calibrated
from monitoring.detectors.text import grown_terms
from monitoring.quality import baseline_of_rows, by_segment
from monitoring.windows import Row
from regraft.monitor_sections import MonitorSection
from regraft.records import CapturedExchange, Feedback

#: Fewer reference rows of a topic than this say nothing of how well it was answered.
_FEWEST = 20
_TERMS = 3


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

    Topics are those of the reference's prompts (k-means on their embeddings), and an exchange belongs to the
    one that its prompt is nearest to. Each topic is held against its own answers in the reference. Of those
    the texts alone are known: empty, refusing and repetitive answers; of the others, what the settings allow.

    Args:
        exchanges: Of the window, those that failed too.
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
    if detector is None:
        given = {k: v for k, v in settings.detector.items() if k in ("embedding_model", "topics", "seed")}
        detector = Calibrated.model_validate(given | {"cache": cache})
    frozen, embed = detector.model_copy(update={"side": "prompts"}).frozen(reference), detector.embed

    def topics(texts: Sequence[str]) -> list[int]:
        return [int(topic) for topic in frozen.features(embed(texts)).topics]

    of_reference = topics([row.prompt for row in reference])
    members: dict[int, list[Row]] = {}
    for row, topic in zip(reference, of_reference, strict=True):
        members.setdefault(topic, []).append(row)
    names = {topic: _name(topic, rows, reference) for topic, rows in members.items() if len(rows) >= _FEWEST}
    segments = {
        e.id: names[topic]
        for e, topic in zip(asked, topics([e.prompt_text for e in asked]), strict=True)
        if topic in names
    }
    found = by_segment(
        asked,
        segments,
        QualityBaseline(),
        settings.quality,
        baselines={names[topic]: baseline_of_rows(members[topic]) for topic in names},
        feedback=feedback,
    )
    return tuple(
        name
        for name, signals in found.items()
        if any(
            s.worse and s.p_value is not None and s.p_value * len(signals) <= settings.alpha for s in signals
        )
    )


def _name(topic: int, rows: Sequence[Row], reference: Sequence[Row]) -> str:
    """The terms that tell a topic's prompts from all others; its number where nothing does."""
    own = {row.id for row in rows}
    others = [row.prompt for row in reference if row.id not in own]
    terms = grown_terms(others, [row.prompt for row in rows], _TERMS) if others else ()
    return f"{', '.join(term.text for term in terms) or 'topic'} ({topic})"
