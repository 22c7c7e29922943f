"""Tell people by webhook of alarms, decisions and outcomes, each once a workspace."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

from jobs.console import Say
from monitoring.webhook import Event, Payload, Webhook, message_id
from regraft.config import Experiment
from regraft.records import DriftReport, RetrainDecision
from regraft.times import utc
from regraft.tracking.ledger import Ledger

#: Outcomes older than this are no news, wherever a monitor begins afresh.
_NEWS = timedelta(days=7)


class Teller:
    """Sends what was not sent yet; what a receiver did not take is sent again at the next round.

    Args:
        experiment: Whose webhook.
        workspace: Where it is written down what was sent.
        say: Where failures go.

    Raises:
        ConfigError: If a variable that `monitor.webhook` names is missing.
    """

    def __init__(self, experiment: Experiment, workspace: Path, say: Say) -> None:
        self._webhook = Webhook.of(experiment.monitor.webhook, os.environ)
        self._folder = workspace / "told"
        self._say = say

    def checked(self, report: DriftReport, decision: RetrainDecision) -> None:
        """Tell of a check that alarms, and of what was decided."""
        if report.alarms:
            self._tell("alarm", Payload(report=report, decision=decision))
        if decision.action != "nothing":
            self._tell("decision", Payload(report=report, decision=decision))

    def outcomes(self, ledger: Ledger, model: str, now: datetime) -> None:
        """Tell of what became of decisions lately."""
        found = [o for o in ledger.outcomes(model).values() if now - utc(o.ended) < _NEWS]
        for outcome in sorted(found, key=lambda o: o.ended):
            self._tell("outcome", Payload(decision=ledger.decision(outcome.decision_id), outcome=outcome))

    def _tell(self, event: Event, payload: Payload) -> None:
        if self._webhook.url is None or event not in self._webhook.events:
            return
        mark = self._folder / message_id(event, payload)
        if mark.exists():
            return
        sent = self._webhook.send(event, payload)
        if sent.status == "delivered":
            self._folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        elif sent.status == "failed":
            self._say(f"webhook: {event} {sent.id} was not delivered: {sent.detail}")
