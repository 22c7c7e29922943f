"""Which versions vLLM answers as they were evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from regraft.methods import Method

#: What a server's versions are: the model alone, LoRA adapters, or embeddings before the prompt (beside
#: which the model alone may be asked too). vLLM 0.29 cannot mix the others. On a CPU a request without an
#: adapter in a batch with adapters is answered by one of them: its index is -1, which torch takes for the
#: last. And of an adapter beside embeddings the server dies: its embedding layer counts adapters for every
#: token of the batch and reads the ids of fewer.
Takes = Literal["plain", "lora", "embeddings"]

#: Settings of PEFT's LoRA that change what the adapter does and that vLLM 0.29 does not read.
_UNREAD = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "use_dora", "modules_to_save", "trainable_token_indices"),
    *("fan_in_fan_out", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora"),
)
_REASONS = {
    "dora": "vLLM refuses DoRA",
    "ia3": "vLLM knows no scales of activations",
    "prefix_tuning": "vLLM takes no keys and values from outside",
    "few_shot": "a control is not served",
}


class NotForVllmError(Exception):
    """This version cannot be answered by vLLM as it was evaluated; the message says why."""


def vllm_serves(method: Method) -> str | None:
    """Why a method's versions are not for vLLM; None if they are.

    What their files hold is looked at when they are loaded: `VllmEngine` may refuse still.
    """
    if method.quantised:
        return "its base is in four bits, which vLLM's CPU builds cannot hold and nobody has compared on CUDA"
    if method.name in _REASONS:
        return _REASONS[method.name]
    if method.remote:
        return "its model is behind an endpoint of its own"
    if method.support.plain_lora or method.name in {"full", "zero_shot", "prompt_tuning", "p_tuning"}:
        return None
    return "its files are not plain LoRA"


def vllm_takes(method: Method) -> Takes:
    """The server that a method's versions need."""
    if method.support.plain_lora:
        return "lora"
    return "embeddings" if method.kind == "adapter" else "plain"


def require_plain_lora(folder: Path, max_rank: int) -> None:
    """Refuse an adapter whose files say more than vLLM reads: it would answer otherwise, without a word.

    Args:
        folder: With PEFT's `adapter_config.json`.
        max_rank: That the server has room for.

    Raises:
        NotForVllmError: With the setting.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise NotForVllmError(f"its files are {config.get('peft_type')}, not LORA")
    unread = [name for name in _UNREAD if config.get(name)]
    if unread:
        raise NotForVllmError(f"its adapter_config.json has {', '.join(unread)}, which vLLM does not read")
    if config.get("bias", "none") != "none":
        raise NotForVllmError("it trains biases")
    if config["r"] > max_rank:
        raise NotForVllmError(f"its rank is {config['r']}, more than serve.vllm.max_lora_rank ({max_rank})")
