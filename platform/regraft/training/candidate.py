"""Scoring what was trained: answers, metrics and speed of one candidate, loaded as serving loads it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.config import EvaluateSection
from regraft.evals.evaluate import score_answers, versions, with_whole
from regraft.evals.generation import generate, measure_speed
from regraft.methods import Method
from regraft.methods.base import DTypeName
from regraft.models import prompt_ids
from regraft.records import EvalReport, Example, ExampleScore, Likelihood, Speed
from regraft.training.likelihood import reference_likelihoods, text_nats

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class BaseCache:
    """Clean base models of this process, by what they were loaded as; a reused trial actor keeps one.

    A base is taken out while a trial works on it and comes back only if the method can restore it, so a
    trial that dies half-way never leaves a changed base behind.
    """

    def __init__(self, keep: int = 1) -> None:
        self._keep = keep
        self._held: OrderedDict[tuple[str, ...], nn.Module] = OrderedDict()
        self._nats: dict[tuple[str, ...], dict[str, float]] = {}

    def take(self, method: Method, path: Path, dtype: DTypeName, device: str) -> nn.Module:
        """A clean base for `method`, from the cache or freshly loaded."""
        held = self._held.pop(self._key(method, path, dtype, device), None)
        return held if held is not None else method.load_base(path, dtype, device)

    def nats(
        self,
        base: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: EvaluateSection,
        method: Method,
        path: Path,
        dtype: DTypeName,
        device: str,
    ) -> dict[str, float]:
        """`nats_of_texts` of a clean base that was taken, asked once a process."""
        key = (*self._key(method, path, dtype, device), settings.asked)
        if key not in self._nats:
            self._nats[key] = nats_of_texts(base, tokenizer, settings)
        return self._nats[key]

    def give_back(
        self, base: nn.Module | None, method: Method, path: Path, dtype: DTypeName, device: str
    ) -> None:
        """Keep a base that is clean again; None is taken as 'it no longer is'."""
        if base is None:
            return
        self._held[self._key(method, path, dtype, device)] = base.eval()
        while len(self._held) > self._keep:
            self._held.popitem(last=False)

    @staticmethod
    def _key(method: Method, path: Path, dtype: str, device: str) -> tuple[str, ...]:
        quantisation = str(getattr(method, "quantise", None))
        return (str(path), dtype, device, quantisation)


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluateSection,
    *,
    dataset_id: str,
    split: str,
    known: Sequence[ExampleScore] = (),
    base_nats: Mapping[str, float] | None = None,
) -> EvalReport:
    """Answer and score examples.

    Args:
        model: Ready to answer.
        tokenizer: Its tokenizer.
        examples: What to ask.
        settings: How to answer and score.
        dataset_id: The dataset the examples are from.
        split: The evaluation set's name.
        known: Scores of the same candidate from before, by the same metrics; their examples are not asked
            again.
        base_nats: `nats_of_texts` of the untuned base; without it metrics that ask for it fail.
    """
    have = {s.example_id: s for s in known}
    asked = [e for e in examples if e.id not in have or have[e.id].reference != e.reference]
    outputs = generate(
        model,
        tokenizer,
        [prompt_ids(tokenizer, e.prompt) for e in asked],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    likelihoods: Sequence[Likelihood | None] = ()
    if any(metric.asks_likelihood for metric in settings.metrics):
        likelihoods = reference_likelihoods(model, tokenizer, asked, _device(model))
    texts = None
    if base_nats is not None:
        own = nats_of_texts(model, tokenizer, settings)
        texts = {name: (own[name], base_nats[name]) for name in own}
    fresh = score_answers(asked, outputs, settings.metrics, likelihoods)
    by_id = have | {s.example_id: s for s in fresh}
    report = EvalReport(
        dataset_id=dataset_id,
        split=split,
        metric_versions=versions(settings.metrics),
        examples=tuple(by_id[e.id].model_copy(update={"tags": e.tags}) for e in examples),
        asked=settings.asked,
    )
    return with_whole(report, settings.metrics, texts)


def nats_of_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: EvaluateSection
) -> dict[str, float]:
    """Mean negative log-probability of a token of each metric's own texts, by the metric's name.

    Of a base it is asked before an adapter lies on it.
    """
    device = _device(model)
    return {m.name: text_nats(model, tokenizer, m.texts, device) for m in settings.metrics if m.texts}


def speed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluateSection,
    threads: int,
) -> Speed:
    """Time a few answers, one by one."""
    prompts = [prompt_ids(tokenizer, e.prompt) for e in settings.timed(examples)]
    return measure_speed(model, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, threads=threads)


def _device(model: nn.Module) -> str:
    return str(next(model.parameters()).device)
