"""A folder of versions on a file system or an object store, of which a pointer names the one that counts.

A version is written under a name of its own and the pointer set after it is whole: whatever happens in
between, the pointer names a whole version. This needs no renaming, which object stores do not have.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.errors import ConfigError

_POINTER = "latest.json"


class Versions:
    """Versions of one thing.

    Args:
        uri: A folder, or a URI as Ray takes it for its own storage: `s3://`, `gs://`, `hdfs://`, `file://`,
            with options such as `s3://bucket/path?endpoint_override=...` (pyarrow's).

    Raises:
        ConfigError: If the file system of the URI is unknown or its options are wrong.
    """

    def __init__(self, uri: str) -> None:
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem, LocalFileSystem

        self.uri = uri
        try:
            if "://" in uri:
                self._system, self._root = FileSystem.from_uri(uri)
            else:
                self._system, self._root = LocalFileSystem(), str(Path(uri).resolve())
        except (ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"cluster.storage: {uri}: {error}", "give a folder, or a URI that pyarrow's file systems know"
            ) from error
        self._local = isinstance(self._system, LocalFileSystem)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local folder for a version's files; when closed they are where they belong, not pointed at yet.

        Several processes may write to one version, each its own files.
        """
        if self._local:
            folder = Path(self._root, name)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="regraft-") as scratch:
            yield Path(scratch)
            self._copy(scratch, f"{self._root}/{name}", up=True)

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """A local folder with a version's files, while open."""
        if self._local:
            yield Path(self._root, name)
            return
        with tempfile.TemporaryDirectory(prefix="regraft-") as scratch:
            self._copy(f"{self._root}/{name}", scratch, up=False)
            yield Path(scratch)

    def point_to(self, name: str, about: dict[str, Any]) -> None:
        """Let a whole version count, with what is to be known of it, and delete the others."""
        text = json.dumps({"name": name, "about": about}).encode()
        if self._local:
            part = Path(self._root, f".{_POINTER}.part")
            part.write_bytes(text)
            part.replace(Path(self._root, _POINTER))
        else:
            with self._system.open_output_stream(f"{self._root}/{_POINTER}") as stream:
                stream.write(text)
        for other in self._names():
            if other != name:
                self._system.delete_dir(f"{self._root}/{other}")

    def latest(self) -> tuple[str, dict[str, Any]] | None:
        """The version that counts, and what is to be known of it; None if there is none."""
        try:
            with self._system.open_input_stream(f"{self._root}/{_POINTER}") as stream:
                found = json.loads(stream.read())
        except FileNotFoundError:
            return None
        return found["name"], found["about"]

    def clear(self) -> None:
        """Delete all of it."""
        if self._local:
            shutil.rmtree(self._root, ignore_errors=True)
            return
        try:
            self._system.delete_dir(self._root)
        except FileNotFoundError:
            return

    def _names(self) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        found = self._system.get_file_info(FileSelector(self._root, allow_not_found=True))
        return [info.base_name for info in found if info.type == FileType.Directory]

    def _copy(self, source: str, target: str, *, up: bool) -> None:
        from pyarrow.fs import LocalFileSystem, copy_files

        here, there = LocalFileSystem(), self._system
        copy_files(
            source,
            target,
            source_filesystem=here if up else there,
            destination_filesystem=there if up else here,
        )
