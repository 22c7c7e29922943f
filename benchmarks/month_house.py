"""The house that the simulated month happens in: a model on real services, its users, and its reviewer.

MLflow, the Ray cluster and its jobs, the sweep, the champion's answers, captures, feedback, the monitor's
rounds and retrainings are the real ones. Simulated are the clock, who asks, who judges, who reviews, and how
long an answer took: the machine is busy with other things than these answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from month_traffic import JUNK, LEAKAGE, NEW, Ask, Day, Texts, asked

from jobs.check_drift import Watched, watch
from jobs.promotion import promote_winner
from jobs.references import captured
from jobs.review import reviewed, text_hash
from jobs.sweep import sweep
from jobs.workspace import Connection, Workspace, connected
from monitoring.schedule import settling
from regraft.cluster.jobs import client, follow
from regraft.config import Experiment
from regraft.data.chats import write_chats
from regraft.data.dataset import load_dataset
from regraft.data.feedback import FeedbackStore
from regraft.errors import RegraftError
from regraft.evals import Answer
from regraft.evals.rouge import Rouge
from regraft.records import CapturedExchange, DecisionOutcome, Example, Feedback, Message, ModelVersion
from regraft.tracking.ledger import Ledger

NAME = "month"
BEGIN = datetime(2026, 3, 2, tzinfo=UTC)
DAY = timedelta(days=1)
SESSIONS, MAX_TOKENS = 120, 40
#: Share of the answers that somebody judges, and how far a judgement is off at most.
JUDGED, NOISE = 0.4, 0.3
REFUSAL = "I'm sorry, but I can't help with that."
Say = Callable[[str], None]


class Lived(NamedTuple):
    """A day that is over: what was checked in it, and what became of its retrainings.

    `junk` counts what the reviewer had approved of an attack's when the day's decisions were made.
    """

    day: Day
    watched: list[Watched]
    outcomes: dict[str, DecisionOutcome]
    rouge: float
    junk: int


def settings(sessions: int) -> dict[str, Any]:
    """The experiment, as a user would write it for daily checks of little traffic on a laptop."""
    return {
        "name": NAME,
        "model": {"source": "bundled:smollm2-135m-instruct", "dtype": "bfloat16"},
        "data": {"train": "train.jsonl", "evaluation": "evaluation.jsonl", "leakage_jaccard": LEAKAGE},
        "sweep": {
            "methods": [{"name": "zero_shot"}, {"name": "lora", "rank": 16, "learning_rate": 2.0e-3}],
            "epochs": 1.5, "tokens_per_batch": 256, "evaluations": 1, "loss_examples": 16,
        },
        "evaluate": {
            "metrics": [{"name": "rouge"}, {"name": "form"}, {"name": "refusal"}],
            "max_new_tokens": MAX_TOKENS, "batch_size": 32, "latency_prompts": 1,
        },
        # Two cores that others use too: times are no reason to refuse anybody here.
        "select": {"maximise": "rougeL", "gate": {"at_most_times": {}}},
        "tracking": {"port": 0},
        "cluster": {"dashboard_port": 0, "num_cpus": 2},
        "monitor": {
            # One false alarm in a quarter: ninety daily checks.
            "every_seconds": DAY.total_seconds(), "arl": 90,
            "min_rows": 80, "reference_rows": round(2.25 * sessions),
        },
        "retrain": {
            "reviewed": "reviewed.jsonl", "evaluation": {NEW: "fresh_evaluation.jsonl"},
            "old_per_fresh": 4, "min_fresh": 20,
        },
    }  # fmt: skip


class House:
    """One model, from its first sweep on.

    Args:
        folder: Where all of it is kept.
        texts: Of the users, and of the experiment.
        experiment: The one in the folder.
        connection: Where things are.
        sessions: Questions a day.
        say: Where lines go.
    """

    def __init__(
        self,
        folder: Path,
        texts: Texts,
        experiment: Experiment,
        connection: Connection,
        sessions: int,
        say: Say,
    ) -> None:
        self.path, self.texts, self.experiment = folder / "regraft.yaml", texts, experiment
        self.connection, self.sessions, self.say = connection, sessions, say
        self.ledger = Ledger(connection.tracker(experiment))
        self.asks: dict[str, Ask] = {}
        self.reviews = {"kept": 0, "junk_drafts": 0, "junk_dropped": 0, "junk_approved": 0}
        self._loaded: tuple[ModelVersion, Any, Any, dict[str, list[int]]] | None = None
        self._read: set[str] = set()

    @property
    def champion(self) -> ModelVersion:
        """The version that answers now."""
        found = self.connection.registry.by_alias(NAME, "champion")
        if found is None:
            raise RegraftError("the month has no champion", "look at its sweep in MLflow")
        return found

    def found(self) -> ModelVersion:
        """The first sweep, and the champion that came of it."""
        dataset = load_dataset(NAME, self.experiment.data)
        board, results, _ = sweep(self.experiment, dataset, self.connection, self.say)
        version, decision = promote_winner(
            self.experiment, dataset, board, results, self.connection, self.say
        )
        self.say(f"{version.served_id}: {decision.outcome}: {decision.reason}")
        return self.champion

    def live(self, day: Day) -> Lived:
        """One day: questions and answers, the round at its end, a retraining if there is one, the review."""
        rouge = self._traffic(day)
        approved = sum(e.tags["topic"] == JUNK for e in reviewed(self.experiment))
        watched = self._watch(day)
        if self._watch(day):
            raise AssertionError(f"day {day.number} was checked twice")
        outcomes = {}
        for one in watched:
            job = one.decision.job_id
            if one.decision.action != "retrain" or job is None:
                continue
            assert self.connection.jobs_url is not None
            ended = follow(self.connection.jobs_url, job, lambda line: self.say(f"    {line}"))
            outcome = self.ledger.outcome(one.decision.id)
            if outcome is None:
                raise RegraftError(f"job {job} ended as {ended}, without an outcome", "see its log above")
            outcomes[one.decision.id] = outcome
        self._review(day)
        return Lived(day, watched, outcomes, rouge, approved)

    def runs_of(self, lived: Sequence[Lived]) -> tuple[int, int]:
        """How many retrainings were submitted as jobs, and how many more sweeps they ran than one each."""
        assert self.connection.jobs_url is not None
        jobs = [
            job for job in client(self.connection.jobs_url).list_jobs()
            if (job.submission_id or "").startswith("regraft-retrain-")
        ]  # fmt: skip
        decided = {w.decision.id for one in lived for w in one.watched if w.decision.action == "retrain"}
        tracker = self.connection.tracker(self.experiment)
        sweeps = [len(tracker.spent_on({"retrain_decision": name})) for name in decided]
        return len(jobs), len(jobs) - len({job.submission_id for job in jobs}) + sum(
            max(0, n - 1) for n in sweeps
        )

    def _watch(self, day: Day) -> list[Watched]:
        now = BEGIN + day.number * DAY + settling(self.experiment.serve)
        return watch(self.path, self.experiment, self.connection, now=now, act=True, say=self.say)

    def _traffic(self, day: Day) -> float:
        """Answer the day's questions by the present champion; their mean ROUGE-L against right answers."""
        champion, questions = self.champion, asked(day, self.texts.pools, self.sessions)
        draw = random.Random(f"answers of day {day.number}")
        store = captured(self.experiment, self.connection)
        folder = self.connection.captures(self.experiment)
        judgements = FeedbackStore(folder.with_name(f"{folder.name}-feedback"))
        scores = []
        for number, (ask, answer) in enumerate(zip(questions, self._answers(questions), strict=True)):
            output, tokens, reason = answer
            if draw.random() < day.fault:
                refused = draw.random() < 0.5
                output, tokens, reason = (REFUSAL, 12, "stop") if refused else (output[:12], 4, "length")
            name = f"day{day.number}-{number}"
            when = BEGIN + (day.number - 1) * DAY + number * DAY / len(questions)
            self.asks[name] = ask
            store.append(
                CapturedExchange(
                    id=name, created=_iso(when), model=NAME, model_version=champion.version,
                    messages=(Message(role="user", content=ask.prompt),), output=output, finish_reason=reason,
                    prompt_tokens=len(ask.prompt.split()), completion_tokens=tokens,
                    latency_ms=80 + 25 * tokens * draw.uniform(0.8, 1.3),
                )
            )  # fmt: skip
            if ask.reference is None:
                continue
            scores.append(float(Rouge().score(Answer(output, ask.reference))["rougeL"]))
            if draw.random() < JUDGED:
                felt = min(1.0, max(-1.0, 2 * scores[-1] - 1 + draw.uniform(-NOISE, NOISE)))
                judgements.append(
                    Feedback(
                        id=f"judgement-{name}", created=_iso(when + timedelta(minutes=5)), answer_id=name,
                        score=felt, reference=ask.reference,
                    )
                )  # fmt: skip
        store.close()
        judgements.close()
        return sum(scores) / len(scores)

    def _answers(self, questions: Sequence[Ask]) -> Iterator[tuple[str, int, str]]:
        """Text, tokens and finish reason of each answer."""
        from regraft.evals.generation import new_tokens
        from regraft.methods import parse_method
        from regraft.models import load_tokenizer, prompt_ids, resolve

        champion = self.champion
        if self._loaded is None or self._loaded[0] != champion:
            base = resolve(champion.base_model, champion.base_revision).path
            method = parse_method(champion.method)
            model = method.load(
                base, self.connection.registry.fetch(champion.logged_model_id),
                self.experiment.model.dtype, "cpu",
            )  # fmt: skip
            model.eval()
            self._loaded = champion, model, load_tokenizer(base), {}
        _, model, tokenizer, said = self._loaded
        # Greedy: the same question gets the same answer again.
        new = list(dict.fromkeys(ask.prompt for ask in questions if ask.prompt not in said))
        prompts = [prompt_ids(tokenizer, [Message(role="user", content=text)]) for text in new]
        found = new_tokens(model, tokenizer, prompts, max_new_tokens=MAX_TOKENS, batch_size=32)
        said |= zip(new, found, strict=True)
        for ask in questions:
            ids = said[ask.prompt]
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            yield text, len(ids), "length" if len(ids) >= MAX_TOKENS else "stop"

    def _review(self, day: Day) -> None:
        """What a person makes of the drafts: the right answer to what is genuine.

        Junk is dropped; on days of a credulous reviewer a share of it is approved as the model answered it.
        Once that is over, it is taken out again.
        """
        path = self.experiment.retrain.reviewed
        assert path is not None
        kept = list(reviewed(self.experiment))
        if not day.credulous:
            kept = [e for e in kept if e.tags["topic"] != JUNK]
        known = {text_hash(e) for e in kept}
        draw = random.Random(f"review of day {day.number}")
        for file in sorted((self.connection.workspace / "review" / NAME).glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                draft = json.loads(line)
                name = str(draft["id"])
                if name in self._read:
                    continue
                self._read.add(name)
                ask = self.asks[name]
                answer = ask.reference
                if answer is None:
                    self.reviews["junk_drafts"] += 1
                    answer = str(draft["messages"][-1]["content"])
                    if not answer or draw.random() >= day.credulous:
                        self.reviews["junk_dropped"] += 1
                        continue
                turns = (
                    Message(role="user", content=ask.prompt),
                    Message(role="assistant", content=answer),
                )
                example = Example(id=f"reviewed-{name}", messages=turns, tags={"topic": ask.topic})
                if text_hash(example) not in known:
                    known.add(text_hash(example))
                    kept.append(example)
                    self.reviews["junk_approved" if ask.topic == JUNK else "kept"] += 1
        write_chats(path, kept)


@contextmanager
def house(folder: Path, texts: Texts, sessions: int, say: Say) -> Iterator[House]:
    """A new house in a folder, with services of its own while open.

    Raises:
        RegraftError: If the folder holds one already.
    """
    if (folder / "regraft.yaml").exists():
        raise RegraftError(f"{folder} holds a month already", "name another --work, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder / "train.jsonl", texts.train)
    write_chats(folder / "evaluation.jsonl", texts.evaluation)
    write_chats(folder / "fresh_evaluation.jsonl", texts.fresh_evaluation)
    (folder / "regraft.yaml").write_text(yaml.safe_dump(settings(sessions), sort_keys=False))
    experiment = Experiment.load(folder / "regraft.yaml")
    with connected(experiment, Workspace(folder / "workspace"), say) as connection:
        yield House(folder, texts, experiment, connection, sessions, say)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")
