"""Modules of a model that compute what a compiled loop computes, which then takes their place.

A step of a few rows is otherwise a good many small operations: eight for a normalisation, ten for turning
queries and keys by their positions; for prompts they go through memory as often. A module is replaced where
its numbers are the loop's on a trial; attention where also its code is Llama's.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from serving.engines.attention import attend_by_rows, attention
from serving.engines.compiled import HALF, alike, kernels

_log = logging.getLogger(__name__)

#: What a layer of Llama's consists of.
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
#: Rows of a trial.
TRIAL_ROWS = 2
#: What modules read on trial: normalisations tell small numbers from what they add to the mean of squares.
_SPREADS = (3.0, 1.0, 1e-2, 1e-3)


@torch.inference_mode()
def replace_plain(base: Any) -> int:
    """Replace what can be replaced in a model that answers and is not trained any more, if loops can be had.

    Args:
        base: The transformers model.

    Returns:
        How many modules were.
    """
    if kernels(base) is None:
        return 0
    attends = attend_by_rows(base)
    count = 0
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            count += _replace(module, _norm, _norm_trial, base.dtype)
        elif {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys():
            count += _replace(module, _gated, _gated_trial, base.dtype)
        elif attends and {"q_proj", "k_proj", "v_proj", "o_proj"} <= module._modules.keys():
            kind: Any = type(module)
            count += is_llamas(kind, "LlamaAttention") and _replace(
                module, _attends, _attends_trial, base.dtype
            )
    return count


def _replace(
    module: Any, loop: Callable[..., Any], trial: Callable[[Any, torch.dtype], list[Any]], dtype: torch.dtype
) -> bool:
    """Let a loop answer for a module if it answers as the module does."""
    plain = module.forward
    answer = partial(loop, module, plain)
    try:
        same = all(alike(plain(*given), answer(*given)) for given in trial(module, dtype))
    except Exception as error:  # it only bears the names
        _log.debug("%s stays as it is: %s: %s", type(module).__name__, type(error).__name__, error)
        return False
    if same:
        module.forward = answer
    return same


def random(width: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """What rows read on trial, of shape (`TRIAL_ROWS`, 1, width), always the same."""
    some = torch.randn(TRIAL_ROWS, 1, width, generator=torch.Generator().manual_seed(1))
    return some.mul(spread).to(dtype)


def _takes(x: torch.Tensor) -> bool:
    """Whether a loop is quicker: it has one thread, which prompts keep waiting where torch has more."""
    return x.dtype in HALF and (x.shape[1] == 1 or torch.get_num_threads() == 1)


def _norm(module: Any, plain: Any, x: torch.Tensor) -> Any:
    dtype, width = x.dtype, x.shape[-1]
    if not _takes(x) or not x.is_contiguous() or module.weight.dtype is not dtype:
        return plain(x)
    from serving.engines import rowwise

    out = torch.empty_like(x)
    sizes = (x.numel() // width, width)
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    rowwise.norm(HALF[dtype])(x.data_ptr(), module.weight.data_ptr(), out.data_ptr(), sizes, epsilon)
    return out


def _norm_trial(module: Any, dtype: torch.dtype) -> list[Any]:
    width = len(module.weight)
    return [(random(width, dtype, s),) for s in _SPREADS]


def _gated(module: Any, plain: Any, x: torch.Tensor) -> Any:
    if not _takes(x):
        return plain(x)
    from serving.engines import rowwise

    gate, up = module.gate_proj(x), module.up_proj(x)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    rows, width = gate.shape[0] * gate.shape[1], gate.shape[2]
    sizes = (rows, width, _step(gate), _step(up))
    rowwise.gated(HALF[x.dtype])(gate.data_ptr(), up.data_ptr(), out.data_ptr(), sizes)
    return module.down_proj(out)


def _step(x: torch.Tensor) -> int:
    """From one token to the next in what a layer made, of shape (rows, tokens, width), in numbers."""
    return x.view(-1, x.shape[2]).stride(0)


def _gated_trial(module: Any, dtype: torch.dtype) -> list[Any]:
    width = module.down_proj.out_features
    return [(random(width, dtype, s),) for s in _SPREADS[:2]]


def _attends(
    module: Any,
    plain: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **more: Any,
) -> Any:
    x, turns = hidden_states, position_embeddings
    if turns is None or past_key_values is None or not _takes(x) or len(turns[0]) not in (1, len(x)):
        return plain(
            hidden_states=x, position_embeddings=turns, attention_mask=attention_mask,
            past_key_values=past_key_values, **more,
        )  # fmt: skip
    from serving.engines import rowwise

    turn, width = rowwise.turned(HALF[x.dtype]), module.head_dim
    rows, tokens, _ = x.shape
    cosines, sines = (t.expand(rows, tokens, -1).contiguous() if tokens > 1 else t for t in turns)
    by_row = [0 if tokens == len(t) == 1 else t.stride(-2) for t in (cosines, sines)]
    # What a layer makes is nobody else's: it is turned where it stands.
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    for some in (q, k):
        sizes = (rows * tokens, some.shape[2] // width, width, _step(some), *by_row)
        turn(some.data_ptr(), cosines.data_ptr(), sines.data_ptr(), sizes)
    q, k, v = (some.view(rows, tokens, -1, width).transpose(1, 2) for some in (q, k, v))
    keys, values = past_key_values.update(k, v, module.layer_idx)
    out, _ = attention(module, q, keys, values, attention_mask, scaling=module.scaling, **more)
    return module.o_proj(out.reshape(rows, tokens, -1)), None


def _attends_trial(module: Any, dtype: torch.dtype) -> list[Any]:
    width = module.o_proj.out_features
    angles = random(module.head_dim, torch.float32)
    turns = (angles.cos().to(dtype), angles.sin().to(dtype))
    return [(random(width, dtype), turns, None, Forgets())]


class Forgets:
    """Keys and values of nothing but the present token, and of one that is made up before."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Give both."""
        return torch.cat([keys.flip(-1), keys], dim=2), torch.cat([values.flip(-1), values], dim=2)


def norms_of(layer: Any) -> list[tuple[torch.Tensor, float]]:
    """Weights of the two normalisations of such a layer, and what each adds to the mean of squares."""
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return [(n.weight, float(getattr(n, "variance_epsilon", None) or n.eps)) for n in norms]


@cache
def is_llamas(kind: Any, name: str) -> bool:
    """Whether a module is written as one of Llama's, but for sliding windows, which masks say too."""
    from transformers.models.llama import modeling_llama

    try:
        return _meaning(kind) == _meaning(getattr(modeling_llama, name))
    except (OSError, SyntaxError):  # its source is not there
        return False


def _meaning(kind: Any) -> str:
    found = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]
    assert isinstance(found, ast.FunctionDef)
    for node in ast.walk(found):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg != "sliding_window"]
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(ast.Module([*found.args.args, *found.body], []))  # type: ignore[list-item]
