"""What changed in a window: which topics of prompts and answers, where, since when, and in what form.

It explains what a test found and decides nothing. Every finding is significant by a test of its own, adjusted
for how many were asked (Benjamini and Hochberg, 1995), so that an ordinary window is explained by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from monitoring.descriptors import describe_full
from monitoring.detectors.calibrated import Calibrated
from monitoring.detectors.embedded import fresh
from monitoring.detectors.frozen import by_session, split
from monitoring.matching import BEHAVIOUR_ALPHA, MatchedTest
from monitoring.topics import Topics, sort_texts
from monitoring.windows import Row
from regraft.records import Attribution, DescriptorChange, Shown, Side, TopicChange

#: Share of false findings among those listed, at most.
FALSE_FINDINGS = 0.05
#: Topics and descriptors listed at most, and exchanges shown of a topic.
TOPICS, DESCRIBED, EXAMPLES = 8, 8, 3
#: Characters of a text that is shown.
SHOWN_CHARACTERS = 300
#: The prompts' test is as strict as that of behaviour.
PROMPTS_ALPHA = BEHAVIOUR_ALPHA
_SIDES: tuple[Side, ...] = ("prompt", "answer")


def attribute(
    reference: Sequence[Row],
    window: Sequence[Row],
    detector: Calibrated,
    matched: MatchedTest | None,
    *,
    created: Mapping[str, str] | None = None,
    since: str = "",
    logprobs: Mapping[str, float] | None = None,
    inputs_p: float | None = None,
) -> Attribution:
    """Say what of a window differs from the reference.

    Shares are over one row of each session: turns of one session are alike, and tests would take them for
    independent ones. A topic that the reference knows is tested among texts that are like the reference's: a
    new topic would otherwise make all others look shrunk. The order of the rows is of no account.

    Args:
        reference: Rows frozen at promotion; the part that the detector compares is compared here.
        window: Rows captured since.
        detector: Whose embeddings, maps and permutations are used.
        matched: The test of answers to prompts that are alike, for `where`; None if it was not made.
        created: When rows of the window came, by their ids, UTC in ISO 8601.
        since: When the evidence began to grow.
        logprobs: Mean log-probability of a token of answers, by the ids of rows, where it is known.
        inputs_p: What this detector found of the same prompts, if it was asked already.

    Raises:
        DataError: If the reference is too small to split.
        ModelError: If the embedding model cannot be had.
    """
    compared = _one_each(split(reference).compared)
    now = _one_each(fresh(reference, window))
    if inputs_p is None and not detector.lacking(reference, window):
        inputs_p = _of("prompt", detector).detect(reference, window).p_value
    outputs_p = matched.p_value if matched else None
    topics: list[TopicChange] = []
    if now:
        for side in _SIDES:
            topics += _topic_changes(side, reference, compared, now, detector, created or {})
    return Attribution(
        where=_where(inputs_p, outputs_p),
        inputs_p=inputs_p,
        outputs_p=outputs_p,
        new_share=matched.new_share if matched else None,
        topics=tuple(
            sorted(topics, key=lambda t: (-abs(t.window_share - t.reference_share), t.side, t.name))
        )[:TOPICS],
        descriptors=_descriptor_changes(compared, now, detector, logprobs or {}),
        since=since,
    )


def _where(
    inputs_p: float | None, outputs_p: float | None
) -> Literal["inputs", "outputs", "both", "neither"]:
    asked = inputs_p is not None and inputs_p <= PROMPTS_ALPHA
    told = outputs_p is not None and outputs_p <= BEHAVIOUR_ALPHA
    return "both" if asked and told else "inputs" if asked else "outputs" if told else "neither"


def _of(side: Side, detector: Calibrated) -> Calibrated:
    """The detector that looks at a side."""
    return detector.model_copy(update={"side": f"{side}s"})


def _one_each(rows: Sequence[Row]) -> list[Row]:
    """One row of each session, by hash."""
    return [session[0] for session in by_session(rows)]


def sort_rows(side: Side, reference: Sequence[Row], rows: Sequence[Row], detector: Calibrated) -> Topics:
    """Sort one side of rows into the topics of the reference and new ones.

    Args:
        side: Prompts or answers.
        reference: The part of it that the detector maps makes and names the topics.
        rows: Of the window, the reference or both, in an order that does not tell which.
        detector: Whose map and embeddings are used.

    Raises:
        DataError: If the reference is too small to split.
        ModelError: If the embedding model cannot be had.
    """
    of_side = _of(side, detector)
    mapped, texts = ([of_side.text(row) for row in some] for some in (split(reference).mapped, rows))
    embed = detector.embed
    return sort_texts(of_side.frozen(reference), (mapped, embed(mapped)), texts, embed(texts))


def _topic_changes(
    side: Side,
    reference: Sequence[Row],
    compared: Sequence[Row],
    now: Sequence[Row],
    detector: Calibrated,
    created: Mapping[str, str],
) -> list[TopicChange]:
    from scipy.stats import fisher_exact

    rows = [*compared, *now]
    in_window = np.arange(len(rows)) >= len(compared)
    # Sorted blind to the side: by hash alone.
    blind = sorted(range(len(rows)), key=lambda i: (rows[i].id, in_window[i]))
    sorted_in = sort_rows(side, reference, [rows[i] for i in blind], detector)
    group = np.empty(len(rows), dtype=np.intp)
    group[blind] = sorted_in.group
    like = (group >= 0) & (group < sorted_in.known)
    present = [int(g) for g in np.unique(group) if g >= 0]
    p_values = []
    for topic in present:
        among = like if topic < sorted_in.known else np.ones(len(rows), dtype=bool)
        inside = group == topic
        table = [[int((inside & s).sum()), int((among & ~inside & s).sum())] for s in (~in_window, in_window)]
        p_values.append(float(fisher_exact(table).pvalue))
    changes = []
    for topic, significant in zip(present, _significant(p_values), strict=True):
        inside = group == topic
        before, after = float(inside[~in_window].mean()), float(inside[in_window].mean())
        new = topic >= sorted_in.known
        if not significant or (new and after <= before):
            continue
        members = [rows[i] for i in np.flatnonzero(inside & in_window)]
        times = [created[row.id] for row in members if row.id in created]
        changes.append(
            TopicChange(
                name=sorted_in.name(topic),
                side=side,
                new=new,
                reference_share=before,
                window_share=after,
                count=len(members),
                since=min(times, default=""),
                examples=_nearest(side, members, detector),
            )
        )
    return changes


def _nearest(side: Side, rows: Sequence[Row], detector: Calibrated) -> tuple[Shown, ...]:
    """The exchanges nearest to the middle of them all."""
    if not rows:
        return ()
    found = detector.embed([_of(side, detector).text(row) for row in rows]).astype(np.float64)
    near = np.round(found @ found.mean(axis=0), 5)
    order = np.argsort(-near, kind="stable")[:EXAMPLES]
    return tuple(
        Shown(id=rows[i].id, prompt=_short(rows[i].prompt), answer=_short(rows[i].output)) for i in order
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1].rstrip() + "…"


def _descriptor_changes(
    compared: Sequence[Row], now: Sequence[Row], detector: Calibrated, logprobs: Mapping[str, float]
) -> tuple[DescriptorChange, ...]:
    rows = [*compared, *now]
    known = [logprobs.get(row.id) for row in rows]
    frame = describe_full(
        [row.prompt for row in rows],
        [row.output for row in rows],
        embed=detector.embed,
        logprobs=known if any(value is not None for value in known) else None,
        cache=detector.cache,
    )
    tested: list[tuple[float, DescriptorChange]] = []
    for column in map(str, frame):
        before, after = (part[column].dropna() for part in (frame[: len(compared)], frame[len(compared) :]))
        if len(before) == 0 or len(after) == 0 or pd.concat([before, after]).nunique() < 2:
            continue
        p_value, distance = _distance(before.to_numpy(np.float64), after.to_numpy(np.float64))
        side, _, name = column.partition("_")
        change = DescriptorChange.model_validate(
            {
                "name": name,
                "side": side,
                "reference": float(before.mean()),
                "window": float(after.mean()),
                "distance": distance,
            }
        )
        tested.append((p_value, change))
    chosen = _significant([p for p, _ in tested])
    moved = [change for (_, change), significant in zip(tested, chosen, strict=True) if significant]
    return tuple(sorted(moved, key=lambda c: (-c.distance, c.side, c.name))[:DESCRIBED])


def _distance(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
    """A p-value and the Kolmogorov-Smirnov distance; rates are tested exactly."""
    from scipy.stats import fisher_exact, ks_2samp

    if np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all():
        table = [[int(part.sum()), int((1 - part).sum())] for part in (before, after)]
        return float(fisher_exact(table).pvalue), abs(float(before.mean() - after.mean()))
    found = ks_2samp(before, after, method="asymp")
    return float(found.pvalue), float(found.statistic)


def _significant(p_values: Sequence[float]) -> list[bool]:
    """Which of several tests are significant (Benjamini and Hochberg, 1995)."""
    if not p_values:
        return []
    from scipy.stats import false_discovery_control

    return [bool(p <= FALSE_FINDINGS) for p in false_discovery_control(np.asarray(p_values))]
