"""The calibrated detector on sentence embeddings: one exact p-value over what answers say and how."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from monitoring.descriptors import describe_more, in_words
from monitoring.detectors import permutation as perm
from monitoring.detectors.base import Detection
from monitoring.detectors.embedded import Embedded, fresh
from monitoring.detectors.frozen import Features, Frozen, in_order, split
from monitoring.detectors.text import grown_terms
from monitoring.windows import Row, sessions_in
from regraft.errors import DataError
from regraft.records import TestResult

Floats = perm.Floats
_WORDS = {
    "novelty": "{side} are unlike any of the reference's",
    "company": "{side} unlike any of the reference's are like each other",
    "topics": "the {side} are spread over other topics",
    "form": "{side} are written in another form",
}
_DETAILS = {
    "novelty": "effect: share of {side} beyond the reference's own threshold of novelty, above chance",
    "company": "effect: the same share; tested: how many of their nearest neighbours are the window's too",
    "topics": "effect: share of {side} that lie in other topics, above chance",
    "form": "effect: the largest Kolmogorov-Smirnov distance over the descriptors, above chance",
}
#: Nearest texts that count as company. Measured on six domains of CLINC150 with two others as new topics, in
#: turn (64 references of 1,500, a window each): 92 % of windows with 10 % new topics among 200 had p <= 0.05,
#: without this group 72 %; of those with 20 % among 100 all had, without it 89 %. 5 or 20 nearest differed by
#: two points; by cosine or in all 384 dimensions fewer were found.
COMPANY = 10
#: Ten times as many labellings are drawn where a p-value is at most so many times the smallest one possible.
CLOSER = 10
#: Change of a rate of empty answers or refusals that is named first.
_TELLING = 0.02
#: Maps of references that were fitted in this process; a reference is checked again and again.
_FITTED: OrderedDict[str, Frozen] = OrderedDict()
_MAPS_KEPT = 8


class Statistics(NamedTuple):
    """Values under every labelling: of the tests by group, and of each group's effect."""

    groups: dict[str, Floats]
    effects: dict[str, Floats]


class Calibrated(Embedded):
    """A permutation test over novelty, its company, topics and form of answers; sessions are permuted whole.

    The reference is split by session: 40 % are the index (principal directions, nearest neighbours, topics),
    20 % set the novelty threshold, 40 % are compared with the window. Given the first two parts, sessions of
    the compared part and of the window are exchangeable if nothing changed, so the p-value is exact. Where
    `permutations` leave it near its smallest, up to `most_permutations` tell how small it is. One side
    of the exchanges is looked at, the answers or the prompts: a model may answer new questions in its usual
    words. `monitoring.matching` tells a change of prompts from one of behaviour.

    The effect is novelty lift: the share of the window's answers beyond the threshold minus the compared
    part's, above chance (the median over the permutations). 0.05 are five points. A change of form alone has
    no novelty lift: with `gate="any"` the effect is the largest one of the three groups, all of them shares
    of the window that the reference does not account for.
    """

    effect_unit: ClassVar[str] = "share of the window that the reference does not account for"

    name: Literal["calibrated"] = "calibrated"
    dimensions: int = Field(64, ge=2, description="Principal directions of the embeddings that are kept.")
    topics: int = Field(20, ge=2, description="Topics at most.")
    tail: float = Field(0.95, gt=0.5, lt=1, description="The percentile of distance that novel answers pass.")
    most_permutations: int = Field(
        9_999, ge=999, description="Random labellings at most, where fewer leave the smallest p-values."
    )
    gate: Literal["novelty", "any"] = Field(
        "novelty", description="Whose effect counts: novelty's alone, or the largest of all groups."
    )

    def detect(self, reference: Sequence[Row], window: Sequence[Row]) -> Detection:
        """See `Detector.detect`; the order of the rows is of no account.

        Raises:
            DataError: If there are fewer sessions than `min_reference` or `min_window`.
            ModelError: If the embedding model cannot be had.
        """
        self._refuse_little(reference, window)
        now = in_order(fresh(reference, window))
        parts = split(reference)
        frozen = self.frozen(reference)
        rows = [*parts.compared, *now]
        texts = [self.text(row) for row in rows]
        features = frozen.features(self.embed(texts))
        form = describe_more(texts)
        compared = Compared(features, form, frozen)
        for permutations in self._looks():
            found = compared.over(self._labels(parts.compared, now, permutations))
            joint, adjusted = perm.joint_p(found.groups)
            if joint > CLOSER / (permutations + 1):
                break
        effects = {name: _above_chance(values) for name, values in found.effects.items()}
        count = len(parts.compared)
        return Detection(
            p_value=joint,
            effect=max(effects.values()) if self.gate == "any" else effects["novelty"],
            tests=tuple(
                TestResult(
                    name=name, p_value=p, effect=effects[name], detail=_DETAILS[name].format(side=self.side)
                )
                for name, p in adjusted.items()
            ),
            drivers=tuple(_drivers(adjusted, form, count, self.side)),
            novel=self._most_novel(now, features.distances[count:]),
            terms=grown_terms(texts[:count], texts[count:], self.examples),
            share=sessions_in(now) / sessions_in(parts.compared),
        )

    def _looks(self) -> Iterator[int]:
        """How many random labellings are drawn, look after look.

        A closer look is taken only where the one before gave a p-value of at most some c, and its own p-value
        is what counts then. That is valid however the two depend on each other: for x of at least c, what
        counts is at most x only where the first look's is, and for smaller x only where the closer one's is.
        """
        count = self.permutations
        yield count
        while count < self.most_permutations:
            count = min(10 * (count + 1) - 1, self.most_permutations)
            yield count

    def frozen(self, reference: Sequence[Row]) -> Frozen:
        """The map of a reference's answers, fitted once a process.

        Raises:
            DataError: If it has fewer than ten sessions.
            ModelError: If the embedding model cannot be had.
        """
        parts = split(reference)
        if min(map(len, parts)) < 2:
            raise DataError(
                f"a reference of {len(reference)} rows is too small to split", "freeze a larger one"
            )
        settings = [self.embedding_model, self.dimensions, self.topics, self.tail, self.seed]
        texts = [[self.text(row) for row in part] for part in (parts.mapped, parts.threshold)]
        key = hashlib.sha256(repr([settings, texts]).encode()).hexdigest()
        frozen = _FITTED.pop(key, None) or Frozen(
            self.embed(texts[0]),
            self.embed(texts[1]),
            dimensions=self.dimensions,
            topics=self.topics,
            tail=self.tail,
            seed=self.seed,
        )
        _FITTED[key] = frozen
        while len(_FITTED) > _MAPS_KEPT:
            _FITTED.popitem(last=False)
        return frozen


class Compared:
    """The rows of both sides as what their statistics are computed from, whatever the labelling.

    Args:
        features: Where the texts lie, compared part and window together.
        form: Descriptors of the same texts.
        frozen: The map that the features come from.
    """

    def __init__(self, features: Features, form: pd.DataFrame, frozen: Frozen) -> None:
        self._topics, self._form = features.topics, form
        self._beyond = (features.distances > frozen.threshold).astype(np.float64)
        self._excess = np.maximum(features.distances - frozen.near, 0.0)
        squared = perm.squared_distances(features.places @ features.places.T)
        self._kernel = perm.gaussian(squared)
        self._near = perm.neighbours(squared, COMPANY)

    def over(self, parts: Iterable[perm.Labels]) -> Statistics:
        """The statistics of every group and their effects, for labellings given in parts."""
        found = [self.under(labels) for labels in parts]
        return Statistics(_joined([part.groups for part in found]), _joined([part.effects for part in found]))

    def under(self, labels: perm.Labels) -> Statistics:
        """The statistics of every group and their effects, for every labelling.

        Novelty is told by how many texts are beyond the threshold and by how far they lie beyond ordinary
        ones: one outlier does not carry the first. Its company is told by how many of the nearest neighbours
        of such texts are the window's too.

        Args:
            labels: From `permutation`; the real labelling is the first column of the first part.
        """
        lift = perm.mean_difference(self._beyond[:, None], labels)
        excess = perm.mean_difference(self._excess[:, None], labels)
        company = perm.company(self._excess, self._near, labels)
        mixture = perm.mixture(self._topics, labels)
        discrepancy = perm.kernel_discrepancy(self._kernel, labels)
        groups = {
            "novelty": np.stack([lift, excess]),
            "company": company[None],
            "topics": np.stack([mixture, discrepancy]),
        }
        effects = {
            "novelty": lift,
            "company": lift,
            "topics": perm.total_variation(self._topics, labels),
        }
        distances = form_distances(self._form, labels)
        if distances:
            groups["form"] = np.stack(list(distances.values()))
            effects["form"] = groups["form"].max(axis=0)
        return Statistics(groups, effects)


def _joined(parts: Sequence[dict[str, Floats]]) -> dict[str, Floats]:
    return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}


def form_distances(form: pd.DataFrame, labels: perm.Labels) -> dict[str, Floats]:
    """Kolmogorov-Smirnov distance of each descriptor that varies over the rows of both sides together."""
    varying = [str(column) for column in form if form[column].nunique() > 1]
    rates = [column for column in varying if form[column].isin((0.0, 1.0)).all()]
    found = {
        column: perm.kolmogorov_smirnov(form[column].to_numpy(dtype=np.float64), labels)
        for column in varying
        if column not in rates
    }
    if rates:
        differences = perm.rate_differences(form[rates].to_numpy(), labels)
        found |= dict(zip(rates, differences, strict=True))
    return found


def _above_chance(statistic: Floats) -> float:
    return float(statistic[0] - np.median(statistic[1:]))


def _drivers(adjusted: dict[str, float], form: pd.DataFrame, compared: int, side: str) -> list[str]:
    """What changed, strongest first; only what is significant by itself at 5 % after adjustment."""
    found = []
    for name, p in sorted(adjusted.items(), key=lambda item: item[1]):
        if p >= 0.05:
            continue
        found.append(f"{_WORDS[name].format(side=side)} (adjusted p {p:.2g})")
        if name == "form":
            moved = _moved(form, compared)
            found += [
                f"{in_words(f'{side[:-1]}_{c}')}: {a:.3g} on average before, {b:.3g} now" for c, a, b in moved
            ]
    return found


def _moved(form: pd.DataFrame, compared: int) -> list[tuple[str, float, float]]:
    """The three descriptors that moved furthest, with their means on both sides."""
    labels = np.zeros((len(form), 1), dtype=bool)
    labels[compared:] = True
    far = {column: float(values[0]) for column, values in form_distances(form, labels).items()}
    # Rates of empty answers and refusals say more than the averages that they drag along.
    telling = [c for c in ("empty", "refusal") if far.get(c, 0.0) >= _TELLING]
    order = sorted(far, key=lambda c: (c not in telling, -far[c]))[:3]
    return [(c, float(form[c].iloc[:compared].mean()), float(form[c].iloc[compared:].mean())) for c in order]
