"""Small encoder models on the CPU, as texts are measured by: one way to load them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple


class Encoder(NamedTuple):
    """A tokenizer and its model, in float32 and evaluation mode, on the CPU: the same everywhere.

    `missing` are the weights that the files lack, and that transformers would make up at random. Hold
    `tokenizing` around each use of the tokenizer: one in Rust that is in use cannot be set up for another
    call.
    """

    tokenizer: Any
    model: Any
    missing: tuple[str, ...]
    tokenizing: threading.Lock


def load_encoder(auto: Any, folder: Path) -> Encoder:
    """Load safetensors with their tokenizer from a folder.

    Args:
        auto: The class of transformers to load by, such as `AutoModel`.
        folder: Where the files are.

    Raises:
        OSError: If files are missing.
        ValueError: If they are no such model.
    """
    import torch
    from transformers import AutoTokenizer

    with torch.random.fork_rng(devices=[]):  # training around this draws the same numbers as without
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loaded = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    return Encoder(tokenizer, model.eval(), tuple(sorted(loaded["missing_keys"])), threading.Lock())
