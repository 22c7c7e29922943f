"""Prompts of one batch as a model reads them, with what their adapters put before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from serving.engines.adapters import Adapter


def put_together(base: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Pad prompts on the left, with soft prompts before them; prefixes of keys and values lie in the cache.

    Args:
        base: The transformers model.
        prompts: Token ids of each.
        adapters: Of each; of prefixes all have some or none.

    Returns:
        The model's inputs, as `regraft.evals.slots.Slots.read` takes them.
    """
    device = base.device
    virtual = [0 if a.prefix else a.virtual_tokens for a in adapters]
    lengths = [len(prompt) + v for prompt, v in zip(prompts, virtual, strict=True)]
    widest = max(lengths)
    ids = torch.zeros(len(prompts), widest, dtype=torch.long)
    mask = torch.zeros(len(prompts), widest, dtype=torch.long)
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        ids[index, widest - len(prompt) :] = torch.tensor(prompt)
        mask[index, widest - length :] = 1
    mask = mask.to(device)
    embeds = base.get_input_embeddings()(ids.to(device))
    for index, (adapter, length) in enumerate(zip(adapters, lengths, strict=True)):
        if adapter.embeddings is not None:
            start = widest - length
            embeds[index, start : start + virtual[index]] = adapter.embeddings
    cache = DynamicCache(config=base.config)
    before = max(len(a.prefix[0][0][0]) if a.prefix else 0 for a in adapters)
    if before:
        mask = torch.cat([_put_prefixes(cache, adapters, before, device), mask], dim=1)
    return {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": cache}


def _put_prefixes(cache: DynamicCache, adapters: Sequence[Adapter], before: int, device: Any) -> torch.Tensor:
    """Put prefixes into an empty cache, the shorter ones to the right; gives their mask."""
    shown = torch.zeros(len(adapters), before, dtype=torch.long, device=device)
    for number, layer in enumerate(cache.layers):
        pair = []
        for which in (0, 1):
            some = adapters[0].prefix[number][which]
            states = some.new_zeros(len(adapters), some.shape[0], before, some.shape[2])
            for index, adapter in enumerate(adapters):
                own = adapter.prefix[number][which]
                states[index, :, before - own.shape[1] :] = own
                shown[index, before - own.shape[1] :] = 1
            pair.append(states)
        layer.update(*pair)
    return shown
