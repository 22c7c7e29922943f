"""However a version is run it gives the same greedy answers, and where it does not, the check says so.

A method that is added to the union is tried here without an edit.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import serving.loading
from jobs.cli import app
from jobs.parity import check_parity, evenly, show_parity
from regraft.config import Experiment
from regraft.errors import DataError, ModelError
from regraft.evals.generation import generate
from regraft.methods import METHOD_CLASSES, LoRA, Method, QLoRA, ZeroShot
from regraft.methods.base import DTypeName, trainable_parameters
from regraft.models import prompt_ids, resolve
from regraft.records import (
    EvalReport,
    Example,
    ExampleScore,
    Message,
    ModelVersion,
    Parity,
    PathParity,
    TrialResult,
)
from regraft.training.parity import (
    FP32_TOLERANCE,
    Prompt,
    compare,
    greedy_ids,
    log_probabilities,
    text_of,
    tolerance_of,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.usefixtures("one_thread", "small_heap")
TRAINED = [c for c in METHOD_CLASSES if c.kind != "control"]
IN_FOUR_BITS = [c for c in TRAINED if c.support.quantises]
NEW = 12
QUESTIONS = [
    "Hello",
    "When is the meter reading due?",
    "Ärger 😀",
    "Why, and how, and when: tell me all of it",
    "Who pays?",
]
EXAMPLES = [
    Example(id=q, messages=(Message(role="user", content=q), Message(role="assistant", content="So.")))
    for q in QUESTIONS
]


class Kept(NamedTuple):
    """A version with its files."""

    version: ModelVersion
    folder: Path
    method: Method


def plain(kind: type[Method], **settings: object) -> Method:
    text = {"initial_text": None} if "initial_text" in kind.model_fields else {}
    return kind.model_validate({"name": kind.model_fields["name"].default} | text | settings)


def keep(method: Method, base_folder: Path, folder: Path, *, seed: int = 5) -> Kept:
    """Save a method with random weights, so large that they show in every answer."""
    torch.manual_seed(seed)
    model = method.apply(method.load_base(base_folder, "float32", "cpu"))
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            if method.kind == "full":
                parameter.add_(0.05 * torch.randn_like(parameter))
            else:
                torch.nn.init.normal_(parameter, std=0.3)
    method.save(model, folder)
    version = ModelVersion(
        name="support",
        version=seed,
        logged_model_id="m",
        run_id="r",
        method=method.model_dump(mode="json"),
        base_model=str(base_folder),
        base_revision=resolve(str(base_folder)).revision,
        dataset_id="d",
    )
    return Kept(version, folder, method)


def check(kept: Kept, **more: Any) -> Parity:
    settings = {"dtype": "float32", "device": "cpu", "max_new_tokens": NEW} | more
    return check_parity(kept.version, kept.folder, EXAMPLES, **settings)


def recorded(kept: Kept, base: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What evaluation would keep."""
    prompts = [prompt_ids(tokenizer, e.prompt) for e in EXAMPLES]
    model = kept.method.load(base, kept.folder, "float32", "cpu")
    return generate(model, tokenizer, prompts, max_new_tokens=NEW, batch_size=3)


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """Keep what the libraries hold out of the check's own garbage collections: they take half its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return keep(LoRA(rank=4), tiny_model, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def answered(
    lora: Kept, tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, one_thread: None
) -> tuple[nn.Module, list[Prompt], list[tuple[int, ...]]]:
    model = lora.method.load(tiny_model, lora.folder, "float32", "cpu")
    prompts = [Prompt(prompt_ids(tiny_tokenizer, e.prompt), e.id) for e in EXAMPLES]
    return model, prompts, greedy_ids(model, tiny_tokenizer, prompts, max_new_tokens=NEW)


@pytest.mark.parametrize("kind", TRAINED, ids=lambda c: c.__name__)
def test_merged_served_and_recorded_answers_are_those_of_the_adapter_on_its_base(
    kind: type[Method], tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kept = keep(plain(kind), tiny_model, tmp_path)
    known = recorded(kept, tiny_model, tiny_tokenizer)
    base = Kept(kept.version, kept.folder, ZeroShot())
    assert not set(known) & set(recorded(base, tiny_model, tiny_tokenizer))  # or nothing is shown
    assert len(set(known)) > 2
    parity = check(kept, answers=known)
    assert parity.ok
    merges = kind.support.merges or (kept.method.quantised and kind.kind == "adapter")
    assert set(parity.paths) == {"served", "recorded"} | ({"merged"} if merges else set())
    assert ("merged" in parity.left_out) != merges
    for path, found in parity.paths.items():
        assert found.equal == found.prompts == len(EXAMPLES), path
        assert found.tolerance == FP32_TOLERANCE


@pytest.mark.parametrize("kind", IN_FOUR_BITS, ids=lambda c: c.__name__)
def test_on_a_base_in_four_bits_all_ways_answer_alike(
    kind: type[Method], tiny_model: Path, tmp_path: Path
) -> None:
    kept = keep(plain(kind, quantise="nf4"), tiny_model, tmp_path)
    parity = check(kept, limit=2)
    assert parity.ok
    assert ("merged" in parity.paths) == (kind.support.merges or kept.method.name == "qlora")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_is_plain_and_whole(dtype: DTypeName, tiny_model: Path, tmp_path: Path) -> None:
    kept = keep(QLoRA(rank=4), tiny_model, tmp_path)
    merged = kept.method.load_merged(tiny_model, tmp_path, dtype, "cpu")
    assert type(merged) is type(LoRA().load_base(tiny_model, dtype, "cpu"))
    assert not hasattr(merged, "peft_config")
    assert {type(m) for m in merged.modules() if "Linear" in type(m).__name__} == {torch.nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {getattr(torch, dtype)}
    assert not trainable_parameters(merged)
    assert not merged.training


# What the check has to see


def test_an_adapter_changed_after_its_evaluation_is_found_by_the_recorded_answers(
    lora: Kept, tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    known = recorded(lora, tiny_model, tiny_tokenizer)
    for file in lora.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    changed = {name: w * 1.2 if "lora_B" in name else w for name, w in weights.items()}
    save_file(changed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    parity = check(lora._replace(folder=tmp_path), answers=known)
    assert not parity.ok
    assert parity.paths["served"].ok
    assert parity.paths["merged"].ok
    found = parity.paths["recorded"]
    assert not found.ok
    first = found.differences[0]
    assert first.prompt in QUESTIONS
    assert first.got == known[QUESTIONS.index(first.prompt)] != first.expected
    assert first.gap > found.tolerance
    assert found.largest_gap >= first.gap


def test_a_model_merged_with_another_scale_is_found(lora: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoRA.load_merged

    def wrong(method: LoRA, base: Path, folder: Path, *how: Any) -> nn.Module | None:
        merged, clean = right(method, base, folder, *how), method.load_base(base, *how)
        assert merged is not None
        with torch.no_grad():
            for a, b in zip(merged.parameters(), clean.parameters(), strict=True):
                a.add_(0.1 * (a - b))  # the update, a tenth too large
        return merged

    monkeypatch.setattr(LoRA, "load_merged", wrong)
    parity = check(lora)
    assert not parity.ok
    assert parity.paths["served"].ok
    assert not parity.paths["merged"].ok
    assert parity.paths["merged"].differences[0].gap > FP32_TOLERANCE


def test_an_engine_that_serves_another_adapter_is_found(
    lora: Kept,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = keep(lora.method, tiny_model, tmp_path, seed=6)
    right = serving.loading.load_engine
    monkeypatch.setattr(
        serving.loading, "load_engine", lambda version, _, **how: right(version, other.folder, **how)
    )
    parity = check(lora)
    assert not parity.ok
    assert parity.paths["merged"].ok
    found = parity.paths["served"]
    assert found.equal + found.ties == 0
    assert len(found.differences) == 3
    show_parity(parity)
    shown = capsys.readouterr().out
    assert "5 differ" in shown
    assert f"served, differs at token {found.differences[0].token}" in shown


def test_only_types_that_round_are_given_room() -> None:
    assert tolerance_of("float32") == tolerance_of("float32", merged=True) == FP32_TOLERANCE
    assert FP32_TOLERANCE < tolerance_of("bfloat16") < tolerance_of("bfloat16", merged=True)


def test_a_version_in_bf16_is_checked_in_bf16(lora: Kept) -> None:
    parity = check(lora, dtype="bfloat16")
    assert parity.paths["served"].tolerance == tolerance_of("bfloat16")
    assert parity.paths["merged"].tolerance == tolerance_of("bfloat16", merged=True)
    assert parity.ok


def test_nothing_served_is_not_ok() -> None:
    same = PathParity(prompts=1, equal=1, ties=0, largest_gap=0, tolerance=0)
    assert Parity(version="m/1", paths={"served": same}).ok
    assert not Parity(version="m/1", paths={"merged": same}).ok


# Where answers part


def fork(
    tokenizer: PreTrainedTokenizerBase, model: nn.Module, prompt: Prompt, wanted: Sequence[int]
) -> tuple[int, int, float]:
    """A place in an answer, another token that might stand there and is plain text, and their gap in nats."""
    for at in range(2, len(wanted) - 2):
        found = log_probabilities(model, tokenizer, [*prompt.ids, *wanted[:at]])
        assert int(found.argmax()) == wanted[at]
        for token in found.argsort(descending=True)[1:4].tolist():
            if (
                tokenizer.decode([token]).isalpha()
                and tokenizer.decode(wanted[at - 1 : at + 1]).isprintable()
            ):
                return at, token, float(found[wanted[at]] - found[token])
    raise AssertionError("no place found: ask another question")


@pytest.mark.parametrize("known_by", ["ids", "text"])
def test_a_tie_is_what_the_reference_finds_equally_likely_within_the_tolerance(
    known_by: str,
    answered: tuple[nn.Module, list[Prompt], list[tuple[int, ...]]],
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    model, prompts, answers = answered
    index = 3
    at, token, gap = fork(tiny_tokenizer, model, prompts[index], answers[index])
    assert gap > 0.01
    # All that comes after is another conversation.
    other: Any = (*answers[index][:at], token, *answers[0])[:NEW]
    if known_by == "text":
        other = tiny_tokenizer.decode(other, skip_special_tokens=True)
    got = [*answers[:index], other, *answers[index + 1 :]]
    passed = compare(model, tiny_tokenizer, prompts, answers, got, tolerance=gap * 1.01)
    assert passed.ok
    assert (passed.equal, passed.ties) == (len(answers) - 1, 1)
    assert passed.differences[0].tie
    seen = passed.largest_gap
    refused = compare(model, tiny_tokenizer, prompts, answers, got, tolerance=seen * 0.99)
    assert not refused.ok
    assert (refused.equal, refused.ties) == (len(answers) - 1, 0)
    assert refused.largest_gap == seen
    first = refused.differences[0]
    assert first.prompt == QUESTIONS[index]
    if known_by == "ids":
        assert (first.token, seen) == (at, pytest.approx(gap, abs=1e-4))
    else:  # a text may have come about by other tokens: the gap is the least there may be
        assert first.token <= at
        assert seen <= gap + 1e-4


def test_an_answer_that_ends_earlier_or_goes_on_parts_at_the_token_that_ends_it(
    answered: tuple[nn.Module, list[Prompt], list[tuple[int, ...]]], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, prompts, answers = answered
    end = tiny_tokenizer.eos_token_id
    wanted, prompt = answers[0], prompts[:1]
    found = log_probabilities(model, tiny_tokenizer, [*prompt[0].ids, *wanted[:4]])
    gap = float(found[wanted[4]] - found[end])
    ended = (*wanted[:4], end)
    for one, other in ((wanted, ended), (ended, wanted)):
        apart = compare(model, tiny_tokenizer, prompt, [one], [other], tolerance=FP32_TOLERANCE)
        assert apart.differences[0].token == 4
        assert apart.largest_gap == pytest.approx(gap, abs=1e-4)
        assert not apart.ok
    # An answer that was cut off, and one that goes on: nothing was weighed that could be a tie.
    cut = compare(model, tiny_tokenizer, prompt, [wanted[:4]], [wanted], tolerance=1e9)
    assert not cut.ok
    again = PathParity.model_validate_json(cut.model_dump_json())
    assert again == cut
    assert again.largest_gap == float("inf")


def test_a_text_may_part_before_its_letters_do(
    answered: tuple[nn.Module, list[Prompt], list[tuple[int, ...]]], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    # A space of its own and a letter, beside a word that brings its space along: they part at the space.
    model, prompts, _ = answered
    ids: Callable[[str], list[int]] = tiny_tokenizer.convert_tokens_to_ids  # type: ignore[assignment]
    start, word = ids(["H", "i"]), ids(["Ġthe"])
    wanted = (*start, *ids(["Ġ", "q"]))
    found = log_probabilities(model, tiny_tokenizer, [*prompts[0].ids, *start])
    gap = abs(float(found[wanted[2]] - found[word[0]]))
    by_ids, by_text = (
        compare(model, tiny_tokenizer, prompts[:1], [wanted], [got], tolerance=1e-6)
        for got in ((*start, *word), text_of(tiny_tokenizer, (*start, *word)))
    )
    assert by_ids.largest_gap == pytest.approx(gap, abs=1e-4)
    assert by_text.largest_gap <= by_ids.largest_gap + 1e-4


# How it is run


def test_it_asks_a_few_prompts_evenly_spread_and_leaves_no_model_behind(lora: Kept) -> None:
    def models() -> int:
        gc.collect()
        return sum(type(o).__name__ == "LlamaForCausalLM" for o in gc.get_objects())

    before = models()
    assert check(lora, limit=2, max_new_tokens=2).paths["served"].prompts == 2
    assert models() == before
    assert evenly(84, 8) == [0, 10, 21, 31, 42, 52, 63, 73]
    assert evenly(3, 8) == [0, 1, 2]
    pickle.loads(pickle.dumps((check_parity, lora.version, lora.folder, EXAMPLES)))  # as a task's arguments


def test_bad_input_is_refused_with_what_to_do(lora: Kept) -> None:
    with pytest.raises(DataError, match="nothing to ask"):
        check_parity(lora.version, lora.folder, [], dtype="float32", device="cpu")
    with pytest.raises(DataError, match="1 recorded answers for 5 prompts"):
        check(lora, answers=["So."])
    moved = lora._replace(version=lora.version.model_copy(update={"base_revision": "another"}))
    with pytest.raises(ModelError, match="was trained on"):
        check(moved)


def test_the_command_reads_a_version_and_its_evaluation_from_the_registry(
    lora: Kept,
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    mlflow_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from regraft.data.chats import write_chats
    from regraft.data.dataset import load_dataset
    from regraft.tracking.registry import Registry
    from regraft.tracking.runs import Tracker

    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REGRAFT_WORKSPACE", str(tmp_path / "workspace"))
    turns = (Message(role="user", content="Where is the office?"), Message(role="assistant", content="Here."))
    write_chats(tmp_path / "data" / "train.jsonl", [Example(id="train", messages=turns)])
    write_chats(tmp_path / "data" / "evaluation.jsonl", EXAMPLES)
    settings = {
        "name": "read-by-parity",
        "model": {"source": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": {"train": "data/train.jsonl", "evaluation": "data/evaluation.jsonl"},
        "sweep": {"methods": [{"name": "lora", "rank": 4}]},
        "evaluate": {"max_new_tokens": NEW},
        "tracking": {"uri": mlflow_url},
    }
    (tmp_path / "regraft.yaml").write_text(yaml.safe_dump(settings))
    experiment = Experiment.load(tmp_path)
    dataset = load_dataset(experiment.name, experiment.data)
    tracker, registry = Tracker(mlflow_url, "read-by-parity"), Registry(mlflow_url, tmp_path / "cache")
    parent = tracker.start_sweep("s", params={}, dataset=dataset)
    known = recorded(lora, tiny_model, tiny_tokenizer)
    for key, outputs in (("right", known), ("wrong", [known[0], known[1], known[1], *known[3:]])):
        run = tracker.start_trial(parent, sweep_id="s", key=key, label=key, params={}, dataset=dataset)
        run.settle()
        scores = tuple(
            ExampleScore(example_id=e.id, prompt=e.id, reference=e.reference, output=o, scores={})
            for e, o in zip(EXAMPLES, outputs, strict=True)
        )
        report = EvalReport(dataset_id=dataset.id, split="evaluation", metric_versions={}, examples=scores)
        result = TrialResult(
            key=key,
            sweep_id="s",
            run_id=run.run_id,
            label=key,
            method=lora.version.method,
            base_model=lora.version.base_model,
            base_revision=lora.version.base_revision,
            dataset_id=dataset.id,
            status="completed",
            logged_model_id=run.log_adapter(lora.folder, name=key, params={}, step=1),
            report=report,
        )
        run.finish(result)
        registry.register("read-by-parity", result)
    right, wrong = (CliRunner().invoke(app, ["parity", str(tmp_path), v]) for v in ("1", "2"))
    assert right.exit_code == 0, right.output
    assert "read-by-parity/1" in right.output
    assert wrong.exit_code == 1
    assert "1 differ" in wrong.output
    assert "recorded, differs at token" in wrong.output
    assert QUESTIONS[2] in wrong.output
