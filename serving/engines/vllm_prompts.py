"""Prompts with virtual tokens before them, as the embeddings that vLLM takes in a prompt's place."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from regraft.methods.base import DTypeName
from serving.engines.vllm_support import NotForVllmError

#: Families whose token embeddings go into the first layer as they lie in the file; others scale them.
_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


class VirtualTokens:
    """Trained embeddings, and the base's table for the tokens behind them.

    Args:
        folder: With PEFT's `adapter_model.safetensors` of prompt tuning or P-tuning.
        base: Folder of the base model.
        dtype: Type of the server's weights.

    Raises:
        NotForVllmError: If the base is of a family that does more to embeddings than look them up.
    """

    def __init__(self, folder: Path, base: Path, dtype: DTypeName) -> None:
        from safetensors.torch import load_file

        family = json.loads((base / "config.json").read_text()).get("model_type")
        if family not in _PLAIN:
            raise NotForVllmError(f"embeddings of {family} models have not been compared with vLLM's")
        self._dtype = getattr(torch, dtype)
        prompt = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        self._prompt = prompt.to(self._dtype)
        self._table = _embedding_table(base)

    @property
    def count(self) -> int:
        """Virtual tokens."""
        return len(self._prompt)

    def before(self, prompt_ids: Sequence[int]) -> str:
        """A prompt with the virtual tokens before it: a tensor, as `torch.save` writes it, in Base64."""
        rows = self._table[torch.tensor(prompt_ids, dtype=torch.long)].to(self._dtype)
        file = io.BytesIO()
        torch.save(torch.cat([self._prompt, rows]), file)
        return base64.b64encode(file.getvalue()).decode("ascii")


def _embedding_table(base: Path) -> torch.Tensor:
    from safetensors import safe_open

    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if key.endswith("embed_tokens.weight"):
                    found: Any = tensors.get_tensor(key)
                    return found  # type: ignore[no-any-return]
    raise NotForVllmError(f"no safetensors file of {base} holds embed_tokens.weight")
