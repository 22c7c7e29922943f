"""Whether one model, run in different ways, gives the same greedy answers, but for ties that rounding breaks.

This module knows models, token ids and texts; not versions, files or engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from regraft.evals.generation import (
    base_of,
    contiguous_head,
    end_ids,
    generate_batch,
    padded_inputs,
    soft_prompt,
)
from regraft.methods.base import DTypeName
from regraft.records import AnswerDifference, PathParity

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

#: What passes for a tie, in nats. In fp32 nothing had to: every method's answers were equal to the token.
FP32_TOLERANCE = 1e-3
#: The same weights, added up in another order. A logit between 16 and 32 is a multiple of 0.125 in bf16: on
#: SmolLM2-135M a third of the answers of 32 tokens parted, at gaps of 0 to 0.25.
BF16_TOLERANCE = 0.5
#: Merged, the weights are rounded too, those out of four bits as well: gaps of 0 to 0.375. An update a
#: quarter too large gave gaps of up to 1.25; a tenth too large, it was within what bf16 rounds away.
BF16_MERGED_TOLERANCE = 0.75
#: Answers kept as evidence.
SHOWN = 3
#: Of tokens that may have come next, so many are looked at for one that a text goes on with.
_LOOKED_AT = 1000
#: So many tokens before a text parts from what was expected, it may have come from other tokens already.
_BACK = 8

#: A greedy answer: its new token ids, with the one that ended it; or its text alone, from who gives no more.
Answer: TypeAlias = tuple[int, ...] | str


class Prompt(NamedTuple):
    """What is asked: as token ids, up to where the answer begins, and as people read it."""

    ids: Sequence[int]
    text: str


def greedy_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 1,
) -> list[tuple[int, ...]]:
    """Answer prompts greedily, with the settings of evaluation.

    Args:
        model: A transformers or PEFT model in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: What to ask.
        max_new_tokens: Longest answer.
        batch_size: Prompts answered together; one by one nothing is padded.

    Returns:
        New token ids of each answer, with the token that ended it if it came to that.
    """
    answers: list[tuple[int, ...]] = []
    with contiguous_head(base_of(model)):
        for start in range(0, len(prompts), batch_size):
            asked = [p.ids for p in prompts[start : start + batch_size]]
            answers += map(tuple, generate_batch(model, tokenizer, asked, max_new_tokens))
    return answers


def log_probabilities(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities in nats of what comes next, as greedy decoding sees them; shape (vocabulary,)."""
    import torch

    pad = int(tokenizer.pad_token_id)
    with torch.inference_mode(), contiguous_head(base_of(model)):
        call, inputs = padded_inputs(model, [ids], pad, soft_prompt(model))
        settings = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "pad_token_id": pad}
        out: Any = call(**inputs, **settings, output_scores=True, return_dict_in_generate=True)
        return torch.log_softmax(out.scores[0][0].float(), dim=-1).cpu()


def compare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    expected: Sequence[tuple[int, ...]],
    got: Sequence[Answer],
    *,
    tolerance: float,
) -> PathParity:
    """Hold answers against those of a reference model.

    Two answers are equal if their token ids are, or their texts where only a text is known. Where they part
    they pass as a tie if the reference model finds both continuations equally likely within the tolerance;
    what comes after is another conversation and not compared.

    Args:
        model: The reference model.
        tokenizer: Its tokenizer.
        prompts: What was asked.
        expected: The reference model's answers, from `greedy_ids`.
        got: The answers to judge, of the same length at most.
        tolerance: Largest difference of log-probabilities that passes for a tie, in nats.
    """
    differences: list[AnswerDifference] = []
    read = _Reader(tokenizer, end_ids(model, tokenizer))
    for prompt, wanted, answer in zip(prompts, expected, got, strict=True):
        at = _parting(read, wanted, answer)
        if at is None:
            continue
        gap, token = min((_gap(model, read, prompt.ids, wanted, answer, n), n) for n in at)
        differences.append(
            AnswerDifference(
                prompt=prompt.text,
                expected=text_of(tokenizer, wanted),
                got=answer if isinstance(answer, str) else text_of(tokenizer, answer),
                token=token,
                gap=gap,
                tie=gap <= tolerance,
            )
        )
    ties = sum(d.tie for d in differences)
    return PathParity(
        prompts=len(prompts),
        equal=len(prompts) - len(differences),
        ties=ties,
        largest_gap=max((d.gap for d in differences), default=0.0),
        tolerance=tolerance,
        differences=tuple(sorted(differences, key=lambda d: d.tie)[:SHOWN]),
    )


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """An answer as evaluation keeps it: without special tokens and outer whitespace."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def tolerance_of(dtype: DTypeName, *, merged: bool = False) -> float:
    """How far apart two continuations may be and still pass for a tie, in nats."""
    if dtype == "float32":
        return FP32_TOLERANCE
    return BF16_MERGED_TOLERANCE if merged else BF16_TOLERANCE


class _Reader(NamedTuple):
    """Reads texts beside token ids."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    def along(self, ids: Sequence[int], text: str) -> bool:
        """Whether a text begins with what tokens say, or is that if they end the answer."""
        said = str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).lstrip()
        if ids[-1] in self.ends:
            return said.rstrip() == text
        whole = said.rstrip("\ufffd")
        # Less than a character's bytes: all that can be seen is whether a character of several comes next.
        return text.startswith(whole) and (whole == said or not text[len(whole) : len(whole) + 1].isascii())


def _parting(read: _Reader, wanted: tuple[int, ...], got: Answer) -> range | None:
    """Where two answers may part: indices of the first token that differs; None if they do not.

    Of a text that is not certain. ` 1` may be two tokens and ` the` one: both begin with a space, and yet it
    is the space where they part.
    """
    if not isinstance(got, str):
        if wanted == got:
            return None
        pairs = zip(wanted, got, strict=False)
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(got)))
        return range(at, at + 1)
    text = got.strip()
    if text_of(read.tokenizer, wanted) == text:
        return None
    last = next((n for n in range(len(wanted)) if not read.along(wanted[: n + 1], text)), len(wanted))
    return range(max(0, last - _BACK), last + 1)


def _gap(
    model: nn.Module, read: _Reader, prompt: Sequence[int], wanted: tuple[int, ...], got: Answer, at: int
) -> float:
    """How much likelier one continuation is than the other, in nats; infinite where only one goes on.

    Of a text the next token is the likeliest one that the text goes on with.
    """
    if at >= len(wanted) or (not isinstance(got, str) and at >= len(got)):
        return math.inf
    found = log_probabilities(model, read.tokenizer, [*prompt, *wanted[:at]])
    if not isinstance(got, str):
        return _apart(found, wanted[at], got[at])
    silent = set(read.tokenizer.all_special_ids) - read.ends
    for token in found.argsort(descending=True)[:_LOOKED_AT].tolist():
        other = token != wanted[at] and token not in silent
        if other and read.along((*wanted[:at], token), got.strip()):
            return _apart(found, wanted[at], token)
    return math.inf


def _apart(found: torch.Tensor, one: int, other: int) -> float:
    gap = abs(float(found[one] - found[other]))
    return gap if math.isfinite(gap) else math.inf
