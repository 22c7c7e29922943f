"""Promises about the project itself rather than about what it computes."""

from __future__ import annotations

import importlib.machinery
import json
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from jobs.cli import app

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "ray", "mlflow", "evidently", "pandas")


def heavy_modules_after(code: str) -> list[str]:
    """Names of the heavy modules that a fresh process has loaded after `code`."""
    report = f"\nimport json, sys\nsys.stderr.write(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stderr)
    return found


def test_platform_is_still_the_module_of_the_standard_library() -> None:
    assert platform.__file__ is not None
    assert Path(platform.__file__).parent == Path(sysconfig.get_path("stdlib"))
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import regraft",
        "from regraft.config import Experiment",
        "import sys\nfrom jobs.cli import app\nsys.argv = ['regraft', '--help']\ntry: app()\nexcept SystemExit: pass",
    ],
    ids=["import regraft", "configuration", "regraft --help"],
)
def test_no_framework_is_loaded_before_it_is_used(code: str) -> None:
    assert heavy_modules_after(code) == []


def commands(command: click.Command, path: str = "regraft") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_command_and_all_its_parameters_have_help(name: str) -> None:
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("file", sorted(p.stem for p in (ROOT / "jobs").glob("*.py") if p.stem != "__init__"))
def test_script_in_jobs_shadows_no_library(file: str) -> None:
    # `python jobs/x.py` puts jobs/ first on the path.
    assert file not in sys.stdlib_module_names
    elsewhere = [
        p for p in sys.path if p and Path(p).resolve() not in (ROOT / "jobs", ROOT, ROOT / "platform")
    ]
    assert importlib.machinery.PathFinder.find_spec(file, elsewhere) is None
