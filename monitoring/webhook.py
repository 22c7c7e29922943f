"""Tells a URL of alarms, decisions and what became of them; of the texts of users it tells nothing.

A receiver checks that a message is ours by the header `X-Regraft-Signature`, over the body's exact bytes:

    expected = "sha256=" + hmac.new(secret, body, "sha256").hexdigest()
    hmac.compare_digest(expected, header)

Messages may come twice; `id` is then the same. Which were delivered is remembered by whoever sends.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, SecretStr

from monitoring.sequential import DRIFT
from monitoring.timeline import evidence_words, quality_words
from regraft.config import WebhookSection
from regraft.errors import ConfigError
from regraft.records import DecisionOutcome, DriftReport, Record, RetrainDecision, content_hash

Event = Literal["alarm", "decision", "outcome"]
SIGNATURE_HEADER = "X-Regraft-Signature"
#: The longest wait between two attempts, in seconds, whatever the receiver asks for.
_LONGEST_WAIT = 30.0
_LOG = logging.getLogger(__name__)
#: What is told: figures, names and ids of our own. Summaries, drivers, topics and reasons may quote users.
_REPORT: dict[str, Any] = {
    **dict.fromkeys(("id", "model", "model_version", "reference_id", "window_start", "window_end"), True),
    **dict.fromkeys(("rows", "reference_rows", "status", "p_value", "effect", "alpha", "arl"), True),
    **dict.fromkeys(("alarms", "kind", "evidence", "run_id"), True),
    "quality": {"__all__": {"name", "value", "reference", "count", "p_value", "worse", "low", "high"}},
    "attribution": {"where", "inputs_p", "outputs_p", "new_share", "descriptors", "since"},
}
_DECISION = {"id", "drift_report_id", "model", "model_version", "action", "created", "kind"} | {
    "alarm_id", "page", "automatic", "job_id", "run_id",
}  # fmt: skip
_OUTCOME = {"decision_id", "status", "version", "gpu_hours", "cpu_hours", "ended"}


class Payload(Record):
    """The records that a message is about; an event needs the record of its name, `alarm` the report."""

    report: DriftReport | None = None
    decision: RetrainDecision | None = None
    outcome: DecisionOutcome | None = None


class Delivery(NamedTuple):
    """What became of a message.

    Attributes:
        status: `skipped`: nobody wants to be told.
        id: Of the message; the same for the same event about the same record.
        attempts: How often it was sent.
        detail: Why it failed or was skipped, without the address.
    """

    status: Literal["delivered", "skipped", "failed"]
    id: str
    attempts: int = 0
    detail: str = ""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: a redirect could carry figures to an address that nobody named."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None


class Webhook(Record):
    """Whom to tell. Address and secret are never shown."""

    url: SecretStr | None = None
    secret: SecretStr | None = None
    events: tuple[Event, ...] = ()
    timeout_seconds: float = Field(10.0, gt=0)
    attempts: int = Field(4, ge=1)
    backoff_seconds: float = Field(1.0, ge=0)

    @classmethod
    def of(cls, settings: WebhookSection, environ: Mapping[str, str]) -> Webhook:
        """Read address and secret from the environment; white space around them does not count.

        Raises:
            ConfigError: If a variable that the settings name is missing or empty, or holds no HTTP URL.
        """
        url = _variable(environ, settings.url_env, "url_env")
        if url is not None and not _is_http(url):
            raise ConfigError(
                f"monitor.webhook.url_env: {settings.url_env} does not hold an http or https URL",
                "set it to the whole address, such as https://host/path",
            )
        secret = _variable(environ, settings.secret_env, "secret_env")
        return cls(
            url=None if url is None else SecretStr(url),
            secret=None if secret is None else SecretStr(secret),
            events=settings.events,
            timeout_seconds=settings.timeout_seconds,
        )

    def send(self, event: Event, payload: Payload) -> Delivery:
        """Tell of an event. A receiver that cannot be reached or is overloaded is tried again.

        Args:
            event: What happened.
            payload: The records that it is about.

        Returns:
            What became of it. A failure is logged and returned, not raised.

        Raises:
            ValueError: If the payload lacks the record of the event.
        """
        message = message_id(event, payload)
        if self.url is None:
            return Delivery("skipped", message, detail="no webhook is set")
        if event not in self.events:
            return Delivery("skipped", message, detail=f"{event!r} is not among monitor.webhook.events")
        body = _body(event, message, payload)
        headers = {"Content-Type": "application/json", "User-Agent": "regraft", "Idempotency-Key": message}
        if self.secret is not None:
            headers[SIGNATURE_HEADER] = signature(self.secret.get_secret_value(), body)
        detail = ""
        for attempt in range(1, self.attempts + 1):
            detail, again = self._post(body, headers)
            if not detail:
                return Delivery("delivered", message, attempt)
            if again is None or attempt == self.attempts:
                break
            # Anything up to the full wait, so that many senders do not come back together.
            wait = random.uniform(0, self.backoff_seconds * 2 ** (attempt - 1))
            time.sleep(min(max(wait, again), _LONGEST_WAIT))
        _LOG.warning("webhook: %s %s was not delivered in %d attempts: %s", event, message, attempt, detail)
        return Delivery("failed", message, attempt, detail)

    def _post(self, body: bytes, headers: Mapping[str, str]) -> tuple[str, float | None]:
        """Send once: what went wrong ("" for nothing), and the seconds to wait at least; None: for good."""
        assert self.url is not None
        opener = urllib.request.build_opener(_Stay)
        try:
            request = urllib.request.Request(self.url.get_secret_value(), body, dict(headers), method="POST")
            # What is answered is not read: nobody knows how long it is.
            opener.open(request, timeout=self.timeout_seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
            if 300 <= error.code < 400:
                return f"answered {error.code}: redirects are not followed, name the final address", None
            asked = error.headers.get("Retry-After", "")
            passing = error.code == 429 or error.code >= 500
            return f"answered {error.code}", (float(asked) if asked.isdecimal() else 0.0) if passing else None
        except (OSError, HTTPException, ValueError) as error:
            # The kind alone: the words of some of these errors repeat the address.
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            name = type(cause).__name__ if isinstance(cause, Exception) else type(error).__name__
            return f"no answer: {name}", None if isinstance(error, ValueError) else 0.0
        return "", None


def signature(secret: str, body: bytes) -> str:
    """What the signature header holds for a body."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def signed(secret: str, body: bytes, header: str | None) -> bool:
    """Whether a header is the body's signature: the receiver's side."""
    return header is not None and hmac.compare_digest(signature(secret, body).encode(), header.encode())


def message_id(event: Event, payload: Payload) -> str:
    """Hash of the event and the record. An alarm that stays up over many checks is one; another joining, two.

    Raises:
        ValueError: If the payload lacks the record of the event.
    """
    if event == "alarm" and payload.report is not None:
        found = {n: payload.report.evidence.get(n) for n in payload.report.alarms}
        raised = sorted((e and e.alarmed_by) or f"{n} of {payload.report.id}" for n, e in found.items())
        return content_hash([event, raised or [payload.report.id]])
    if event == "decision" and payload.decision is not None:
        return content_hash([event, payload.decision.id])
    if event == "outcome" and payload.outcome is not None:
        return content_hash([event, payload.outcome.decision_id, payload.outcome.status])
    raise ValueError(f"the payload lacks the record of {event!r}")


def _body(event: Event, message: str, payload: Payload) -> bytes:
    shown: dict[str, Any] = {"event": event, "id": message, "text": _line(payload)}
    for name, record, included in (
        ("report", payload.report, _REPORT),
        ("decision", payload.decision, _DECISION),
        ("outcome", payload.outcome, _OUTCOME),
    ):
        if record is not None:
            shown[name] = json.loads(record.model_dump_json(include=included))  # NaN becomes null
    return json.dumps(shown, ensure_ascii=False, allow_nan=False).encode()


def _line(payload: Payload) -> str:
    """One line for people, in which Slack finds nothing to interpret."""
    about = payload.report or payload.decision
    parts = []
    if payload.report is not None:
        parts.append(_seen(payload.report))
    if (decision := payload.decision) is not None:
        words = decision.action.replace("_", " ")
        parts.append(f"decision: {words}" + ("" if decision.automatic else " (waits for a person's word)"))
        if decision.page:
            parts.append("please look now")
    if (outcome := payload.outcome) is not None:
        version = "" if outcome.version is None else f", version {outcome.version}"
        what = f"decision {outcome.decision_id}" if payload.decision is None else "outcome"
        parts.append(f"{what}: {outcome.status.replace('_', ' ')}{version}")
    name = f"{about.model}/{about.model_version}: " if about is not None else ""
    line = " ".join((name + "; ".join(parts)).split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _seen(report: DriftReport) -> str:
    kind = f", {report.kind.replace('_', ' ')}" if report.kind else ""
    said = [f"{report.status}{kind} over {report.rows} exchanges"]
    if DRIFT in report.evidence:
        said.append(f"evidence {evidence_words(report, DRIFT)}")
    if report.effect is not None:
        said.append(f"effect {report.effect:.2f}")
    for signal in report.quality:
        if signal.name in report.alarms:
            before = quality_words(signal.name, signal.reference)
            said.append(f"{signal.name} {quality_words(signal.name, signal.value)} (before {before})")
    return ", ".join(said)


def _variable(environ: Mapping[str, str], name: str | None, field: str) -> str | None:
    if name is None:
        return None
    value = environ.get(name, "").strip()
    if not value:
        # Who wrote the address itself in its place must not find it in a log.
        name = name if name.isidentifier() else "that it names"
        raise ConfigError(
            f"monitor.webhook.{field}: the variable {name} is not set",
            f"set the variable where the monitor runs, or set {field} to null",
        )
    return value


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return (
        parts.scheme in {"http", "https"}
        and bool(parts.hostname)
        and port_is_fine
        and url.isascii()
        and url.isprintable()
        and " " not in url
    )
