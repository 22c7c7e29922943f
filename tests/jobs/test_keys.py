"""`regraft keys` as a user types it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from regraft.errors import RegraftError
from serving.auth import Keyring

SECRET = re.compile(r"rg-[A-Za-z0-9_-]{43}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    experiment = {
        "name": "support",
        "model": {"source": "base"},
        "data": {"train": "train.jsonl", "evaluation": "evaluation.jsonl"},
        "sweep": {"methods": [{"name": "zero_shot"}]},
        "serve": {"keys": "secrets/keys.json"},
    }
    (tmp_path / "regraft.yaml").write_text(yaml.safe_dump(experiment))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_a_key_is_shown_once_listed_without_it_and_revoked(folder: Path) -> None:
    made = run(
        "create", str(folder), "--name", "shop", "--scopes", "feedback,use",
        "--requests-per-minute", "60", "--expires", "2100-01-31",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert SECRET.fullmatch(made.stdout.strip())  # alone, for a pipe
    ring = Keyring(folder / "secrets" / "keys.json")  # beside the YAML
    key = ring.find(made.stdout.strip())
    assert key is not None and key.expires is not None
    assert (key.name, key.scopes, key.limits.requests_per_minute) == ("shop", ("use", "feedback"), 60)
    assert key.limits.tokens_per_minute is None
    assert key.expires.isoformat() == "2100-01-31T00:00:00+00:00"
    assert key.id in made.stderr and not SECRET.search(made.stderr)
    for file in folder.rglob("*"):
        assert file.is_dir() or not SECRET.search(file.read_text())

    assert run("revoke", str(folder), key.id).exit_code == 0
    found = ring.find(made.stdout.strip())
    assert found is not None and found.revoked is not None
    listed = run("list", str(folder))
    assert listed.exit_code == 0
    assert not SECRET.search(listed.output) and key.sha256 not in listed.output
    with pytest.raises(RegraftError, match="is revoked since"):
        ring.revoke(key.id)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "--name", "a", "--scopes", "use,root"), "--scopes: 'use,root'"),
        (("create", "--name", "a", "--scopes", ","), "use, feedback, admin"),
        (("create", "--name", "a", "--expires", "2001-01-01"), "--expires: 2001-01-01"),
        (("create", "--name", ""), "name: "),
        (("create", "--name", "x" * 65), "name: "),
    ],
)
def test_a_wrong_value_is_named_and_makes_no_key(
    folder: Path, arguments: tuple[str, ...], words: str
) -> None:
    command, *rest = arguments
    done = run(command, str(folder), *rest)
    assert isinstance(done.exception, RegraftError)
    assert words in str(done.exception)
    assert not (folder / "secrets" / "keys.json").exists()


def test_a_key_pasted_for_its_id_is_not_repeated(folder: Path) -> None:
    secret = run("create", str(folder), "--name", "shop").stdout.strip()
    done = run("revoke", str(folder), "--", secret)
    assert isinstance(done.exception, RegraftError)
    assert secret not in str(done.exception) and "regraft keys list" in str(done.exception)
    unknown = run("revoke", str(folder), "00000000")
    assert "has no key 00000000" in str(unknown.exception)


def test_keys_need_their_place_in_the_yaml(folder: Path) -> None:
    file = folder / "regraft.yaml"
    file.write_text(file.read_text().replace("keys: secrets/keys.json", "port: 0"))
    assert "serve.keys: is not set" in str(run("list", str(folder)).exception)
