"""An endpoint as a control: asked over real HTTP, scored as the trained are, and never served."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from jobs.reference import markdown
from regraft import chat_client
from regraft.chat_client import ChatClient, NoAnswerError, Reply, endpoint_url
from regraft.config import EvaluateSection, Experiment, ModelSection, SweepSection
from regraft.data.dataset import evaluation_parts, make_dataset
from regraft.errors import ConfigError, ServiceError
from regraft.methods import parse_method
from regraft.records import Cost, EvalReport, Example, ExampleScore, Message, TrialResult
from regraft.selection.rank import rank
from regraft.selection.render import markdown as markdown_of
from regraft.selection.render import page
from regraft.selection.sweep_report import report_on
from regraft.training import trial as trials
from regraft.training.candidate import BaseCache
from regraft.training.spec import TrialSpec
from regraft.training.trial import run_trial
from regraft.tuning.plan import describe

KEY = "sk-not-to-be-seen-1234567890"


class Told(NamedTuple):
    """What the server does with one request: a status with headers and a body, or an answer."""

    status: int = 200
    text: str | None = "an answer"
    body: Any = None
    headers: dict[str, str] = {}
    reason: str = "stop"
    hang_up: bool = False


class Server(ThreadingHTTPServer):
    """Answers by `rule`, which gets the last turn's text and how often it was asked, from 1."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule: Callable[[str, int], Told] = lambda asked, times: Told()
        self.streams = True
        self.usage = True
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.times: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self) -> list[str]:
        """Of each plain request, its last turn."""
        return [b["messages"][-1]["content"] for b in self.bodies if not b.get("stream")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers.get("authorization"))
            self.server.times[question] += 1
            times = self.server.times[question]
        assert self.path == "/v1/chat/completions"
        told = self.server.rule(question, times)
        usage = {"prompt_tokens": 10, "completion_tokens": 5} if self.server.usage else None
        if told.hang_up:
            self.close_connection = True
            return
        if told.status != 200:
            said = told.body or {"error": {"message": f"refused, {self.headers.get('authorization')}"}}
            self.give(told.status, json.dumps(said), told.headers)
        elif body.get("stream") and self.server.streams:
            self.stream(told, usage)
        else:
            choice = {
                "message": {"role": "assistant", "content": told.text},
                "finish_reason": told.reason,
            }
            self.give(200, json.dumps(told.body or {"choices": [choice], "usage": usage}), {})

    def give(self, status: int, text: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        data = text.encode()
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, told: Told, usage: Any) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("connection", "close")
        self.end_headers()
        pieces = [{"role": "assistant", "content": ""}, *({"content": p} for p in str(told.text).split())]
        events: list[Any] = [{"choices": [{"delta": p, "finish_reason": None}]} for p in pieces]
        events.append({"choices": [{"delta": {}, "finish_reason": told.reason}]})
        events += [{"choices": [], "usage": usage}] if usage else []
        for event in [*map(json.dumps, events), "[DONE]"]:
            self.wfile.write(f": still here\n\ndata: {event}\n\n".encode())
            self.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    thread = threading.Thread(target=started.serve_forever, args=(0.01,))
    thread.start()
    yield started
    started.shutdown()
    thread.join()
    started.server_close()


def chat(question: str, answer: str) -> Example:
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Example(id=question, messages=turns)


DATASET = make_dataset(
    "d",
    {
        "train": [chat("When is it due?", "On the first.")],
        "evaluation": [chat(f"What is the code of district {i}?", f"Code {i * i}.") for i in range(16)],
    },
    sources={},
    leakage_jaccard=0.9,
)
EVALUATE = EvaluateSection.model_validate(
    {"metrics": [{"name": "exact_match"}, {"name": "token_f1"}], "max_new_tokens": 17, "latency_prompts": 3}
)
EXAMPLES = evaluation_parts(DATASET, EVALUATE.final_share).selection
REFERENCES = {e.prompt[-1].content: e.reference for e in EXAMPLES}


def spec(url: str, **fields: Any) -> TrialSpec:
    """A trial whose base model is nowhere: whatever tries to load it fails."""
    method = {"name": "endpoint", "url": url, "model": "gpt-x"} | fields
    return TrialSpec(
        sweep_id="s",
        sweep_run_id="r",
        experiment="e",
        tracking_uri="http://127.0.0.1:9",
        method=parse_method(method).model_dump(mode="json"),
        model=ModelSection(source="/no/such/model", device="cuda"),
        base_revision="none",
        dataset_id=DATASET.id,
        sweep=SweepSection.model_validate({"methods": [method]}),
        evaluate=EVALUATE,
    )


class Kept:
    """The run of a trial, with its records in memory."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.results: list[TrialResult] = []
        self.reports: list[dict[str, Any]] = []

    def __call__(self, uri: str, experiment: str) -> Kept:
        return self

    def start_trial(self, *_: Any, **what: Any) -> Kept:
        self.opened.append(what)
        return self

    def finish(self, result: TrialResult) -> TrialResult:
        self.results.append(result.model_copy(update={"run_id": "run-1"}))
        return self.results[-1]

    def run(self, asked: TrialSpec) -> TrialResult:
        run_trial(asked, DATASET, report=self.reports.append, bases=BaseCache())
        return self.results[-1]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept()
    monkeypatch.setattr(trials, "_tracker", found)
    return found


def test_it_is_asked_and_scored_as_the_trained_are_and_loads_nothing(server: Server, kept: Kept) -> None:
    right = {EXAMPLES[0].id, EXAMPLES[-1].id}
    server.rule = lambda asked, _: Told(text=REFERENCES[asked] if asked in right else "no idea")
    result = kept.run(spec(server.url, price_in=2.0, price_out=20.0))
    assert result.status == "completed"
    assert result.report is not None
    assert [e.example_id for e in result.report.examples] == [e.id for e in EXAMPLES]
    assert [e.scores["exact_match"] for e in result.report.examples] == [e.id in right for e in EXAMPLES]
    assert [e.tags["set"] for e in result.report.examples] == ["evaluation"] * len(EXAMPLES)
    assert result.report.metric_versions == {m.name: m.version for m in EVALUATE.metrics}
    assert result.report.failure_count == 0
    count = len(EXAMPLES)
    assert result.data == {
        "answer_prompt_tokens": 10 * count, "answer_completion_tokens": 5 * count,
        "answers_uncounted": 0, "answers_failed": 0,
    }  # fmt: skip
    assert result.cost.answer_money == pytest.approx(count * (10 * 2.0 + 5 * 20.0) / 1e6)
    assert (result.eval_loss, result.logged_model_id, result.curve) == (None, None, ())
    assert result.is_control
    plain = [b for b in server.bodies if not b.get("stream")]
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in plain} == {("gpt-x", 0, 17)}
    assert sorted(server.asked) == sorted(REFERENCES), "each once"
    assert server.keys == {None}
    (report,) = kept.reports
    assert report["status"] == "completed"
    assert report["eval_loss"] is None
    assert TrialResult.model_validate_json(report["record"]) == result
    assert report["figures"]["answer_money"] == result.cost.answer_money


def test_its_speed_is_of_streamed_answers_and_says_that_it_was_over_http(server: Server, kept: Kept) -> None:
    speed = kept.run(spec(server.url)).speed
    assert speed is not None
    assert 0 < speed.first_token_p50_ms < speed.latency_p50_ms <= speed.latency_p95_ms
    assert speed.how.startswith("3 prompts one by one over HTTP, streamed")
    streamed = [b for b in server.bodies if b.get("stream")]
    assert len(streamed) == 3


def test_tokens_are_the_endpoints_own_count_and_parts_where_it_has_none(server: Server, kept: Kept) -> None:
    with ChatClient(server.url, "m") as client:
        counted = client.ask(HELLO, max_tokens=4, stream=True)
        server.usage = False
        parts = client.ask(HELLO, max_tokens=4, stream=True)
    assert (counted.text, counted.completion_tokens, counted.pieces) == ("ananswer", 5, 2)
    assert (parts.completion_tokens, parts.pieces) == (None, 2)
    result = kept.run(spec(server.url, price_out=1.0))
    assert (result.data["answers_uncounted"], result.cost.answer_money) == (len(EXAMPLES), 0.0)
    assert result.speed is not None
    assert result.speed.tokens_per_second > 0


def test_an_endpoint_that_does_not_stream_is_scored_and_not_timed(
    server: Server, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    server.streams = False
    result = kept.run(spec(server.url))
    assert (result.status, result.speed) == ("completed", None)
    assert "not streamed" in caplog.text


def test_answers_come_side_by_side_and_stand_in_order(server: Server) -> None:
    together = threading.Barrier(
        3, timeout=30
    )  # broken, and answered with 400, where fewer are asked at once
    last = threading.Event()

    def rule(asked: str, _: int) -> Told:
        try:
            together.wait()
        except threading.BrokenBarrierError:
            return Told(status=400)
        if asked == "0":
            last.wait(30)
        else:
            last.set()
        return Told(text=f"to {asked}")

    server.rule = rule
    came: list[int] = []
    with ChatClient(server.url, "m") as client:
        found = client.ask_all(
            [[{"role": "user", "content": str(i)}] for i in range(6)],
            max_tokens=4, concurrency=3, came=lambda: came.append(threading.get_ident()),
        )  # fmt: skip
    assert [f.text for f in found if isinstance(f, Reply)] == [f"to {i}" for i in range(6)]
    assert came == [threading.get_ident()] * 6, "the watchdog listens to this thread alone"


HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "passing",
    [
        Told(status=429, headers={"retry-after": "0"}),
        Told(status=503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Told(hang_up=True),
    ],
    ids=["429", "503", "no connection"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_may_pass_is_tried_again(server: Server, passing: Told, stream: bool) -> None:
    server.rule = lambda _, times: passing if times < 3 else Told(text=" well \n")
    # A pause of its own would be 120 s long: where the endpoint says how long, that counts.
    pause = 0.0 if passing.hang_up else 1e9
    with ChatClient(server.url, "m", pause_seconds=pause) as client:
        assert client.ask(HELLO, max_tokens=4, stream=stream).text == "well"
    assert server.times["hello"] == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_any_other_refusal_is_final(server: Server, status: int) -> None:
    server.rule = lambda *_: Told(status=status, body={"detail": "so it is"})
    with ChatClient(server.url, "m") as client, pytest.raises(NoAnswerError) as caught:
        client.ask(HELLO, max_tokens=4)
    assert caught.value.problem == f"status {status}: so it is"
    assert not caught.value.away
    assert server.times["hello"] == 1


def test_tries_are_bounded_and_a_wait_too_long_is_not_waited(server: Server) -> None:
    server.rule = lambda *_: Told(status=500, body={"message": "broken"})
    with ChatClient(server.url, "m", tries=4, pause_seconds=0) as client:
        with pytest.raises(NoAnswerError, match="status 500: broken; tried 4 times"):
            client.ask(HELLO, max_tokens=4)
        assert server.times["hello"] == 4
        server.rule = lambda *_: Told(status=429, headers={"retry-after": "3600"})
        with pytest.raises(NoAnswerError, match="asks to wait 3600 s"):
            client.ask(HELLO, max_tokens=4)
        assert server.times["hello"] == 5
    server.server_close()
    with ChatClient(server.url, "m", tries=2, pause_seconds=0, timeout_seconds=0.2) as client:
        with pytest.raises(NoAnswerError, match=r"no answer: .*; tried 2 times") as caught:
            client.ask(HELLO, max_tokens=4)
        assert caught.value.away


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (Told(text=None), "has no text"),
        (Told(text="", reason="length"), "needs a higher evaluate.max_new_tokens"),
        (Told(body={"models": []}), "no chat completion"),
    ],
    ids=["none", "cut", "another form"],
)
def test_an_answer_without_text_is_none(server: Server, told: Told, why: str) -> None:
    with ChatClient(server.url, "m") as client:
        server.rule = lambda *_: told
        with pytest.raises(NoAnswerError, match=why):
            client.ask(HELLO, max_tokens=4)
        server.rule = lambda *_: Told(text="")
        assert client.ask(HELLO, max_tokens=4).text == "", "what ends of itself says nothing, and is scored"


def test_examples_without_an_answer_are_failures_with_their_reason_and_count_in_no_mean(
    server: Server, kept: Kept
) -> None:
    mute = EXAMPLES[1].id
    server.rule = lambda asked, _: Told(status=400) if asked == mute else Told(text=REFERENCES[asked])
    result = kept.run(spec(server.url))
    assert result.status == "completed"
    assert result.report is not None
    (missing,) = (e for e in result.report.examples if not e.scores)
    assert missing == result.report.examples[1]
    assert missing.failures == dict.fromkeys(
        ("exact_match", "token_f1"), "no answer: status 400: refused, None"
    )
    assert result.report.mean("exact_match") == 1.0
    assert result.data["answers_failed"] == 1


def test_a_trial_without_any_answer_fails_with_the_reason(server: Server, kept: Kept) -> None:
    server.rule = lambda *_: Told(status=400, body={"error": "no such model"})
    with pytest.raises(ServiceError, match=r"answered none of \d+ examples: status 400: no such model"):
        kept.run(spec(server.url))
    assert kept.results[-1].status == "failed"
    assert "no such model" in kept.results[-1].reason


def test_where_all_fail_alike_the_rest_is_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [[{"role": "user", "content": str(i)}] for i in range(40)]
    monkeypatch.setattr(chat_client, "GIVE_UP_AFTER", 5)
    with ChatClient(server.url, "m") as client:
        server.rule = lambda *_: Told(status=401)
        found = client.ask_all(chats, max_tokens=4, concurrency=1)
        assert len(server.asked) < 40
        assert isinstance(found[0], NoAnswerError)
        assert found[0].problem.startswith("status 401")
        assert "not asked" in str(found[-1])
        server.bodies.clear()
        server.rule = lambda *_: Told(status=400)  # of the request, and not of the endpoint
        client.ask_all(chats, max_tokens=4, concurrency=1)
        assert len(server.asked) == 40


def test_the_key_is_sent_and_seen_nowhere_else(
    server: Server, kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THE_KEY", KEY + "\n")  # as a file gives it
    caplog.set_level(logging.DEBUG)
    asked = spec(server.url, api_key_env="THE_KEY")
    kept.run(asked)
    assert server.keys == {f"Bearer {KEY}"}
    long = "x" * (chat_client._REASON_CHARACTERS - 30)
    server.rule = lambda *_: Told(status=401, body={"error": {"message": f"{long} wrong key {KEY}"}})
    with pytest.raises(ServiceError) as caught:
        kept.run(asked)
    assert "wrong key *" in caught.value.problem
    monkeypatch.setenv("THE_KEY", f"{KEY} and more")
    with pytest.raises(ServiceError) as spaced:
        kept.run(asked)
    seen = [caplog.text, str(caught.value), str(spaced.value), asked.model_dump_json()]
    seen += [str(kept.opened), str(kept.reports), *(r.model_dump_json() for r in kept.results)]
    assert len(seen) == 9
    assert not [text for text in seen if KEY[:12] in text]


def test_a_key_that_is_not_set_is_named_and_nobody_is_asked(
    server: Server, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(ServiceError, match="THE_KEY is not set where this trial runs"):
        kept.run(spec(server.url, api_key_env="THE_KEY"))
    assert kept.results[-1].status == "failed", "and is tried again when it is"
    assert not server.bodies


def test_neither_torch_nor_a_tokenizer_is_loaded(server: Server) -> None:
    code = f"""
import sys
from regraft.records import DatasetVersion
from regraft.training.attempt import Attempt
from regraft.training.candidate import BaseCache
from regraft.training.distributed import Workers
from regraft.training.spec import TrialSpec
spec, data = TrialSpec.model_validate_json({spec(server.url).model_dump_json()!r}), {DATASET.model_dump_json()!r}
dataset = DatasetVersion.model_validate_json(data)
result = Attempt(spec, dataset, None, print, BaseCache(), Workers()).go()
print(result.status, [m for m in ("torch", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "completed []\n"


def test_entries_are_told_apart_by_where_and_which() -> None:
    specs = [
        spec("https://a.example/v1"),
        spec("https://b.example/v1/"),
        spec("http://a.example/v1"),
        spec("https://a.example/v1", model="gpt-y"),
    ]
    assert [s.named for s in specs] == [
        "endpoint gpt-x at a.example/v1",
        "endpoint gpt-x at b.example/v1",
        "endpoint gpt-x at http://a.example/v1",
        "endpoint gpt-y at a.example/v1",
    ]
    assert len({s.key for s in specs}) == 4
    assert spec("https://a.example/v1/").key == specs[0].key
    assert specs[0].params["url"] == "https://a.example/v1"
    assert specs[0].params["model"] == "gpt-x"
    assert specs[0].params["learning_rate"] == 0.0


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1", "ftp://host/v1", "https:///v1", f"https://me:{KEY}@host/v1",
        f"https://host/v1?key={KEY}", "https://host/v1/chat/completions",
    ],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        endpoint_url(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (
            f"url: 'https://me:{KEY}@host/v1', model: m",
            "sweep.methods.0.url: holds a user name or a password",
        ),
        (f"url: 'https://host/v1', model: m, api_key_env: {KEY}", "sweep.methods.0.api_key_env"),
        ("url: 'https://host/v1'", "sweep.methods.0.model"),
    ],
    ids=["url", "key", "model"],
)
def test_a_mistake_in_the_file_is_named_without_what_it_holds(
    tmp_path: Path, fields: str, names: str
) -> None:
    (tmp_path / "regraft.yaml").write_text(
        "name: e\nmodel: {source: m}\ndata: {train: t, evaluation: e}\n"
        f"sweep:\n  methods:\n    - {{name: endpoint, {fields}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        Experiment.load(tmp_path)
    assert names in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_key_in_the_place_of_its_name_is_refused() -> None:
    with pytest.raises(ValidationError):
        parse_method({"name": "endpoint", "url": "http://h/v1", "model": "m", "api_key_env": "skAbc123"})


def test_the_plan_says_where_it_runs_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    entry = {"name": "endpoint", "url": "http://h/v1", "model": ["a", "b"], "api_key_env": "THE_KEY"}
    experiment = Experiment.model_validate(
        {
            "name": "e", "model": {"source": "m", "device": "cpu"},
            "data": {"train": "t", "evaluation": "e"},
            "sweep": {"methods": [entry], "gpus_per_trial": 1, "workers_per_trial": 2, "packing": True},
        }
    )  # fmt: skip
    rows = describe(experiment, Path("/no/such/base"), 1000)
    assert [tuple(row) for row in rows] == [
        (f"endpoint {m} at http://h/v1", "at its endpoint", "–", "–", "api_key_env: THE_KEY is not set here")
        for m in "ab"
    ]
    (method, _) = experiment.sweep.expanded()
    assert experiment.sweep.of(method).gpus_per_trial == 0, "it holds no GPU while it waits"


def test_the_reference_says_that_nothing_can_be_done_with_it_beside_comparing() -> None:
    (line,) = (row for row in markdown().splitlines() if row.startswith("| `endpoint` |"))
    assert set(line.split("|")[2:-1]) == {" – "}


def told(label: str, method: dict[str, Any], scores: list[float], **cost: float) -> TrialResult:
    examples = tuple(
        ExampleScore(
            example_id=str(i), prompt=f"q {i}", reference="r", output=f"{label} {i}", scores={"rougeL": score}
        )
        for i, score in enumerate(scores)
    )
    return TrialResult(
        key=label, sweep_id="s", run_id=f"run {label}", label=label, method=method, base_model="b",
        base_revision="v", dataset_id="d", status="completed", cost=Cost.model_validate(cost),
        report=EvalReport(dataset_id="d", split="evaluation", metric_versions={}, examples=examples),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("level", "words"),
    [
        (0.2, "It beats endpoint gpt-x by +0.300"),
        (0.49, "It is within noise of endpoint gpt-x"),
        (0.8, "It does not reach endpoint gpt-x: -0.300"),
    ],
)
def test_it_is_ranked_beside_the_others_never_wins_and_the_report_says_who_is_ahead(
    level: float, words: str
) -> None:
    noise = [0.05 * ((i * 7) % 5 - 2) for i in range(40)]
    found = [
        told("zero_shot", {"name": "zero_shot"}, [0.1 + n for n in noise]),
        told("lora", {"name": "lora"}, [0.5 - n for n in noise], train_seconds=9, memory_peak_gib=2),
        told("endpoint gpt-x", {"name": "endpoint"}, [level + n for n in noise], answer_money=0.25),
    ]
    board = rank(
        found, sweep_id="s", objective="rougeL", constraints=(), tie_break=None, level=0.95, resamples=200
    )
    rows = {row.label: row for row in board.rows}
    assert rows["endpoint gpt-x"].rank == (1 if level > 0.5 else 2)
    assert rows["endpoint gpt-x"].is_control
    assert board.winner_key == "lora"
    assert "the control zero_shot scores 0.100; the control endpoint gpt-x scores" in board.winner_reason
    assert rows["lora"].on_pareto_front, "whatever an endpoint costs is paid elsewhere"
    assert not rows["endpoint gpt-x"].on_pareto_front
    report = report_on(board, found, level=0.95, resamples=200)
    assert report.control is not None
    assert report.control.label == "zero_shot", "the base is what tuning is held against first"
    assert "it gains +0.400" in report.recommendation
    assert words in report.recommendation
    for text in (markdown_of(report), page(report)):
        assert "answers cost 0.25" in text
