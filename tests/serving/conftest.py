from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from regraft.errors import ModelError
from regraft.methods import METHODS_BY_NAME, parse_method
from regraft.records import ModelVersion, PromotionDecision

#: Every method with an adapter, by its name, and the base alone; where a small case tells more, its settings.
SETTINGS: dict[str, dict[str, object]] = {
    "base": {"name": "zero_shot"},
    **{name: {"name": name} for name, method in METHODS_BY_NAME.items() if method.kind == "adapter"},
    "lora": {"name": "lora", "rank": 4},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 5, "initial_text": None},
    "p_tuning": {"name": "p_tuning", "virtual_tokens": 6, "encoder_hidden_size": 16},
}


@pytest.fixture(scope="session")
def base_folder(tiny_model: Path) -> Path:
    """The tiny random model that all tests share."""
    return tiny_model


@pytest.fixture(scope="session")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For every kind a folder with an adapter whose weights are random, so that it changes the answers."""
    import torch

    folders = {}
    for kind, settings in SETTINGS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(5)
        method = parse_method(settings)
        model = method.apply(method.load_base(base_folder, "float32", "cpu"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        method.save(model, folders[kind])
    return folders


def version(
    number: int, base: Path | str = "base", settings: dict[str, object] | None = None
) -> ModelVersion:
    from regraft.models import resolve

    revision = resolve(str(base)).revision if isinstance(base, Path) else "r"
    return ModelVersion(
        name="support",
        version=number,
        logged_model_id=f"m-{number}",
        run_id=f"run-{number}",
        method=dict(settings or {"name": "zero_shot"}),
        base_model=str(base),
        base_revision=revision,
        dataset_id="d",
    )


class FakeRegistry:
    """The registry's methods that serving uses, in memory."""

    def __init__(self, *versions: ModelVersion, folders: dict[int, Path] | None = None) -> None:
        self.known = {v.version: v for v in versions}
        self.champion: int | None = None
        #: Aliases besides the champion's.
        self.named: dict[str, int] = {}
        self.down = False
        self.folders = folders or {}
        self.polled = threading.Event()
        self.decisions: dict[int, PromotionDecision] = {}

    def aliases(self, name: str) -> dict[str, int]:
        self._check()
        self.polled.set()
        assert name == "support"
        return {**self.named, **({} if self.champion is None else {"champion": self.champion})}

    def version(self, name: str, version: int) -> ModelVersion:
        self._check()
        if version not in self.known:
            raise ModelError(f"there is no version {version} of {name}")
        return self.known[version]

    def fetch(self, logged_model_id: str) -> Path:
        return self.folders.get(int(logged_model_id.removeprefix("m-")), Path("/nonexistent"))

    def judged(self, version: ModelVersion) -> PromotionDecision | None:
        return self.decisions.get(version.version)

    def _check(self) -> None:
        if self.down:
            raise ConnectionError("registry down")


@contextmanager
def served(app: object) -> Iterator[str]:
    """Run an application under a real uvicorn in a thread; gives its URL."""
    import uvicorn

    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            await super().startup(sockets)  # type: ignore[arg-type]
            started.set()

    server = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def method_settings() -> dict[str, dict[str, object]]:
    return SETTINGS


@pytest.fixture(scope="session")
def make_version() -> Callable[..., ModelVersion]:
    return version


@pytest.fixture(scope="session")
def make_registry() -> type[FakeRegistry]:
    return FakeRegistry


@pytest.fixture(scope="session")
def serve_app() -> Callable[[object], AbstractContextManager[str]]:
    return served
