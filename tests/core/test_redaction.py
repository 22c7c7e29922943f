from __future__ import annotations

import random
import re

import pytest
from pydantic import ValidationError

from regraft.data.redaction import Redactor, redact
from regraft.personal_data import find
from regraft.records import CapturedExchange, Message
from regraft.serve_sections import CaptureSection, RedactionRule

ALL = (
    "Ann: ann@example.org, (212) 555-0147, 4111 1111 1111 1111, DE89 3704 0044 0532 0130 00, "
    "078-05-1120, 192.168.0.17"
)


def test_every_kind_gets_its_name() -> None:
    assert redact(ALL) == "Ann: <EMAIL>, <PHONE>, <CARD>, <IBAN>, <SSN>, <IP>"
    assert redact(redact(ALL)) == redact(ALL)


@pytest.mark.parametrize(
    "text",
    [
        "Order 4111 1111 1111 1112 of 2024-11-05, version 1.2.3, meter 123-456",
        "DE00 3704 0044 0532 0130 00",
        "10,482 kWh at 0.31, from 12 March to 12 April 2026",
        "a@b, @home, user@, 256.1.1.1x",
        "",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("4111 1111 1111 1111 12/27", "<CARD> 12/27"),  # one number of 18 digits, by its form
        ("Nr 2024 4111111111111111", "Nr 2024 <CARD>"),
        ("amex 3782 822463 10005 123", "amex <CARD> 123"),
        ("AT611904300234573201 BANK", "<IBAN> BANK"),
        ("AT61 1904 3002 3457 3201 OPSK ATWW", "<IBAN> OPSK ATWW"),
    ],
)
def test_a_number_is_found_where_more_is_joined_to_it(text: str, hidden: str) -> None:
    assert redact(text) == hidden


def test_pieces_that_overlap_go_together_under_the_name_of_the_longest() -> None:
    rules = (
        RedactionRule(name="customer", pattern=r"C-\d+ \w+"),
        RedactionRule(name="ticket", pattern=r"\w+@example\.org #\d{6,}"),
        RedactionRule(name="twin", pattern=r"C-\d+ \w+"),
    )
    redactor = Redactor(("email",), rules)
    assert redactor.redact("by C-77 jo@example.org #123456.") == "by <TICKET>."
    assert redactor.redact("by C-77 Ann, jo@example.org") == "by <CUSTOMER>, <EMAIL>"
    assert Redactor((), rules[::-1]).redact("C-77 Ann") == "<TWIN>", "of equal ones the first rule"


def test_mail_addresses_are_those_of_the_plain_expression() -> None:
    plain = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
    draw = random.Random(4)
    for _ in range(3000):
        text = "".join(draw.choice("ab@@..-_+ é") for _ in range(40))
        found = [text[piece.start : piece.end] for piece in find(text, ("email",))]
        assert found == plain.findall(text), text


def test_long_texts_take_no_time_in_their_square() -> None:
    # With the plain expressions the first alone takes more than the time limit of a test.
    for text in ("a" * 10**6, "a@" * 10**5, "a" * 10**5 + "@" + "b" * 10**5, "4111 " * 10**4):
        assert redact(text) == text


def test_an_exchange_is_redacted_wherever_a_client_or_the_model_wrote() -> None:
    deep: list[object] = ["jo@example.org"]
    for _ in range(2000):
        deep = [deep]
    exchange = CapturedExchange(
        id="jo@example.org",
        created="2026-03-04T12:00:00.000000+00:00",
        model="support",
        model_version=1,
        messages=(Message(role="system", content="Ask ann@example.org"), Message(role="user", content=ALL)),
        output="Call (212) 555-0147",
        finish_reason="error",
        prompt_tokens=1,
        completion_tokens=1,
        latency_ms=1.0,
        session="jo@example.org",
        parameters={"stop": ["jo@example.org"], "n": 1, "metadata": {"a": {"ip": "10.0.0.1"}}, "deep": deep},
        error="no route to 10.0.0.1",
    )
    hidden = Redactor().apply(exchange)
    assert [m.content for m in hidden.messages] == ["Ask <EMAIL>", redact(ALL)]
    assert (hidden.output, hidden.session, hidden.error) == ("Call <PHONE>", "<EMAIL>", "no route to <IP>")
    assert hidden.parameters["stop"] == ["<EMAIL>"]
    assert hidden.parameters["metadata"] == {"a": {"ip": "<IP>"}}
    assert "example.org" not in hidden.model_dump_json(exclude={"id"})
    assert (hidden.id, hidden.parameters["n"]) == (exchange.id, 1)
    assert CapturedExchange.model_validate_json(hidden.model_dump_json()) == hidden


def test_the_configuration_says_which_rules() -> None:
    own = {"name": "customer", "pattern": r"\bC-\d{4}\b"}
    text = "C-1234 at 10.0.0.1 is jo@example.org"
    for redacted, expected in (
        ("all", "<CUSTOMER> at <IP> is <EMAIL>"),
        (["customer", "email"], "<CUSTOMER> at 10.0.0.1 is <EMAIL>"),
    ):
        redactor = Redactor.of(CaptureSection.model_validate({"redact": redacted, "rules": [own]}))
        assert redactor is not None
        assert redactor.redact(text) == expected
    assert Redactor.of(CaptureSection(redact=())) is None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"redact": ["mail"]}, "there is no rule 'mail'"),
        ({"rules": [{"name": "email", "pattern": "x"}]}, "name of a rule that is built in"),
        ({"rules": [{"name": "Über", "pattern": "x"}]}, "should match pattern"),
        ({"rules": [{"name": "a", "pattern": "("}]}, "not a regular expression"),
        ({"rules": [{"name": "a", "pattern": "x*"}]}, "can match empty text"),
        ({"rules": [{"name": "a", "pattern": r"\b"}]}, "can match empty text"),
        ({"rules": [{"name": "a", "pattern": "x"}] * 2}, "'a' is there twice"),
        ({"redact": ["ip"], "rules": [{"name": "a", "pattern": "x"}]}, "leaves out 'a'"),
        ({"ship": "sftp://me:geheim@host/x"}, "a user or a password in its URL"),
        ({"rate": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CaptureSection.model_validate(settings)
    (error,) = caught.value.errors()
    assert problem in error["msg"]
    assert "geheim" not in error["msg"]
