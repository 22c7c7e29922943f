"""What an adapter does to its base, in a form in which rows of one batch may each have another.

Low-rank kinds add `(x A^T) B^T` to a layer's output; others scale a layer's inputs or outputs; soft prompts
stand before the text as embeddings, or as keys and values of every layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from regraft.methods.quantised import weight_of
from serving.engines.packed import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

Pair = tuple[torch.Tensor, torch.Tensor]
_PREFIX = "base_model.model."


class UnmixableError(Exception):
    """This adapter cannot share a batch with others; the message says why."""


class Adapter(NamedTuple):
    """An adapter's tensors, on the base's device, by the names of the base's layers.

    Those of layers are in fp32, as PEFT has them in evaluation; soft prompts are in the base's type.

    Attributes:
        low_rank: A of shape (rank, inputs), and B of shape (outputs, rank) with its scale in it.
        in_scale: Of shape (inputs).
        out_scale: Of shape (outputs), of the output with what low rank adds.
        out_shift: Of shape (outputs), added after that.
        embeddings: Of shape (virtual tokens, hidden size), or None.
        prefix: Keys and values of each layer, of shape (heads, virtual tokens, head width); or empty.
    """

    low_rank: Mapping[str, Pair] = {}
    in_scale: Mapping[str, torch.Tensor] = {}
    out_scale: Mapping[str, torch.Tensor] = {}
    out_shift: Mapping[str, torch.Tensor] = {}
    embeddings: torch.Tensor | None = None
    prefix: tuple[Pair, ...] = ()

    @property
    def virtual_tokens(self) -> int:
        """Positions that it takes before the text."""
        if self.prefix:
            return self.prefix[0][0].shape[1]
        return 0 if self.embeddings is None else len(self.embeddings)

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max((len(down) for down, _ in self.low_rank.values()), default=0)


def read_adapter(folder: Path, base: Any) -> Adapter:
    """Read a PEFT adapter for a base.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        base: The transformers model it was trained on.

    Raises:
        UnmixableError: If rows with other adapters cannot stand in a batch with it.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors", device=str(base.device))
    kind = config["peft_type"]
    if config.get("modules_to_save") or config.get("trainable_token_indices"):
        raise UnmixableError("it trains whole layers beside its adapter")
    if kind == "LORA":
        return _lora(config, tensors, base)
    if kind == "VERA":
        return _vera(config, tensors, base)
    if kind == "LOHA":
        return _loha(config, tensors, base)
    if kind == "IA3":
        return _ia3(config, tensors, base)
    if kind in {"PROMPT_TUNING", "P_TUNING"}:
        return Adapter(embeddings=tensors["prompt_embeddings"].to(base.dtype))
    if kind == "PREFIX_TUNING":
        return _prefix(tensors["prompt_embeddings"], base)
    raise UnmixableError(f"{kind} changes its layers in a way of its own")


def _by_layer(
    tensors: Mapping[str, torch.Tensor], base: Any, parts: Mapping[str, str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by layer and part; `parts` names what a key contains behind the layer's name."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, part = _split(key, parts)
        if layer is None:
            raise UnmixableError(f"{key} is no part that is known")
        if not isinstance(_linear(base, layer), nn.Linear | PackedLinear):
            raise UnmixableError(f"{layer} is no linear layer")
        found.setdefault(layer, {})[part] = tensor.float()
    return found


def _split(key: str, parts: Mapping[str, str]) -> tuple[str | None, str]:
    name = key.removeprefix(_PREFIX)
    for marker, part in parts.items():
        layer, found, _ = name.partition(f".{marker}")
        if found:
            return layer, part
    return None, ""


def _lora(config: dict[str, Any], tensors: dict[str, torch.Tensor], base: Any) -> Adapter:
    """LoRA with its kin; of DoRA the magnitudes as scales of the outputs (Liu et al., arXiv:2402.09353)."""
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("lora_bias"):
        raise UnmixableError("its layers have ranks, scales or biases of their own")
    parts = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}
    found = _by_layer(tensors, base, parts)
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    scale = config["lora_alpha"] / root
    low_rank, out_scale, out_shift = {}, {}, {}
    for layer, own in found.items():
        low_rank[layer] = (own["a"], own["b"] * scale)
        if config.get("use_dora"):
            module = _linear(base, layer)
            norm = torch.linalg.norm(weight_of(module).float() + scale * own["b"] @ own["a"], dim=1)
            magnitude = own["m"].flatten() / norm
            out_scale[layer] = magnitude
            if module.bias is not None:  # which is not scaled
                out_shift[layer] = (1 - magnitude) * module.bias.float()
    return Adapter(low_rank=low_rank, out_scale=out_scale, out_shift=out_shift)


def _vera(config: dict[str, Any], tensors: dict[str, torch.Tensor], base: Any) -> Adapter:
    """VeRA as low rank: a random pair that all layers share, made again from its seed, and trained scales."""
    from peft.tuners.vera.model import _kaiming_init

    parts = {"vera_lambda_b": "b", "vera_lambda_d": "d"}
    found = _by_layer({k: t for k, t in tensors.items() if "vera_lambda" in k}, base, parts)
    shapes = [_linear(base, layer) for layer in found]
    widest = (max(m.out_features for m in shapes), max(m.in_features for m in shapes))
    generator = torch.Generator(device="cpu").manual_seed(config["projection_prng_key"])
    # In PEFT's order: the draws follow one another.
    a = _kaiming_init((config["r"], widest[1]), generator=generator)
    b = _kaiming_init((widest[0], config["r"]), generator=generator)
    low_rank = {}
    for (layer, own), module in zip(found.items(), shapes, strict=True):
        down = a[:, : module.in_features].to(base.device) * own["d"][:, None]
        up = b[: module.out_features].to(base.device) * own["b"][:, None]
        low_rank[layer] = (down, up)
    return Adapter(low_rank=low_rank)


def _loha(config: dict[str, Any], tensors: dict[str, torch.Tensor], base: Any) -> Adapter:
    """LoHa as low rank: entries of two products of rank r, multiplied, are one of rank r², by rows."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UnmixableError("its layers have ranks or scales of their own")
    parts = {"hada_w1_a": "1a", "hada_w1_b": "1b", "hada_w2_a": "2a", "hada_w2_b": "2b"}
    scale = config["alpha"] / config["r"]
    low_rank = {}
    for layer, own in _by_layer(tensors, base, parts).items():
        up = torch.einsum("or,os->ors", own["1a"], own["2a"]).flatten(1) * scale
        down = torch.einsum("ri,si->rsi", own["1b"], own["2b"]).flatten(0, 1)
        low_rank[layer] = (down, up)
    return Adapter(low_rank=low_rank)


def _ia3(config: dict[str, Any], tensors: dict[str, torch.Tensor], base: Any) -> Adapter:
    """IA3: scales of outputs, and of the inputs of feed-forward layers."""
    inner = config.get("feedforward_modules") or []
    of_inputs: dict[str, torch.Tensor] = {}
    of_outputs: dict[str, torch.Tensor] = {}
    for layer, own in _by_layer(tensors, base, {"ia3_l": "l"}).items():
        is_inner = any(layer == name or layer.endswith(f".{name}") for name in inner)
        (of_inputs if is_inner else of_outputs)[layer] = own["l"].flatten()
    return Adapter(in_scale=of_inputs, out_scale=of_outputs)


def _prefix(rows: torch.Tensor, base: Any) -> Adapter:
    """Keys and values as PEFT lays them out: (virtual tokens, layers * 2 * heads * head width)."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    laid = rows.view(len(rows), config.num_hidden_layers * 2, heads, -1).permute(1, 2, 0, 3).to(base.dtype)
    return Adapter(prefix=tuple((laid[2 * i], laid[2 * i + 1]) for i in range(config.num_hidden_layers)))


def _linear(base: Any, name: str) -> Any:
    """A layer of the base, below what other adapters have put around it; None if there is none."""
    try:
        module = base.get_submodule(name)
    except AttributeError:
        return None
    return getattr(module, "inner", module)
