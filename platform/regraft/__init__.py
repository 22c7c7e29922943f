"""Regraft: fine-tune language models continuously.

Importing this package loads neither torch nor ray; heavy imports happen where they are used.
"""

from importlib.metadata import PackageNotFoundError, version

from regraft.errors import RegraftError

try:
    __version__ = version("regraft")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["RegraftError", "__version__"]
