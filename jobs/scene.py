"""What a round of the monitor works on: the champion, its reference, its exchanges, one window's check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from jobs.console import Say
from jobs.likelihood import answer_logprobs
from jobs.quality import judge_scores, late_scores
from jobs.references import captured, feedback_of, reference_of
from jobs.workspace import Connection
from monitoring.carrying import carried
from monitoring.check import Checked, check_window, detector_of
from monitoring.detectors import Calibrated
from monitoring.quality import quality_signals
from monitoring.sampling import MOST_SESSIONS, Sampled, sampled_exchanges
from monitoring.sequential import DRIFT, PROMPTS
from monitoring.windows import Reference, rows_of
from regraft.config import Experiment
from regraft.errors import DataError, ModelError, RegraftError
from regraft.records import CapturedExchange, DriftReport, Feedback, ModelVersion
from regraft.times import utc
from regraft.tracking.ledger import Ledger

#: One interval for all time: of it the first session is kept, and no other.
_EVER = timedelta(days=365_000)


class Scene(NamedTuple):
    """The champion of an experiment, and what its traffic is held against, at one moment."""

    path: Path
    experiment: Experiment
    connection: Connection
    ledger: Ledger
    champion: ModelVersion
    reference: Reference
    feedback: Sequence[Feedback]
    now: datetime
    say: Say

    @classmethod
    def of(cls, path: Path, experiment: Experiment, connection: Connection, now: datetime, say: Say) -> Scene:
        """The present scene.

        Raises:
            RegraftError: If there is no champion or it has no reference.
        """
        champion = connection.registry.by_alias(experiment.name, "champion")
        if champion is None:
            raise RegraftError(f"{experiment.name} has no champion to watch", "run `regraft sweep` first")
        return cls(
            path,
            experiment,
            connection,
            Ledger(connection.tracker(experiment)),
            champion,
            reference_of(champion, connection),
            feedback_of(experiment, connection),
            now,
            say,
        )

    def sample(self, start: datetime | None, end: datetime | None) -> Sampled:
        """What the champion answered in a stretch of time; of more than can be looked at, whole sessions."""
        store = captured(self.experiment, self.connection)
        model, version = self.champion.name, self.champion.version
        parts = store.parts(start=start, end=end, model=model, version=version)
        return sampled_exchanges(parts, MOST_SESSIONS, salt=f"{start}")

    def times(self, start: datetime | None) -> list[tuple[datetime, str | None]]:
        """When the champion's sessions began, as far as windows are closed by them."""
        monitor = self.experiment.monitor
        return captured(self.experiment, self.connection).times(
            every=timedelta(seconds=monitor.every_seconds), most=monitor.min_rows, start=start, end=self.now,
            model=self.champion.name, version=self.champion.version,
        )  # fmt: skip

    def first(self, enough: Callable[[Sequence[CapturedExchange]], bool]) -> list[CapturedExchange]:
        """The champion's first exchanges, oldest first, until there are enough of them or no more."""
        store = captured(self.experiment, self.connection)
        begun = store.times(
            every=_EVER, most=1, end=self.now, model=self.champion.name, version=self.champion.version
        )
        at = min((time for time, _ in begun), default=self.now)
        found: list[CapturedExchange] = []
        stretch = timedelta(minutes=1)
        while at < self.now and not enough(found):
            end = min(at + stretch, self.now)
            some = store.read(start=at, end=end, model=self.champion.name, version=self.champion.version)
            found += [e for e in some if e.variant != "shadow"]
            # Little traffic: longer stretches, so that a year is not read minute by minute.
            at, stretch = end, stretch if len(some) > MOST_SESSIONS else 2 * stretch
        return found

    def latest(self) -> DriftReport | None:
        """The last report against the present reference; None before the first."""
        return self.ledger.latest(self.champion.name, self.champion.version, self.reference.id)

    def carried(self, report: DriftReport) -> DriftReport:
        """A report with the evidence that later checks add to."""
        raised = {e.alarmed_by for e in report.evidence.values() if e.alarmed_by}
        # The newest decision first: what it says of an alarm's kind counts.
        found = [d for d in self.ledger.decisions(report.model) if d.alarm_id in raised] if raised else []
        kinds = {d.alarm_id: d.kind for d in reversed(found) if d.kind is not None}
        dealt = {
            decision.alarm_id
            for decision in found
            if decision.action in {"retrain", "roll_back"} and self.ledger.outcome(decision.id) is not None
        }
        return report.model_copy(update={"evidence": carried(report, kinds, dealt)})

    def check(
        self,
        exchanges: Sequence[CapturedExchange],
        previous: DriftReport | None,
        start: str = "",
        end: str = "",
    ) -> Checked:
        """Compare exchanges with the reference, and add what they say to the evidence of `previous`."""
        monitor, retrain = self.experiment.monitor, self.experiment.retrain
        cache = self.connection.workspace / "embeddings"
        detector = detector_of(monitor, cache)
        explainer = Calibrated(cache=cache)
        if isinstance(detector, Calibrated):
            # As many strange exchanges as a reviewer may be given; a page shows the first few.
            detector = detector.model_copy(update={"examples": max(detector.examples, retrain.collect)})
            explainer = detector
        quality = quality_signals(
            exchanges,
            self.reference.quality,
            monitor.quality,
            feedback=self.feedback,
            late_scores=late_scores(
                # Corrections come mostly on wrong answers: beside evaluation scores they would fake a drop.
                self.experiment,
                exchanges,
                self.feedback,
                self.say,
                corrections=False,
            ),
            judged=judge_scores(self.experiment, exchanges, self.say),
        )
        evidence = previous.evidence if previous else {}
        grown = min((e.since for n, e in evidence.items() if n in (DRIFT, PROMPTS) and e.since), default="")
        before = self.sample(utc(grown), utc(start)).exchanges if grown and start else ()
        return check_window(
            self.reference,
            exchanges,
            monitor,
            detector=detector,
            explainer=explainer,
            previous=previous,
            quality=quality,
            since_growth=[*before, *exchanges],
            logprobs=self._logprobs(exchanges),
            start=start,
            end=end,
        )

    def _logprobs(self, exchanges: Sequence[CapturedExchange]) -> dict[str, float]:
        """How likely the champion finds a sample of its answers, of the window and of the reference.

        An evaluation's reference has no exchanges: of its prompts not all turns are kept.
        """
        limit = self.experiment.monitor.logprob_answers
        if not limit:
            return {}
        found: dict[str, float] = {}
        try:
            folder = self.connection.registry.fetch(self.champion.logged_model_id)
            for some in (self._reference_exchanges(), exchanges):
                own = {row.id for row in rows_of(some)}  # as they are compared
                found |= answer_logprobs(
                    self.experiment, self.champion, [e for e in some if e.id in own], limit, folder=folder
                )
        except (DataError, ModelError) as error:
            self.say(f"answers have no log-probabilities: {error}")
        return found

    def _reference_exchanges(self) -> list[CapturedExchange]:
        """What the reference was frozen of, as far as it is still captured."""
        if not self.reference.until:
            return []
        own = {row.id for row in self.reference.rows}
        stream = captured(self.experiment, self.connection).stream(
            end=utc(self.reference.until) + timedelta(microseconds=1),
            model=self.champion.name, version=self.champion.version,
        )  # fmt: skip
        return [e for e in stream if e.id in own]

    def page(self, report: DriftReport) -> Path:
        """Where the page of a report is written."""
        folder = self.connection.workspace / "reports"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"drift-{self.experiment.name}-{report.id}.html"
