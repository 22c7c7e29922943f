from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from regraft import models
from regraft.errors import ModelError
from regraft.models import Bundle, load_tokenizer, pick_device, prompt_ids, resolve
from regraft.records import Message

SHA = "ab" * 32


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model that is unpacked already."""
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path))
    monkeypatch.setattr(models, "BUNDLES", {"toy": Bundle("toy==1", SHA, "toy.gguf", "someone/toy")})
    models._verify.cache_clear()
    folder = tmp_path / "models" / f"toy-{SHA[:12]}"
    folder.mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / "regraft-manifest.json").write_text(json.dumps(manifest))
    return folder


def test_local_folder_is_used_where_it_lies(tiny_model: Path) -> None:
    found = resolve(str(tiny_model))
    assert found.path == tiny_model.resolve()
    assert found.revision.startswith("local-")
    assert resolve(str(tiny_model)) == found


def test_changed_weights_of_a_local_folder_are_another_revision(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    before = resolve(str(copy)).revision
    with (copy / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert resolve(str(copy)).revision != before


@pytest.mark.parametrize(
    "source", ["./no-such-model", "../no-such-model", "~/no-such-model", "/no/such/model"]
)
def test_missing_folder_is_an_error_and_never_asked_of_the_hub(source: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.source: no folder {source}") as caught:
        resolve(source)
    assert "config.json" in caught.value.mend


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_folder_without_weights_or_configuration_is_refused(
    tiny_model: Path, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    (tmp_path / "copy" / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ModelError, match=r"no config\.json with \*\.safetensors") as caught:
        resolve(str(tmp_path / "copy"))
    assert "save_pretrained" in caught.value.mend


def test_bundled_model_that_checks_out_is_used_without_a_download(bundle: Path) -> None:
    found = resolve("bundled:toy", say=pytest.fail)
    assert found == ("bundled:toy", f"bundled-{SHA[:12]}", bundle)


@pytest.mark.parametrize("damage", ["altered", "truncated", "removed"])
def test_damaged_bundled_model_is_refused_with_what_to_delete(bundle: Path, damage: str) -> None:
    weights = bundle / "model.safetensors"
    if damage == "removed":
        weights.unlink()
    else:
        weights.write_bytes(b"Weights" if damage == "altered" else b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or missing") as caught:
        resolve("bundled:toy")
    assert f"delete {bundle}" in caught.value.mend


def test_bundled_model_without_its_manifest_is_refused(bundle: Path) -> None:
    (bundle / "regraft-manifest.json").unlink()
    with pytest.raises(ModelError):
        resolve("bundled:toy")


def test_unknown_bundled_name_lists_those_there_are(bundle: Path) -> None:
    with pytest.raises(ModelError, match=r"no bundled model 'tyo'") as caught:
        resolve("bundled:tyo")
    assert "toy" in caught.value.mend


def test_tokenizer_without_a_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.jinja"):
        file.unlink()
    settings = tmp_path / "copy" / "tokenizer_config.json"
    raw = json.loads(settings.read_text())
    raw.pop("chat_template", None)
    settings.write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(tmp_path / "copy")


def test_prompt_ends_where_the_assistant_begins(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = prompt_ids(tokenizer, [Message(role="user", content="Hello")])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    with pytest.raises(ModelError, match="no CUDA device"):
        pick_device("cuda")
