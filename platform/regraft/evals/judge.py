"""A language model as the judge of answers, on any OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from regraft.chat_client import endpoint_url
from regraft.evals.base import Answer, Metric, Output, Scores
from regraft.evals.judge_client import Endpoint, Verdict, kept
from regraft.evals.judge_labels import agreement, read_labels
from regraft.evals.judge_prompts import (
    DEFAULT_RUBRIC,
    pairwise_prompt,
    read_score,
    read_winner,
    rubric_prompt,
)
from regraft.records import content_hash
from regraft.watchdog import alive


class _Asked(NamedTuple):
    """What came of judging one answer. `disagree` is None where only one order was asked.

    `tokens` and `money` are of what was paid now; None where the endpoint does not tell.
    """

    score: float
    disagree: float | None
    tokens: float | None
    money: float | None


class _Figures:
    """Of the class, all figures that it may give; of one judge, those that its settings ask for."""

    def __init__(self, always: tuple[Output, ...], where: Callable[[Judge], bool], more: tuple[Output, ...]):
        self._always, self._where, self._more = always, where, more

    def __get__(self, judge: Judge | None, _: type[Judge]) -> tuple[Output, ...]:
        return self._always + (self._more if judge is None or self._where(judge) else ())


class Judge(Metric):
    """A language model's word on each answer, and how far it agrees with people.

    In `rubric` mode the judge scores the answer by the rubric from 1 to `scale`; `judge` is that from 0 to 1.
    In `pairwise` mode it compares the answer with the reference, twice, with the order swapped: `judge` is 1
    where the answer wins, 0.5 for a tie and 0 where it loses, on average over both orders, and
    `judge_position_bias` the share of answers on which the two orders disagree. A judge that fails or cannot
    be understood is a failure of that answer, never a zero.

    Verdicts are kept under `$REGRAFT_HOME/judge` and never paid twice: `judge_tokens` and `judge_money` are
    what was paid now, 0 for a kept one; what a failed question took is not in them. The totals have the
    human labels in them. With those, `judge_correlation` is Spearman's rank correlation between the judge and
    people, and `judge_labels` how many labels it rests on: ten at least.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: ClassVar[int] = 1
    outputs: ClassVar[Any] = _Figures(
        (
            Output("judge"),
            Output("judge_tokens", "tokens", "lower"),
            Output("judge_money", "money", "lower"),
        ),
        lambda judge: judge.mode == "pairwise",
        (Output("judge_position_bias", better="lower"),),
    )
    wholes: ClassVar[Any] = _Figures(
        (Output("judge_tokens_total", "tokens", "lower"), Output("judge_money_total", "money", "lower")),
        lambda judge: judge.human_labels is not None,
        (Output("judge_correlation", "correlation"), Output("judge_labels", "labels", "")),
    )
    #: The gate may go by the judge only where this is known and at least `min_correlation`.
    indecisive: ClassVar[frozenset[str]] = frozenset(
        {"api_key_env", "timeout_seconds", "concurrency", "price_in", "price_out", "min_correlation"}
    )
    trusted_by: ClassVar[str] = "judge_correlation"

    name: Literal["judge"] = "judge"
    url: str = Field(description="Base of an OpenAI-compatible endpoint, such as https://host/v1.")
    model: str = Field(min_length=1, description="The judge, as the endpoint calls it.")
    api_key_env: str | None = Field(
        None, description="The environment variable with the key, set wherever trials run; none if not given."
    )
    mode: Literal["rubric", "pairwise"] = "rubric"
    rubric: str = Field(DEFAULT_RUBRIC, min_length=1, description="What a good answer is.")
    scale: int = Field(5, ge=2, le=100, description="Best score of a rubric; the worst is 1.")
    human_labels: Path | None = Field(
        None,
        description="JSON lines of prompt, reference, output and a person's score. Relative to the YAML.",
    )
    min_correlation: float = Field(
        0.5, ge=-1, le=1, description="Agreement with people below which the gate does not go by the judge."
    )
    timeout_seconds: float = Field(60.0, gt=0, description="For an answer of the endpoint.")
    concurrency: int = Field(8, ge=1, le=64, description="Questions asked at once.")
    max_tokens: int = Field(512, ge=1, description="Of an answer of the judge.")
    price_in: float = Field(0.0, ge=0, description="Money for a million tokens of prompts.")
    price_out: float = Field(0.0, ge=0, description="Money for a million tokens of the judge's answers.")

    @field_validator("url")
    @classmethod
    def _is_a_base(cls, value: str) -> str:
        return endpoint_url(value)

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):
            raise ValueError("must be the name of an environment variable such as JUDGE_API_KEY, not the key")
        return value

    @field_validator("human_labels")
    @classmethod
    def _are_labels(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and (file := Path((info.context or {}).get("folder", ""), value)).is_file():
            read_labels(file)
        return value

    def score(self, answer: Answer) -> Scores:
        """Ask the judge.

        Raises:
            ServiceError: If the endpoint gives no answer.
            ValueError: If its answer cannot be understood, or there is no reference to compare with.
        """
        (found,) = self.score_all([answer])
        if isinstance(found, Exception):
            raise found
        return found

    def score_all(self, answers: Sequence[Answer]) -> list[Scores | Exception]:
        """Ask the judge of all answers, several at once."""
        return [v if isinstance(v, Exception) else _scores(v) for v in self._judge(answers)]

    def whole(
        self, answers: Sequence[Answer], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float | Exception]:
        """What judging took in all and, with human labels, how far the judge agrees with them."""
        given = [s for s in scores if "judge" in s]
        found: dict[str, float | Exception] = {}
        labelled: list[_Asked] = []
        if self.human_labels is not None:
            try:
                found, labelled = self._against_people(self.human_labels)
            except (OSError, ValueError) as error:
                found = {"judge_correlation": error, "judge_labels": error}
        tokens = [s.get("judge_tokens") for s in given] + [v.tokens for v in labelled]
        money = [s.get("judge_money") for s in given] + [v.money for v in labelled]
        return {"judge_tokens_total": _total(tokens), "judge_money_total": _total(money)} | found

    def _against_people(self, file: Path) -> tuple[dict[str, float | Exception], list[_Asked]]:
        labels = read_labels(file)
        asked = self._judge([Answer(x.output, x.reference, x.prompt) for x in labels])
        both = [(v, x.score) for v, x in zip(asked, labels, strict=True) if not isinstance(v, Exception)]
        correlation: float | Exception
        try:
            correlation = agreement([v.score for v, _ in both], [score for _, score in both])
        except ValueError as error:
            failed = [v for v in asked if isinstance(v, Exception)]
            more = f"; the judge failed on {len(failed)} more, first with: {failed[0]}" if failed else ""
            correlation = ValueError(f"{file}: {error}{more}")
        return {"judge_correlation": correlation, "judge_labels": float(len(both))}, [v for v, _ in both]

    def _judge(self, answers: Sequence[Answer]) -> list[_Asked | Exception]:
        endpoint = Endpoint(self.url, self.model, self.api_key_env, self.timeout_seconds, self.max_tokens)
        with endpoint, ThreadPoolExecutor(self.concurrency) as pool:
            asked = [pool.submit(self._judge_one, endpoint, answer) for answer in answers]
            try:
                for _ in as_completed(asked):
                    alive()
            finally:
                pool.shutdown(cancel_futures=True)  # of a trial that is stopped no more is asked
        return [_outcome(future) for future in asked]

    def _judge_one(self, endpoint: Endpoint, answer: Answer) -> _Asked:
        if self.mode == "rubric":
            question = rubric_prompt(self.rubric, self.scale, answer.prompt, answer.reference, answer.output)
            verdict, new = self._ask(endpoint, question, lambda text: read_score(text, self.scale))
            return _Asked(verdict.score, None, *self._paid([verdict] if new else []))
        if not answer.reference:
            raise ValueError("there is no reference to compare the answer with")
        score = {"a": 1.0, "b": 0.0, "tie": 0.5}

        def worth(text: str) -> tuple[float, str]:
            winner, why = read_winner(text)
            return score[winner], why

        orders = [(answer.output, answer.reference), (answer.reference, answer.output)]
        verdicts = [
            self._ask(endpoint, pairwise_prompt(self.rubric, answer.prompt, *o), worth) for o in orders
        ]
        ahead, behind = verdicts[0][0].score, 1 - verdicts[1][0].score
        paid = self._paid([verdict for verdict, new in verdicts if new])
        return _Asked((ahead + behind) / 2, float(ahead != behind), *paid)

    def _ask(
        self, endpoint: Endpoint, question: str, read: Callable[[str], tuple[float, str]]
    ) -> tuple[Verdict, bool]:
        """The verdict on a question, and whether it was paid now.

        The 0 in the key is the temperature. `max_tokens` is not in it: it decides whether there is a verdict,
        not which.
        """
        key = content_hash(
            [self.version, self.url, self.model, 0, self.mode, self.scale, question], length=32
        )

        def verdict() -> Verdict:
            reply = endpoint.ask(question)
            try:
                score, why = read(reply.text)
            except ValueError as error:
                more = "; it was cut short: raise max_tokens" if endpoint.cut(reply) else ""
                raise ValueError(f"{error}{more}") from None
            return Verdict(
                score=score,
                why=why,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
            )

        return kept(key, verdict)

    def _paid(self, verdicts: Sequence[Verdict]) -> tuple[float | None, float | None]:
        """Tokens and money; None where the endpoint does not tell."""
        tokens, money = 0, 0.0
        for verdict in verdicts:
            if verdict.prompt_tokens is None or verdict.completion_tokens is None:
                return None, None
            tokens += verdict.prompt_tokens + verdict.completion_tokens
            money += verdict.prompt_tokens * self.price_in + verdict.completion_tokens * self.price_out
        return float(tokens), money / 1e6


def _outcome(future: Future[_Asked]) -> _Asked | Exception:
    error = future.exception()
    return error if isinstance(error, Exception) else future.result()


def _scores(asked: _Asked) -> Scores:
    """The figures that are known, in the order of `outputs`."""
    found = {
        "judge": asked.score,
        "judge_tokens": asked.tokens,
        "judge_money": asked.money,
        "judge_position_bias": asked.disagree,
    }
    return {name: value for name, value in found.items() if value is not None}


def _total(values: Sequence[float | None]) -> float | Exception:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ValueError(f"the endpoint does not say what {len(values) - len(known)} verdicts took")
    return sum(known)
