"""The record of drift checks, of what was decided about them, and of what became of that.

A decision is written by the one request that makes its run. Made twice at the same moment, the older run
counts and nobody reads the other. An outcome is a parameter of its decision's run, which MLflow lets nobody
change: of a job and of who watches it, or of two watchers, the first one's word stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from regraft.errors import DataError
from regraft.records import Action, DecisionOutcome, DriftReport, RetrainDecision
from regraft.times import utc
from regraft.tracking.client import guarded, has_code, log_decision, to_json
from regraft.tracking.experiment import TrackedExperiment
from regraft.tracking.trials import TAG_CHARACTERS

REPORT_FILE, PAGE_FILE, SEEN_FILE = "report.json", "report.html", "trained_on.json"
_PARENT, _NOTE, _RECORD, _OUTCOME = "mlflow.parentRunId", "mlflow.note.content", "record", "outcome"
#: A record stands in one parameter, of which MLflow keeps 6000 characters: its texts may not be longer.
_TEXT_CHARACTERS = 1500
#: Reports are read so many at once.
_READERS = 8

#: Name, value, step, and milliseconds since the epoch: the same point logged twice is one.
Point = tuple[str, float, int, int]


class Ledger(TrackedExperiment):
    """Checks, decisions and outcomes of one MLflow experiment.

    Args:
        at: What is tracked there already, or the URL of the MLflow server.
        experiment: Name of the experiment, beside a URL.
    """

    def __init__(self, at: TrackedExperiment | str, experiment: str = "") -> None:
        if isinstance(at, TrackedExperiment):
            super().__init__(at.uri, at.experiment)
        else:
            super().__init__(at, experiment)

    @guarded
    def log_report(self, report: DriftReport, html: Path | None, points: Iterable[Point] = ()) -> str:
        """Log a check, whatever it found, as a run of its own; the same report twice is one run.

        The tags come last: what has them is whole. What users wrote is in `report.html` and in the examples
        of `report.json`, nowhere else.

        Args:
            report: What the check saw.
            html: The page for people, if there is one.
            points: What the check adds to the curves of its version, which are one run for all checks.

        Returns:
            The id of the run.
        """
        name = f"drift {report.model}/{report.model_version} {report.window_end}"
        run = self._first({"role": "drift", "drift_report": report.id}, name, {})
        run_id = str(run.info.run_id)
        if html is not None:
            self._client.log_text(run_id, html.read_text(encoding="utf-8"), PAGE_FILE)
        kept = report.model_copy(update={"run_id": run_id})
        self._client.log_text(run_id, to_json(kept), REPORT_FILE)
        self._log_points(report, points)
        tags = {
            "model": report.model,
            "model_version": str(report.model_version),
            "reference": report.reference_id,
            "window_start": report.window_start,
            "window_end": report.window_end,
            "covered": report.covered,
            "status": report.status,
            "alarms": ",".join(report.alarms),
            "summary": report.summary[:TAG_CHARACTERS],
        }
        when, values = _ended(report), _figures(report)
        self._client.log_batch(
            run_id,
            metrics=[Metric(f"drift/{key}", value, when, 0) for key, value in values.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        self._client.set_terminated(run_id)
        return run_id

    @guarded
    def latest(self, model: str, version: int, reference_id: str) -> DriftReport | None:
        """The report against a reference whose window ended last; None before the first."""
        tags = {"model": model, "model_version": str(version), "reference": reference_id}
        found = self._reports(tags, limit=1)
        return self._report(found[0]) if found else None

    @guarded
    def reports(self, model: str, *, limit: int, version: int | None = None) -> tuple[DriftReport, ...]:
        """Reports of a model, the window that ended last first.

        Args:
            model: Name of the registered model.
            limit: Most reports.
            version: Only those of this version.
        """
        tags = {"model": model} | ({} if version is None else {"model_version": str(version)})
        with ThreadPoolExecutor(_READERS) as readers:
            return tuple(readers.map(self._report, self._reports(tags, limit)))

    @guarded
    def note(self, decision: RetrainDecision) -> RetrainDecision:
        """Write a decision down, and on its report's run; gives the one that counts, which is the first.

        Args:
            decision: Of one id there is one, whoever decided it again and when.
        """
        kept = decision.model_copy(update={"reason": _clean(decision.reason)})
        tags = {"model": decision.model, "action": decision.action, "alarm": decision.alarm_id}
        tags |= {"drift_report": decision.drift_report_id, "created": decision.created}
        tags |= {_RECORD: kept.model_dump_json(), _NOTE: kept.reason}
        tags |= {_PARENT: decision.run_id} if decision.run_id else {}
        own = {"role": "decision", "decision": decision.id}
        run = self._first(own, f"decision {decision.action}", tags)
        if run.info.status == "RUNNING":
            self._client.set_terminated(run.info.run_id)
        if decision.run_id is not None:
            log_decision(self._client, decision.run_id, decision)
        return _decision(run)

    @guarded
    def decision(self, decision_id: str) -> RetrainDecision | None:
        """A decision by its id."""
        run = self._decided(decision_id)
        return _decision(run) if run else None

    @guarded
    def decisions(
        self, model: str, since: datetime | None = None, *, action: Action | None = None
    ) -> tuple[RetrainDecision, ...]:
        """Decisions about a model, the newest first.

        Args:
            model: Name of the registered model.
            since: Leave out what was decided before.
            action: Only such.
        """
        tags = {"model": model} | ({} if action is None else {"action": action})
        found = [_decision(run) for run in self._all(tags)]
        return _newest_first(d for d in found if since is None or utc(d.created) >= utc(since))

    @guarded
    def note_outcome(self, outcome: DecisionOutcome) -> DecisionOutcome:
        """Write down what became of a decision; gives the outcome that counts, which is the first.

        Raises:
            DataError: If there is no such decision.
        """
        run = self._known(outcome.decision_id)
        kept = outcome.model_copy(update={"detail": _clean(outcome.detail)})
        said = Param(_OUTCOME, kept.model_dump_json())
        try:
            self._client.log_batch(run.info.run_id, params=[said])
        except MlflowException as error:
            # Of two at the same moment MLflow finds neither and the database refuses the second, which MLflow
            # answers as a bad request; one that comes later, MLflow itself refuses.
            if not has_code(error, "INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            found = self.outcome(outcome.decision_id)
            if found is None:  # refused for another reason than that there is one
                raise
            kept = found
        # Not by set_tag: that fails where two set a tag's first value at once, and a batch tries again.
        self._client.log_batch(run.info.run_id, tags=[RunTag("status", kept.status)])
        return kept

    @guarded
    def outcome(self, decision_id: str) -> DecisionOutcome | None:
        """What became of a decision; None while that is open."""
        run = self._decided(decision_id)
        return _outcome(run) if run else None

    @guarded
    def outcomes(self, model: str) -> dict[str, DecisionOutcome]:
        """What became of the decisions about a model, by the decision's id; open ones are left out."""
        found = {run.data.tags["decision"]: _outcome(run) for run in self._all({"model": model})}
        return {name: outcome for name, outcome in found.items() if outcome is not None}

    @guarded
    def open(self, model: str) -> tuple[RetrainDecision, ...]:
        """Retrainings that were decided and have no outcome yet, the newest first."""
        runs = self._all({"model": model, "action": "retrain"})
        return _newest_first(_decision(run) for run in runs if _outcome(run) is None)

    @guarded
    def note_seen(self, decision_id: str, hashes: Sequence[str]) -> None:
        """Keep with a retraining which fresh examples it trained on, by their content's hashes.

        Raises:
            DataError: If there is no such decision.
        """
        run_id = self._known(decision_id).info.run_id
        self._client.log_dict(run_id, {"hashes": sorted(hashes)}, SEEN_FILE)

    @guarded
    def seen(self, model: str) -> frozenset[str]:
        """Hashes of the fresh examples that retrainings of a model trained on and came to a verdict with."""
        return frozenset().union(*(hashes for _, _, hashes in self._judged(model)))

    @guarded
    def tried(self, model: str, version: int) -> frozenset[str]:
        """Hashes of the fresh examples with which retrainings of a version were rejected.

        What a retraining of another version trained on is not among them.
        """
        judged = self._judged(model)
        own = [h for d, o, h in judged if d.model_version == version and o.status == "rejected"]
        others = [h for d, _, h in judged if d.model_version != version]
        return frozenset().union(*own).difference(*others)

    def _judged(self, model: str) -> list[tuple[RetrainDecision, DecisionOutcome, frozenset[str]]]:
        """Retrainings with a verdict, and the hashes of the fresh examples that each trained on."""
        found = []
        for run in self._all({"model": model, "action": "retrain"}):
            outcome = _outcome(run)
            judged = outcome is not None and outcome.status in {"promoted", "rejected"}
            if outcome is not None and judged and self._has(run, SEEN_FILE):
                hashes = frozenset(self._read_json(run.info.run_id, SEEN_FILE)["hashes"])
                found.append((_decision(run), outcome, hashes))
        return found

    def _has(self, run: Run, name: str) -> bool:
        return name in {f.path for f in self._client.list_artifacts(run.info.run_id)}

    def _first(self, tags: dict[str, str], name: str, more: dict[str, str]) -> Run:
        """The first run with these tags, made if there is none."""
        found = self._search(tags)
        if not found:
            self._client.create_run(self.experiment_id, run_name=name, tags=tags | more)
            found = self._search(tags)
        return min(found, key=_age)

    def _decided(self, decision_id: str) -> Run | None:
        return min(self._search({"role": "decision", "decision": decision_id}), key=_age, default=None)

    def _known(self, decision_id: str) -> Run:
        run = self._decided(decision_id)
        if run is None:
            raise DataError(f"decision_id: there is no decision {decision_id!r}", "note the decision first")
        return run

    def _all(self, tags: dict[str, str]) -> list[Run]:
        """The run that counts of each decision with these tags."""
        found: dict[str, Run] = {}
        for run in sorted(self._search({"role": "decision"} | tags), key=_age):
            found.setdefault(run.data.tags["decision"], run)
        return list(found.values())

    def _reports(self, tags: dict[str, str], limit: int) -> list[Run]:
        """Whole reports with these tags, the window that ended last first, each once."""
        wanted = [f"tags.{key} = '{value}'" for key, value in ({"role": "drift"} | tags).items()]
        once: dict[str, Run] = {}
        token = None
        while len(once) < limit:
            page = self._client.search_runs(
                [self.experiment_id],
                " AND ".join([*wanted, "tags.window_end != ''"]),
                order_by=["tags.window_end DESC", "attributes.start_time ASC"],
                max_results=min(limit, 1000),
                page_token=token,
            )
            for run in page:
                once.setdefault(run.data.tags["drift_report"], run)
            if not (token := page.token):
                break
        return list(once.values())[:limit]

    def _report(self, run: Run) -> DriftReport:
        return DriftReport.model_validate(self._read_json(run.info.run_id, REPORT_FILE))

    def _log_points(self, report: DriftReport, points: Iterable[Point]) -> None:
        metrics = [Metric(name, value, when, step) for name, value, step, when in points]
        if not metrics:
            return
        served = f"{report.model}/{report.model_version}"
        run = self._first({"role": "monitor", "monitored": served}, f"monitor {served}", {})
        self._client.log_batch(run.info.run_id, metrics=metrics)
        if run.info.status == "RUNNING":
            self._client.set_terminated(run.info.run_id)


def _figures(report: DriftReport) -> dict[str, float]:
    values = {"p_value": report.p_value, "effect": report.effect, "alpha": report.alpha, "rows": report.rows}
    return {key: value for key, value in values.items() if value is not None}


def _ended(report: DriftReport) -> int:
    """When the window ended, in milliseconds since the epoch; 0 where it had no exchange."""
    return int(utc(report.window_end).timestamp() * 1000) if report.window_end else 0


def _decision(run: Run) -> RetrainDecision:
    return RetrainDecision.model_validate_json(run.data.tags[_RECORD])


def _outcome(run: Run) -> DecisionOutcome | None:
    said = run.data.params.get(_OUTCOME)
    return None if said is None else DecisionOutcome.model_validate_json(said)


def _newest_first(decisions: Iterable[RetrainDecision]) -> tuple[RetrainDecision, ...]:
    return tuple(sorted(decisions, key=lambda d: (utc(d.created), d.id), reverse=True))


def _clean(text: str) -> str:
    """As much of a text as is kept, without what a terminal or an escape would make of it."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)[:_TEXT_CHARACTERS]


def _age(run: Run) -> tuple[Any, ...]:
    """What puts runs into the order in which they were begun, the same for every reader."""
    return run.info.start_time, run.info.run_id
