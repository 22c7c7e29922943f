"""Whether examples may share a row: asked of the model itself, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.errors import InfeasibleTrialError
from regraft.training.batches import IGNORED, Encoded, pack
from regraft.training.kernels import fast_kernels

#: Largest difference of a token's hidden state, relative to its size. bf16 kernels differ by a few
#: hundredths; a token that sees into another example, if only by one, differs by its whole size.
_TOLERANCE = 0.25
_SHORT = 24
_FOUND: dict[tuple[str, str, str, bool], str | None] = {}


def require_packable(base: Any, examples: Sequence[Encoded], device: str) -> None:
    """Refuse rows of several examples for a model that sees from one into another.

    A row of three pieces of different lengths has to give what each piece gives by itself, under the
    model's own attention. Models whose layers carry a state along, or that do not take positions, do not
    pass.

    Args:
        base: The transformers model, before it is sharded.
        examples: Where the pieces are cut from.
        device: Where the model computes.

    Raises:
        InfeasibleTrialError: If the model does not take such a row, or gives something else for it.
    """
    window = _window(base.config)
    longest = max(len(e.ids) for e in examples)
    if window is not None and longest > window:
        raise InfeasibleTrialError(
            f"packing: this model attends within {window} tokens, and an example has {longest}",
            "set sweep.packing to false, or sweep.max_length to no more than the window",
        )
    if problem := _problem(base, examples, device, share=False):
        raise InfeasibleTrialError(f"packing: {problem}", "set sweep.packing to false")


def may_share(model: Any, base: Any, examples: Sequence[Encoded], device: str) -> bool:
    """Whether what the examples of a row begin with alike can stand there once.

    Only this project's attention on a CPU knows such rows. Dropout would be drawn once for all of them.
    """
    from torch import nn

    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    mine = device == "cpu" and base.config._attn_implementation == "sdpa"
    return mine and not drops and _problem(base, examples, device, share=True) is None


def _problem(base: Any, examples: Sequence[Encoded], device: str, *, share: bool) -> str | None:
    """What is wrong with rows of several examples for this model; None if nothing is.

    Of the kind of model, not of its weights: asked once a process.
    """
    kind = (type(base).__qualname__, base.config.to_json_string(), device, share)
    if kind not in _FOUND:
        _FOUND[kind] = _try(base, [token for e in examples[:8] for token in e.ids], device, share=share)
    return _FOUND[kind]


def _try(base: Any, source: list[int], device: str, *, share: bool) -> str | None:
    import torch

    begun, rest = (source * _SHORT)[:_SHORT], (source * _SHORT)[1:]
    # From the longest to the shortest; the first tokens of all are the same, those behind them differ.
    cuts = [(*begun[: _SHORT // 2], place, *rest[: _SHORT - place]) for place in (1, 7, 15)]
    rows = [Encoded(ids, (IGNORED,) * len(ids)) for ids in cuts]
    where = next(base.parameters()).device
    body, was_training = base.get_decoder(), base.training
    batch = pack(rows, share=share)
    inputs = {k: v.to(where) if hasattr(v, "to") else v for k, v in batch.inputs.items() if k != "labels"}
    base.eval()
    try:
        with torch.no_grad():
            apart = [
                body(input_ids=torch.tensor([r.ids], device=where), use_cache=False).last_hidden_state[0]
                for r in rows
            ]
            with fast_kernels(base, device, packed=True):
                together = body(**inputs, use_cache=False).last_hidden_state[0]
    except (TypeError, ValueError, RuntimeError) as error:
        return f"this model does not take rows of several examples: {str(error).splitlines()[0]}"
    finally:
        base.train(was_training)
    alone = torch.cat([apart[0][: batch.prefix], *(states[batch.prefix :] for states in apart)]).float()
    off = float(((together.float() - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    if off < _TOLERANCE:
        return None
    return f"this model gives other results for examples that share a row (off by {off:.0%})"


def _window(config: Any) -> int | None:
    text = config.get_text_config()
    found = getattr(text, "sliding_window", None)
    used = getattr(text, "use_sliding_window", True)
    return int(found) if found and used else None
