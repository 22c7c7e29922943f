"""Whether a version gives the same greedy answers however it is run: apart, merged, served, as evaluated.

Runs as `regraft parity PATH VERSION`; `check_parity` also runs in a Ray task.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from jobs.console import console, say
from jobs.workspace import Workspace, tracked
from regraft.config import Experiment
from regraft.data.dataset import load_dataset, union_of_evaluations
from regraft.errors import DataError
from regraft.methods.base import DTypeName
from regraft.models import home
from regraft.records import Example, ModelVersion, Parity, Probe

if TYPE_CHECKING:
    from serving.engines.base import Engine

#: Prompts asked if nobody says how many.
PROMPTS = 8
#: Answers kept for those who load the version, and how many tokens of each.
_PROBES, _PROBE_TOKENS = 3, 16
#: How long the engine may wait for the others of a batch; it stops waiting once all are there.
_GATHER_SECONDS = 10.0


def check_parity(
    version: ModelVersion,
    folder: Path,
    prompts: Sequence[Example],
    *,
    dtype: DTypeName,
    device: Literal["auto", "cpu", "cuda"],
    answers: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    limit: int = PROMPTS,
) -> Parity:
    """Ask a version the same in all the ways it may be run, and hold the answers against each other.

    What the adapter on its base answers, one prompt at a time, the others have to answer too: the serving
    engine and, where there is one, the merged model, each all prompts in one batch; and what evaluation
    recorded. One model is in memory at a time.

    Args:
        version: What to ask.
        folder: The files of its logged model.
        prompts: Examples to ask it, of which `limit` are taken, evenly spread.
        dtype: Type of the frozen weights.
        device: Where to hold them.
        answers: What evaluation recorded for each of `prompts`, as texts; None if there is nothing.
        max_new_tokens: Longest answer; as it was in evaluation, if `answers` are given.
        limit: Prompts to ask at most.

    Raises:
        DataError: If there are no prompts, or not an answer for each.
        ModelError: If the base model is not the one the version was trained on.
    """
    from regraft.methods import parse_method
    from regraft.models import load_tokenizer, pick_device, prompt_ids, resolve
    from regraft.training.parity import Answer, Prompt, compare, greedy_ids, tolerance_of

    if not prompts:
        raise DataError("parity: there is nothing to ask", "give a few examples of an evaluation set")
    if answers is not None and len(answers) != len(prompts):
        raise DataError(
            f"parity: {len(answers)} recorded answers for {len(prompts)} prompts", "give one each"
        )
    chosen = evenly(len(prompts), limit)
    examples = [prompts[i] for i in chosen]
    method = parse_method(version.method)
    base = resolve(version.base_model, version.base_revision).path
    tokenizer, place = load_tokenizer(base), pick_device(device)
    asked = [Prompt(prompt_ids(tokenizer, e.prompt), e.prompt[-1].content) for e in examples]
    others: dict[str, Sequence[Answer]] = {}
    left_out: dict[str, str] = {}

    others["served"] = _served(version, folder, examples, dtype, device, max_new_tokens)
    _free()
    merged = method.load_merged(base, folder, dtype, place)
    if merged is None:
        left_out["merged"] = f"{method.name} has nothing to merge"
    else:
        others["merged"] = greedy_ids(
            merged, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=len(asked)
        )
    del merged
    _free()
    if answers is None:
        left_out["recorded"] = "no recorded answers were given"
    else:
        others["recorded"] = [answers[i] for i in chosen]

    model = method.load(base, folder, dtype, place)
    expected = greedy_ids(model, tokenizer, asked, max_new_tokens=max_new_tokens)
    paths = {}
    for path, got in others.items():
        tolerance = tolerance_of(dtype, merged=path == "merged")
        paths[path] = compare(model, tokenizer, asked, expected, got, tolerance=tolerance)
    del model
    _free()
    known = zip(asked[:_PROBES], expected, strict=False)
    probes = tuple(Probe(prompt_ids=tuple(p.ids), answer_ids=ids[:_PROBE_TOKENS]) for p, ids in known)
    return Parity(version=version.served_id, paths=paths, left_out=left_out, probes=probes)


def evenly(count: int, most: int) -> list[int]:
    """At most so many indices of `count`, evenly spread."""
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def _served(
    version: ModelVersion,
    folder: Path,
    examples: Sequence[Example],
    dtype: DTypeName,
    device: Literal["auto", "cpu", "cuda"],
    max_new_tokens: int,
) -> list[str]:
    """What the serving engine answers, through its own encoding of the chats, in one batch."""
    import torch

    from serving.engines.base import EngineLimits
    from serving.loading import load_engine

    limits = EngineLimits(
        max_batch=len(examples), threads=torch.get_num_threads(), gather_seconds=_GATHER_SECONDS
    )
    engine = load_engine(version, folder, dtype=dtype, device=device, limits=limits)

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(_answer(engine, e, max_new_tokens) for e in examples))

    try:
        return asyncio.run(all_at_once())
    finally:
        engine.close()


async def _answer(engine: Engine, example: Example, max_new_tokens: int) -> str:
    from serving.engines.base import GenerationRequest, TextDelta

    request = GenerationRequest(tuple(engine.encode_chat(example.prompt)), max_new_tokens)
    async with aclosing(engine.submit(request)) as stream:
        return "".join([event.text async for event in stream if isinstance(event, TextDelta)])


def _free() -> None:
    """Give back what models that nobody holds any longer took."""
    import torch

    gc.collect()  # models refer to themselves
    torch.cuda.empty_cache()  # does nothing where there is no CUDA


def show_parity(parity: Parity) -> None:
    """Print what was compared, and where answers part."""
    table = Table(title=f"{parity.version}: the same answers as the adapter on its base?")
    for name in ("way", "prompts", "equal", "ties", "largest gap", "tolerance (nats)", ""):
        table.add_column(name, justify="left" if name in {"way", ""} else "right")
    for path, found in parity.paths.items():
        table.add_row(
            path,
            str(found.prompts),
            str(found.equal),
            str(found.ties),
            f"{found.largest_gap:.4f}",
            f"{found.tolerance:g}",
            "ok" if found.ok else f"{found.prompts - found.equal - found.ties} differ",
        )
    for path, why in parity.left_out.items():
        table.add_row(path, "–", "–", "–", "–", "–", why)
    Console(width=max(console.width, 100)).print(table)
    for path, found in parity.paths.items():
        for part in found.differences:
            word = "a tie" if part.tie else "differs"
            where = f"{path}, {word} at token {part.token} by {part.gap:.3f} nats: {part.prompt}"
            console.print(f"\n{where}", markup=False, style=None if part.tie else "bold")
            console.print(f"  adapter on base: {part.expected}", markup=False)
            console.print(f"  {path}: {part.got}", markup=False)


def run(path: Path, version: int, *, limit: int = PROMPTS) -> bool:
    """Check one version over the experiment's evaluation examples and print what came of it.

    Returns:
        Whether all ways answer alike.
    """
    from regraft.tracking.registry import Registry

    experiment = Experiment.load(path)
    examples = union_of_evaluations(load_dataset(experiment.name, experiment.data))
    workspace = Workspace()
    with tracked(experiment, workspace, say) as tracker:
        registry = Registry(workspace.tracking_uri(experiment), home() / "adapters")
        target = registry.version(experiment.name, version)
        folder = registry.fetch(target.logged_model_id)
        trial = tracker.result_of(target.run_id)
    recorded = {e.example_id: e for r in (trial.report, trial.final) if r for e in r.examples}
    known = [e for e in examples if e.id in recorded and recorded[e.id].reference == e.reference]
    say(f"asking {target.served_id} in all ways it may be run, at most {limit} prompts")
    parity = check_parity(
        target,
        folder,
        known or examples,
        dtype=experiment.model.dtype,
        device=experiment.model.device,
        answers=[recorded[e.id].output for e in known] or None,
        max_new_tokens=experiment.evaluate.max_new_tokens,
        limit=limit,
    )
    show_parity(parity)
    return parity.ok
