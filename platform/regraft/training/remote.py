"""A trial whose answers come from an endpoint: asked, scored and timed. Nothing is loaded here."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from regraft.chat_client import ChatClient, NoAnswerError, Reply, Turn
from regraft.config import EvaluateSection
from regraft.errors import ServiceError
from regraft.evals.evaluate import evaluate
from regraft.evals.generation import p95
from regraft.methods.endpoint import Endpoint
from regraft.records import EvalReport, Example, ExampleScore, Speed
from regraft.watchdog import alive

_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What an endpoint came to: scores, speed, tokens and failures by name, and what the answers cost."""

    report: EvalReport
    speed: Speed | None
    counts: dict[str, int]
    money: float


def ask_endpoint(
    endpoint: Endpoint,
    examples: Sequence[Example],
    settings: EvaluateSection,
    *,
    dataset_id: str,
    split: str,
) -> Asked:
    """Have an endpoint answer the examples, score its answers, and time a few of them.

    An example without an answer is a failure of every metric, with the reason; it counts in no mean.

    Args:
        endpoint: Whom to ask.
        examples: What to ask.
        settings: How to answer and score.
        dataset_id: The dataset the examples are from.
        split: The evaluation set's name.

    Raises:
        ServiceError: If the key is not set here, or there is no answer at all.
    """
    with endpoint.client() as client:
        replies = client.ask_all(
            [_turns(e) for e in examples],
            max_tokens=settings.max_new_tokens,
            concurrency=endpoint.concurrency,
            came=alive,
        )
        answered = [r for r in replies if isinstance(r, Reply)]
        failed = [r for r in replies if isinstance(r, NoAnswerError)]
        if not answered:
            raise ServiceError(
                f"{endpoint.label} answered none of {len(examples)} examples: {failed[0].problem}"
            )
        if failed:
            _log.warning(
                "%s left %d of %d examples without an answer: %s",
                endpoint.label, len(failed), len(examples), failed[0].problem,
            )  # fmt: skip
        report = _scored(examples, replies, settings, dataset_id, split)
        timing = _speed(client, examples, settings)
    counts = _tokens(answered) | {"answers_failed": len(failed)}
    money = endpoint.money(counts["answer_prompt_tokens"], counts["answer_completion_tokens"])
    return Asked(report, timing, counts, money)


def _turns(example: Example) -> list[Turn]:
    return [{"role": m.role, "content": m.content} for m in example.prompt]


def _scored(
    examples: Sequence[Example],
    replies: Sequence[Reply | NoAnswerError],
    settings: EvaluateSection,
    dataset_id: str,
    split: str,
) -> EvalReport:
    """Scores of the answers, with a failure of every metric where there is none."""
    answers = {e.id: r.text for e, r in zip(examples, replies, strict=True) if isinstance(r, Reply)}
    asked = [e for e in examples if e.id in answers]
    report = evaluate(
        asked, [answers[e.id] for e in asked], settings.metrics, dataset_id=dataset_id, split=split
    )
    scored = {s.example_id: s for s in report.examples}
    names = [out.name for metric in settings.metrics for out in metric.outputs]
    for example, reply in zip(examples, replies, strict=True):
        if isinstance(reply, NoAnswerError):
            scored[example.id] = ExampleScore(
                example_id=example.id,
                prompt=example.prompt[-1].content,
                reference=example.reference,
                output="",
                scores={},
                failures=dict.fromkeys(names, f"no answer: {reply.problem}"),
                tags=example.tags,
            )
    update = {"examples": tuple(scored[e.id] for e in examples), "asked": settings.asked}
    return report.model_copy(update=update)


def _tokens(replies: Sequence[Reply]) -> dict[str, int]:
    """Tokens as the endpoint counts them, and how many answers came without a count."""
    uncounted = sum(r.prompt_tokens is None or r.completion_tokens is None for r in replies)
    if uncounted:
        _log.warning("%d answers came without usage: their tokens and their price are not counted", uncounted)
    return {
        "answer_prompt_tokens": sum(r.prompt_tokens or 0 for r in replies),
        "answer_completion_tokens": sum(r.completion_tokens or 0 for r in replies),
        "answers_uncounted": uncounted,
    }


def _speed(client: ChatClient, examples: Sequence[Example], settings: EvaluateSection) -> Speed | None:
    """Time a few answers one by one, over connections that are open; None if it does not stream them."""
    replies: list[Reply] = []
    problem = ""
    for example in settings.timed(examples):
        try:
            replies.append(client.ask(_turns(example), max_tokens=settings.max_new_tokens, stream=True))
        except NoAnswerError as error:
            problem = error.problem
        alive()
    if problem:
        _log.warning("%d answers were timed; of another: %s", len(replies), problem)
    if not replies:
        return None
    latencies = [r.seconds * 1000 for r in replies]
    first = [r.first_token_seconds * 1000 for r in replies if r.first_token_seconds is not None]
    # A streamed part is one token at most endpoints; their own count is better where they give it.
    tokens = sum(r.pieces if r.completion_tokens is None else r.completion_tokens for r in replies)
    return Speed(
        latency_p50_ms=statistics.median(latencies),
        latency_p95_ms=p95(latencies),
        first_token_p50_ms=statistics.median(first),
        tokens_per_second=tokens / (sum(latencies) / 1000),
        how=f"{len(replies)} prompts one by one over HTTP, streamed, each asked once before, at most "
        f"{settings.max_new_tokens} tokens; with the network and whatever else the endpoint does",
    )
