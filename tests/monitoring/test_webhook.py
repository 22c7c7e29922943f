from __future__ import annotations

import hmac
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from made import HOSTILE, QUALITY, decision, report, stream, told_by_users

from monitoring.webhook import SIGNATURE_HEADER, Payload, Webhook, message_id, signed
from regraft.config import WebhookSection
from regraft.errors import ConfigError
from regraft.records import DecisionOutcome, DriftReport

SECRET = "between us"
EVERYTHING = WebhookSection(url_env="HOOK", secret_env="SECRET", events=("alarm", "decision", "outcome"))


class Receiver(ThreadingHTTPServer):
    """Answers with the codes in turn, with the last one for good; "drop" hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[int | str] = [200]
        self.got: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/secret-path"

    def handle_error(self, request, client_address) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if answer == "drop":
            return
        self.send_response(answer)
        self.send_header("Content-Length", "0")
        if 300 <= answer < 400:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def hook(receiver: Receiver, settings: WebhookSection = EVERYTHING) -> Webhook:
    made = Webhook.of(settings, {"HOOK": f"{receiver.url}\n", "SECRET": SECRET})
    return made.model_copy(update={"backoff_seconds": 0.001})


@pytest.fixture
def alarm() -> DriftReport:
    return stream([1e-4] * 3, kind="new_content", quality=QUALITY)[-1]


def test_a_message_carries_figures_and_a_signature_over_its_exact_bytes(receiver, alarm):
    told = hook(receiver).send("alarm", Payload(report=alarm, decision=decision(alarm, page=True)))
    assert (told.status, told.attempts) == ("delivered", 1)
    (path, headers, body), message = receiver.got[0], json.loads(receiver.got[0][2])
    assert path == "/services/secret-path"
    assert headers["Content-Type"] == "application/json"
    assert (message["event"], message["id"]) == ("alarm", told.id)
    assert message["report"]["kind"] == "new_content"
    assert message["report"]["evidence"]["drift"]["value"] == alarm.evidence["drift"].value
    assert message["report"]["quality"][0]["value"] == 0.2
    assert message["decision"]["action"] == "collect"
    assert "\n" not in message["text"]
    assert message["text"].startswith("shop/3: drift, new content over 200 exchanges")
    # The recipe of the module's docstring, done by hand.
    expected = "sha256=" + hmac.new(SECRET.encode(), body, "sha256").hexdigest()
    assert hmac.compare_digest(expected, headers[SIGNATURE_HEADER])
    assert signed(SECRET, body, headers[SIGNATURE_HEADER])
    assert not signed(SECRET, body + b" ", headers[SIGNATURE_HEADER])
    assert not signed("another", body, headers[SIGNATURE_HEADER])
    assert not signed(SECRET, body, None)


def test_nothing_that_users_wrote_is_told(receiver, alarm):
    wrote = "the words of a user"
    seen = alarm.model_copy(
        update={"summary": wrote, "drivers": (wrote,), "attribution": told_by_users(), "report_path": wrote}
    )
    made = decision(seen, reason=wrote, waiting=(wrote,))
    outcome = DecisionOutcome(decision_id=made.id, status="failed", detail=wrote, ended=made.created)
    for event in ("alarm", "decision", "outcome"):
        hook(receiver).send(event, Payload(report=seen, decision=made, outcome=outcome))
    assert len(receiver.got) == 3
    for _, _, body in receiver.got:
        assert wrote.encode() not in body
        assert b"rocket" not in body
        assert HOSTILE.encode() not in body
    assert json.loads(receiver.got[0][2])["report"]["attribution"]["new_share"] == 0.2


def test_slack_finds_nothing_to_interpret(receiver, alarm):
    named = alarm.model_copy(update={"model": "<!channel> & co\nnext"})
    hook(receiver).send("alarm", Payload(report=named))
    assert json.loads(receiver.got[0][2])["text"].startswith("&lt;!channel&gt; &amp; co next/3: drift")


@pytest.mark.parametrize("first", [500, 503, 429, "drop"])
def test_a_server_that_fails_twice_is_told_the_third_time_in_the_same_words(receiver, alarm, first):
    receiver.answers = [first, first, 204]
    told = hook(receiver).send("alarm", Payload(report=alarm))
    assert (told.status, told.attempts) == ("delivered", 3)
    assert len({body for _, _, body in receiver.got}) == 1
    assert {headers["Idempotency-Key"] for _, headers, _ in receiver.got} == {told.id}


def test_a_server_that_keeps_failing_is_given_up_and_neither_address_nor_secret_is_logged(
    receiver, alarm, caplog
):
    caplog.set_level(logging.DEBUG)
    receiver.answers = [500]
    webhook = hook(receiver)
    told = webhook.send("alarm", Payload(report=alarm))
    assert (told.status, told.attempts, len(receiver.got)) == ("failed", 4, 4)
    assert "answered 500" in caplog.text
    receiver.shutdown()
    receiver.server_close()
    gone = webhook.send("alarm", Payload(report=alarm))
    assert (gone.status, gone.detail) == ("failed", "no answer: ConnectionRefusedError")
    for words in (caplog.text, repr(webhook), str(webhook), repr(told), repr(gone)):
        assert SECRET not in words
        assert "secret-path" not in words


@pytest.mark.parametrize("answer", [302, 307, 400, 404])
def test_what_will_not_pass_is_not_tried_again_and_redirects_are_not_followed(receiver, alarm, answer):
    receiver.answers = [answer]
    told = hook(receiver).send("alarm", Payload(report=alarm))
    assert (told.status, told.attempts, len(receiver.got)) == ("failed", 1, 1)
    assert str(answer) in told.detail


def test_an_answer_that_does_not_come_is_waited_for_only_so_long(alarm):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        webhook = Webhook.of(EVERYTHING, {"HOOK": url, "SECRET": SECRET})
        quick = webhook.model_copy(update={"timeout_seconds": 0.05, "attempts": 2, "backoff_seconds": 0.0})
        told = quick.send("alarm", Payload(report=alarm))
    assert (told.status, told.attempts, told.detail) == ("failed", 2, "no answer: TimeoutError")


def test_only_what_is_wanted_is_told(receiver, alarm):
    quiet = hook(receiver, WebhookSection(url_env="HOOK", events=("outcome",)))
    assert quiet.send("alarm", Payload(report=alarm)).status == "skipped"
    assert Webhook.of(WebhookSection(), {}).send("alarm", Payload(report=alarm)).status == "skipped"
    assert receiver.got == []
    with pytest.raises(ValueError, match="lacks the record of 'outcome'"):
        quiet.send("outcome", Payload(report=alarm))
    outcome = DecisionOutcome(decision_id="d", status="promoted", detail="", version=4, ended="")
    assert quiet.send("outcome", Payload(outcome=outcome)).status == "delivered"
    _, headers, body = receiver.got[0]
    assert SIGNATURE_HEADER not in headers
    assert json.loads(body)["text"] == "decision d: promoted, version 4"


def test_an_alarm_that_stays_is_one_message_and_another_that_joins_is_a_new_one():
    checks = stream([1e-4] * 4)
    raised = [c for c in checks if c.alarms]
    assert len(raised) > 1
    assert len({message_id("alarm", Payload(report=c)) for c in raised}) == 1
    joined = raised[-1].model_copy(update={"alarms": ("drift", "refusal_rate")})
    assert message_id("alarm", Payload(report=joined)) != message_id("alarm", Payload(report=raised[-1]))
    again = report(9, None, 1e-9)
    assert message_id("alarm", Payload(report=again)) != message_id("alarm", Payload(report=raised[-1]))


@pytest.mark.parametrize(
    ("settings", "environ", "field"),
    [
        ({"url_env": "HOOK"}, {}, "monitor.webhook.url_env: the variable HOOK is not set"),
        ({"url_env": "HOOK"}, {"HOOK": " \n"}, "monitor.webhook.url_env: the variable HOOK is not set"),
        ({"url_env": "HOOK"}, {"HOOK": "file:///etc/sesame"}, "does not hold an http or https URL"),
        ({"url_env": "HOOK"}, {"HOOK": "http://host:99999/sesame"}, "does not hold an http or https URL"),
        ({"url_env": "HOOK", "secret_env": "KEY"}, {"HOOK": "https://h/sesame"}, "webhook.secret_env"),
        ({"url_env": "https://h/sesame"}, {}, "monitor.webhook.url_env: the variable that it names"),
    ],
)
def test_a_wrong_setting_is_named_without_the_address(settings, environ, field):
    with pytest.raises(ConfigError, match=field) as raised:
        Webhook.of(WebhookSection(**settings), environ)
    assert "sesame" not in str(raised.value)
