"""What is read off single exchanges for `monitoring.quality`: marks, times, scores, and which are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from monitoring.windows import hashed
from regraft.evals import Answer
from regraft.evals.refusal import Refusal
from regraft.records import CapturedExchange, Feedback

T = TypeVar("T")
#: An answer goes round in circles where at least this share of its runs was said before.
LOOP_SHARE = 0.5
#: Shorter texts are not called loops: in words, or in characters where there are fewer words.
LOOP_WORDS, LOOP_CHARACTERS = 12, 60
#: Nobody waited for the end of such an answer: its text says nothing of the model.
UNFINISHED = frozenset({"aborted", "withdrawn"})
#: Measures of the service rather than of answers: load, hardware and the network move them. No training mends
#: them, and another version would be as slow or fail as often. An empty answer is the model's own.
SERVICE = frozenset({"error_rate", "latency_p95_ms", "first_token_p95_ms"})
_REFUSAL = Refusal()


def refuses(text: str) -> bool:
    """Whether an answer declines, as the metric `refusal` has it."""
    return bool(_REFUSAL.score(Answer(text))["refusal"])


def loops(text: str) -> bool:
    """Whether a text goes round in circles: half of its runs of three words stood in it before.

    A long text of few words, as of a language that does not part them, is looked at by runs of eight
    characters.
    """
    units: Sequence[str] = text.lower().split()
    run = 3
    if len(units) < LOOP_WORDS:
        if len(text) < LOOP_CHARACTERS:
            return False
        units, run = text.lower(), 8
    runs = [tuple(units[i : i + run]) for i in range(len(units) - run + 1)]
    return 1 - len(set(runs)) / len(runs) >= LOOP_SHARE


#: What a text may be, by the name of the rate, and what that is called.
TEXT_RATES: dict[str, tuple[Callable[[str], bool], str]] = {
    "empty_rate": (lambda text: not text.strip(), "empty answers"),
    "refusal_rate": (refuses, "refusals"),
    "repetition_rate": (loops, "answers that go round in circles"),
}


def failed(exchange: CapturedExchange) -> bool:
    """Whether a request ended in an error."""
    return exchange.error is not None or exchange.finish_reason == "error"


def unit_of(exchange: CapturedExchange) -> str:
    """What an exchange belongs to: its session, or the request, whose choices are alike."""
    return unit(exchange.session, exchange.id, exchange.choice)


def unit(session: str | None, identifier: str, choice: int) -> str:
    """`unit_of` an exchange with this session, id and choice."""
    if session is not None:
        return f"session:{session}"
    return f"row:{identifier.removesuffix(f'-{choice}')}"


def marks(exchanges: Sequence[CapturedExchange]) -> dict[str, tuple[dict[str, bool], str]]:
    """By the name of a rate: whether each exchange counts for it, and what that is called.

    What failed is an error and nothing else; of answers that nobody waited for the text is not looked at.
    """
    whole = [e for e in exchanges if not failed(e) and e.finish_reason not in UNFINISHED]
    return {
        "error_rate": ({e.id: failed(e) for e in exchanges}, "failed requests"),
        **{name: ({e.id: bad(e.output) for e in whole}, what) for name, (bad, what) in TEXT_RATES.items()},
        "truncated_rate": ({e.id: e.finish_reason == "length" for e in whole}, "answers cut off"),
    }


def latencies(exchanges: Sequence[CapturedExchange]) -> dict[str, float]:
    """Times of whole answers in milliseconds.

    Those nobody waited for have the time that somebody did: left out, a service that got too slow to wait
    for would look quick.
    """
    return {e.id: e.latency_ms for e in exchanges if not failed(e)}


def first_tokens(exchanges: Sequence[CapturedExchange]) -> dict[str, float]:
    """Times to the first token in milliseconds, where they are known."""
    return {e.id: e.first_token_ms for e in exchanges if e.first_token_ms is not None and not failed(e)}


def feedback_scores(feedback: Iterable[Feedback], known: Mapping[str, str]) -> dict[str, float]:
    """The last score of each answer that is known, by its id."""
    said = sorted(feedback, key=lambda f: (f.created, f.id))
    return {f.answer_id: f.score for f in said if f.score is not None and f.answer_id in known}


def one_each(values: Mapping[str, T], units: Mapping[str, str]) -> list[T]:
    """The value of one exchange of each unit.

    Args:
        values: By id of the exchange. Which is taken depends on the hash of the ids alone.
        units: The unit of each exchange.
    """
    chosen: dict[str, T] = {}
    for identifier in sorted(values, key=hashed):
        chosen.setdefault(units[identifier], values[identifier])
    return list(chosen.values())


def unit_means(values: Mapping[str, float], units: Mapping[str, str]) -> list[float]:
    """The mean of the values of each unit; an exchange that is not among them stands alone."""
    parts: dict[str, list[float]] = defaultdict(list)
    for identifier in sorted(values):
        parts[units.get(identifier, f"row:{identifier}")].append(values[identifier])
    return [sum(part) / len(part) for part in parts.values()]
