"""Greedy answers to many prompts, the same as transformers' `generate` gives to each alone.

Models that `decode` understands are answered in a batch that is kept full, others in static batches sorted by
length through `generate`. Serving's static engine builds its batches by the same functions: what was
evaluated is what is served.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.records import Speed
from regraft.watchdog import alive

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def make_contiguous(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A forward pre-hook for the output embeddings.

    The last position of the hidden states is a strided slice, and a strided slice through a frozen bf16 head
    takes 5.3 s instead of 11 ms a step on CPU (torch 2.13).
    """
    return (args[0].contiguous(), *args[1:])


@contextmanager
def contiguous_head(model: nn.Module) -> Iterator[None]:
    """Keep `make_contiguous` on a model while open."""
    hook = model.get_output_embeddings().register_forward_pre_hook(make_contiguous)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


class SoftPrompt(NamedTuple):
    """What a prompt-learning adapter puts before the text: embeddings, or keys and values of every layer.

    `embeddings` has the shape (virtual tokens, hidden size), or is None; then `cache` makes the keys and
    values for a number of rows.
    """

    virtual_tokens: int
    embeddings: torch.Tensor | None
    cache: Callable[[int], Any]


def soft_prompt(model: Any) -> SoftPrompt | None:
    """The soft prompt of a PEFT model; None if it has none."""
    import torch

    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return None

    def prompt(rows: int) -> Any:
        with torch.inference_mode():
            return model.get_prompt(batch_size=rows)

    embeddings = None if config.peft_type == "PREFIX_TUNING" else prompt(1)[0].to(base_of(model).dtype)
    return SoftPrompt(config.num_virtual_tokens, embeddings, prompt)


def padded_inputs(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, soft: SoftPrompt | None
) -> tuple[Callable[..., torch.Tensor], dict[str, Any]]:
    """The function to call, and a left-padded batch for it.

    PEFT puts virtual tokens before the padding and drops the positions, so that in a padded batch they are
    further from the text than they were in training. Here positions follow from the mask and the base is
    asked: embeddings stand between padding and text; keys and values have no place of their own, and go
    before the padding, where `generate` wants them, with token ids in their place that it passes over.

    Args:
        model: A transformers or PEFT model.
        prompts: Token ids of each row.
        pad_id: Token id of the padding.
        soft: What `soft_prompt(model)` gave.
    """
    import torch

    base = base_of(model)
    virtual = soft.virtual_tokens if soft else 0
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), virtual + longest), pad_id)
    mask = torch.zeros((len(prompts), virtual + longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, virtual + longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, virtual + longest - len(prompt) :] = 1
    ids, mask = ids.to(base.device), mask.to(base.device)
    if soft is None:
        return model.generate, {"input_ids": ids, "attention_mask": mask}
    if soft.embeddings is None:
        mask[:, :virtual] = 1
        cache = soft.cache(len(prompts))
        return base.generate, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    embeds = base.get_input_embeddings()(ids)
    for row, prompt in enumerate(prompts):
        padding = longest - len(prompt)
        embeds[row, padding : padding + virtual] = soft.embeddings
        mask[row, padding:] = 1
    return base.generate, {"inputs_embeds": embeds, "attention_mask": mask}


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer: those of the model's generation configuration and the tokenizer's own."""
    own = base_of(model).generation_config.eos_token_id
    found = {own} if isinstance(own, int) else set(own or ())
    return frozenset(found | {int(tokenizer.eos_token_id)})


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Answer prompts greedily.

    Args:
        model: A transformers or PEFT model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Token ids, up to where the answer begins.
        max_new_tokens: Longest answer.
        batch_size: Most prompts answered together.
        progress: Called with how many are done.

    Returns:
        The answers, in the order of the prompts, without special tokens.
    """
    found = new_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in found]


def new_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """The token ids of each answer, up to and without what ends it; see `generate`."""
    import torch

    from regraft.evals.decode import decode
    from regraft.evals.slots import understands

    answers: list[list[int]] = [[] for _ in prompts]
    base, soft, pad = base_of(model), soft_prompt(model), int(tokenizer.pad_token_id)
    ends = end_ids(model, tokenizer)
    with torch.inference_mode(), contiguous_head(base):
        if understands(base):
            decoded = decode(
                base,
                [len(prompt) for prompt in prompts],
                lambda some: padded_inputs(model, [prompts[i] for i in some], pad, soft)[1],
                ends=ends,
                max_new_tokens=max_new_tokens,
                places=batch_size,
            )
            for done, (index, ids) in enumerate(decoded, start=1):
                answers[index] = ids
                progress(done)
            return answers
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            new = generate_batch(model, tokenizer, [prompts[i] for i in rows], max_new_tokens)
            for index, ids in zip(rows, new, strict=True):
                answers[index] = ids[:-1] if ids[-1] in ends else ids
            alive()
            progress(start + len(rows))
    return answers


def measure_speed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    threads: int,
) -> Speed:
    """Answer a few prompts one by one, after a short warm-up, and time them."""
    latencies: list[float] = []
    first: list[float] = []
    between: list[float] = []
    tokens, ends = 0, end_ids(model, tokenizer)
    with contiguous_head(base_of(model)):
        generate_batch(model, tokenizer, [prompts[0]], max_new_tokens=2)
        for prompt in prompts:
            clock = _Clock()
            started = time.perf_counter()
            (new,) = generate_batch(model, tokenizer, [prompt], max_new_tokens, streamer=clock)
            latencies.append((time.perf_counter() - started) * 1000)
            times = clock.times
            first.append((times[0] - started) * 1000)
            between += [(after - before) * 1000 for before, after in itertools.pairwise(times)]
            tokens += len(new) - (new[-1] in ends)
            alive()
    return Speed(
        latency_p50_ms=statistics.median(latencies),
        latency_p95_ms=p95(latencies),
        first_token_p50_ms=statistics.median(first),
        first_token_p95_ms=p95(first),
        token_p50_ms=statistics.median(between) if between else None,
        token_p95_ms=p95(between) if between else None,
        tokens_per_second=tokens / (sum(latencies) / 1000),
        how=(
            f"{len(prompts)} prompts one by one through transformers' generate after a warm-up, at most "
            f"{max_new_tokens} tokens each, {threads} threads, batch 1; token_p50_ms and token_p95_ms are "
            "over the times from each token to the next, which are not made into text."
        ),
    )


def p95(values: Sequence[float]) -> float:
    """The value that nineteen in twenty do not exceed, of those there are."""
    return sorted(values)[round(0.95 * (len(values) - 1))]


class _Clock:
    """A streamer that notes when each new token came, and does no more; the first `put` is the prompt."""

    def __init__(self) -> None:
        self._puts: list[float] = []

    def put(self, _: Any) -> None:
        self._puts.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def times(self) -> list[float]:
        return self._puts[1:]


def generate_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    streamer: Any = None,
) -> list[list[int]]:
    """Answer prompts greedily in one padded batch, through `generate`; see `contiguous_head`.

    Returns:
        New token ids of each answer, with the one that ended it if it came to that.
    """
    import torch

    pad, ends = int(tokenizer.pad_token_id), end_ids(model, tokenizer)
    with torch.inference_mode():
        call, inputs = padded_inputs(model, prompts, pad, soft_prompt(model))
        out = call(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            streamer=streamer,
        )
    # Asked with token ids `generate` gives the prompt back too; asked with embeddings, the new tokens alone.
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    answers = []
    for row in out[:, start:].tolist():
        end = next((n for n, token in enumerate(row, start=1) if token in ends), len(row))
        answers.append(row[:end])
    return answers
