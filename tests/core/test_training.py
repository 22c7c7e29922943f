from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from regraft.config import EvaluateSection, ModelSection, SweepSection
from regraft.data.dataset import make_dataset
from regraft.errors import DataError, InfeasibleTrialError, TrialMemoryError
from regraft.evals.generation import generate
from regraft.methods import FewShot, Full, LoRA, ZeroShot, parse_method
from regraft.methods.base import trainable_parameters
from regraft.models import load_tokenizer, prompt_ids, resolve
from regraft.records import Example, LossPoint, Message, TrialResult
from regraft.training import attempt
from regraft.training import loop as loops
from regraft.training import trial as trials
from regraft.training.batches import IGNORED, Encoded, bucket, collate
from regraft.training.candidate import BaseCache, score
from regraft.training.distributed import Workers
from regraft.training.encoding import encode
from regraft.training.loop import Layout, Outcome, evaluation_loss, train
from regraft.training.loss import supervised_positions_only
from regraft.training.memory import least_gib, require_memory
from regraft.training.spec import TrialSpec
from regraft.training.steps import LoopSettings, plan_steps, share_of_rate
from regraft.training.trial import run_trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, dict[str, object]] = {
    "base": {"name": "full"},
    "lora": {"name": "lora", "rank": 4},
    "prompt_tuning": {"name": "prompt_tuning", "virtual_tokens": 5, "initial_text": None},
    "p_tuning": {"name": "p_tuning", "virtual_tokens": 6, "encoder_hidden_size": 16},
}


def chat(*turns: str, key: str = "") -> Example:
    """User and assistant in turn; a first text that starts with `system:` is the system's."""
    roles = ["user", "assistant"] * len(turns)
    if turns[0].startswith("system:"):
        roles = ["system", *roles]
    messages = tuple(
        Message(role=r, content=t.removeprefix("system:"))  # type: ignore[arg-type]
        for r, t in zip(roles, turns, strict=False)
    )
    return Example(id=key or turns[0], messages=messages)


CHATS = [
    chat("When is the reading due?", "On the first of the month."),
    chat("Who pays for the repair of the line?", "We do."),
    chat("Hello", "How can I help you today?"),
    chat("How do you answer?", "Briefly.", "And else?", "Correctly."),
    chat("system:Be brief.", "Is a reading due?", "Yes."),
]


@pytest.fixture(scope="module")
def rows(tiny_tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    return [encode(tiny_tokenizer, c, 200) for c in CHATS]


def prepared(folder: Path, kind: str, *, std: float = 0.1) -> tuple[Any, Any]:
    """An fp32 base and the model around it, with random adapter weights that change the answers."""
    method = parse_method(SETTINGS[kind])
    base = method.load_base(folder, "float32", "cpu")
    torch.manual_seed(5)
    model = method.apply(base)
    if kind != "base":
        for parameter in trainable_parameters(model):
            torch.nn.init.normal_(parameter, std=std)
    return base, model


def gradients(model: Any) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in trainable_parameters(model) if p.grad is not None]
    model.zero_grad(set_to_none=True)
    assert found
    return found


def supervised_text(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


# Labels


def test_only_the_answer_and_its_end_of_turn_are_supervised(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode(tiny_tokenizer, chat("system:Be brief.", "Who pays?", "We do."), 200)
    assert supervised_text(tiny_tokenizer, row) == "We do.<|im_end|>"
    assert row.ids[-1] == tiny_tokenizer.eos_token_id  # not the template's newline after it
    assert row.supervised == sum(label != IGNORED for label in row.labels)
    for token, label in zip(row.ids, row.labels, strict=True):
        assert label in (IGNORED, token)


def test_every_assistant_turn_of_a_conversation_is_supervised(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = encode(tiny_tokenizer, chat("Who pays?", "We do.", "Really?", "Yes."), 200)
    assert supervised_text(tiny_tokenizer, row) == "We do.<|im_end|>Yes.<|im_end|>"


def test_what_is_trained_on_continues_the_prompt_that_is_asked(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = chat("Who pays?", "We do.", "Really?", "Yes.")
    row = encode(tiny_tokenizer, example, 200)
    asked = prompt_ids(tiny_tokenizer, example.prompt)
    assert list(row.ids[: len(asked)]) == asked
    assert row.labels[len(asked)] != IGNORED


def test_shown_examples_come_after_the_system_turn_and_are_not_supervised(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    shown = FewShot(shots=2).shown(CHATS)
    assert len(shown) >= 4
    assert shown == FewShot(shots=2).shown(CHATS) != FewShot(shots=2, shots_seed=1).shown(CHATS)
    example = chat("system:Be brief.", "Who pays?", "We do.", "Really?", "Yes.")
    assert example.after(shown).messages[0] == example.messages[0]
    own = len(encode(tiny_tokenizer, example, 200).ids)
    row = encode(tiny_tokenizer, example, own, shown)  # the limit is on the example's own length
    assert supervised_text(tiny_tokenizer, row) == "We do.<|im_end|>Yes.<|im_end|>"
    asked = prompt_ids(tiny_tokenizer, example.after(shown).prompt)
    assert list(row.ids[: len(asked)]) == asked
    assert shown[0].content in tiny_tokenizer.decode(asked)


def test_too_long_example_is_refused_naming_it_and_the_setting(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = chat("Who pays?", "We do.", key="q7")
    length = len(encode(tiny_tokenizer, example, 200).ids)
    assert len(encode(tiny_tokenizer, example, length).ids) == length
    with pytest.raises(
        DataError, match=rf"q7 has {length} tokens, more than sweep\.max_length = {length - 1}"
    ):
        encode(tiny_tokenizer, example, length - 1)


def test_template_that_rewrites_earlier_turns_is_refused(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    kept = "{% if not loop.last or m['role'] == 'user' %}{{ loop.length }}{% endif %}"
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "{{ m['role'] }}", kept + "{{ m['role'] }}"
    )
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(tokenizer, chat("Who pays?", "We do.", "Really?", "Yes."), 200)


# Batches


def fake(length: int, supervised: int = 1) -> Encoded:
    return Encoded(
        tuple(range(1, length + 1)), (IGNORED,) * (length - supervised) + (1,) * supervised
    )  # fmt: skip


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("budget", [64, 100, 1000])
def test_buckets_obey_the_token_budget_and_lose_nothing(seed: int | None, budget: int) -> None:
    draw = random.Random(3)
    examples = [fake(draw.randint(4, 64)) for _ in range(200)]
    groups = bucket(examples, budget, rng=None if seed is None else random.Random(seed))
    assert sorted(e for group in groups for e in group) == sorted(examples)
    assert all(groups)
    for group in groups:
        assert sum(len(e.ids) for e in group) <= budget
        assert len(group) * max(len(e.ids) for e in group) <= 1.25 * budget  # padded, where it has to be


def test_example_longer_than_the_budget_stands_alone() -> None:
    groups = bucket([fake(90), fake(10), fake(10)], 50, rng=None)
    assert sorted([len(e.ids) for e in group] for group in groups) == [[10, 10], [90]]


def test_no_two_epochs_see_the_same_batches() -> None:
    examples = [fake(length) for length in range(5, 60)]
    rng = random.Random(0)
    assert bucket(examples, 128, rng=rng) != bucket(examples, 128, rng=rng)


def test_padding_is_neither_attended_nor_supervised() -> None:
    batch = collate([fake(5, 2), fake(3, 1)], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels[1].tolist() == [IGNORED, IGNORED, 1, IGNORED, IGNORED]


# Loss


@pytest.mark.parametrize("special_head", [False, True], ids=["plain head", "special head"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_at_supervised_positions_has_the_value_and_gradient_of_the_full_one(
    tiny_model: Path, rows: list[Encoded], kind: str, special_head: bool
) -> None:
    base, model = prepared(tiny_model, kind)
    model.train()
    if special_head:
        base.config.logit_scale = 0.5  # the Llama ignores it; the loss must then use the model's own logits
    batch = collate(rows, 0)
    full = model(**batch.masked).loss * sum(row.supervised for row in rows)
    full.backward()
    expected = gradients(model)
    with supervised_positions_only(base):
        loss = model(**batch.masked).loss
        loss.backward()
    torch.testing.assert_close(loss, full, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_model_is_itself_again_after_the_loss(tiny_model: Path, rows: list[Encoded]) -> None:
    base, model = prepared(tiny_model, "lora")
    batch = collate(rows, 0)
    with torch.no_grad():
        before = model(**batch.masked)
        with pytest.raises(RuntimeError, match="stop"), supervised_positions_only(base):
            raise RuntimeError("stop")
        after = model(**batch.masked)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_loss_of_a_token_does_not_depend_on_how_rows_are_batched(
    tiny_model: Path, rows: list[Encoded]
) -> None:
    base, model = prepared(tiny_model, "lora")
    with supervised_positions_only(base):
        found = [
            evaluation_loss(model, rows, tokens_per_batch=budget, layout=Layout("cpu", 0))
            for budget in (1, 100, 10_000)
        ]
        one_by_one = [
            float(model(**collate([row], 0).masked).loss.detach()) for row in rows
        ]  # fmt: skip
    mean = sum(one_by_one) / sum(row.supervised for row in rows)
    assert found == pytest.approx([mean] * 3, rel=1e-5)


def test_one_step_over_all_rows_is_the_same_however_they_are_ordered(
    tiny_model: Path, rows: list[Encoded]
) -> None:
    weights = []
    for ordered in (rows, rows[::-1]):
        _, model, _ = loop(tiny_model, ordered, tokens_per_batch=10_000, epochs=1)
        weights.append([p.detach().clone() for p in trainable_parameters(model)])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5)


# The loop


def loop(
    folder: Path, rows: Sequence[Encoded], kind: str = "lora", **changes: Any
) -> tuple[Any, Any, Outcome]:
    settings = LoopSettings(
        **{"learning_rate": 5e-3, "epochs": 3, "tokens_per_batch": 128, "evaluations": 3} | changes
    )
    base, model = prepared(folder, kind, std=0.02)
    outcome = train(
        model, base, rows, rows, settings, pad_id=0, device="cpu", report=changes.get("report", lambda _: None)
    )  # fmt: skip
    return base, model, outcome


def test_micro_batches_of_a_step_weigh_as_their_tokens_and_give_the_step_of_one_batch(
    tiny_model: Path, rows: list[Encoded]
) -> None:
    weights, steps = [], []
    for budget, accumulate in ((10_000, 1), (1, len(rows)), (100, len(rows))):
        _, model, outcome = loop(
            tiny_model, rows, tokens_per_batch=budget, accumulate=accumulate, epochs=2, evaluations=1
        )
        weights.append([p.detach().clone() for p in trainable_parameters(model)])
        steps.append(outcome.points[-1].step)
    assert steps == [2, 2, 2]
    assert len({row.supervised for row in rows}) > 1  # or means of means would pass too
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_workers_share_every_step_and_agree_on_its_tokens(size: int, accumulate: int) -> None:
    examples = [fake(10, supervised=n) for n in range(1, 8)]
    settings = LoopSettings(1e-3, epochs=2, tokens_per_batch=10, accumulate=accumulate)
    plans = [plan_steps(examples, settings, Workers(rank, size)) for rank in range(size)]
    assert len({len(plan) for plan in plans}) == 1
    for step in zip(*plans, strict=True):
        assert len({len(s.groups) for s in step}) == 1
        supervised = sum(e.supervised for s in step for group in s.groups for e in group)
        assert {s.supervised for s in step} == {supervised}


@pytest.mark.parametrize("kind", SETTINGS)
def test_checkpointed_activations_change_memory_and_nothing_else(
    tiny_model: Path, rows: list[Encoded], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    _, _, plain = loop(tiny_model, rows, kind, learning_rate=1e-3)
    plainly = len(calls)
    base, _, outcome = loop(tiny_model, rows, kind, learning_rate=1e-3, gradient_checkpointing=True)
    assert len(calls) - plainly > plainly  # forwards were run again
    for a, b in zip(outcome.points, plain.points, strict=True):
        assert (a.train_loss, a.eval_loss) == pytest.approx((b.train_loss, b.eval_loss), rel=1e-4)
    assert not base.is_activation_checkpointing


def test_rates_rise_linearly_and_fall_as_the_schedule_says() -> None:
    linear, cosine, constant = (
        [share_of_rate(name, 20, 0.2, step) for step in range(21)]
        for name in ("linear", "cosine", "constant")
    )
    assert cosine[:5] == constant[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert constant[3:20] == [1.0] * 17
    assert cosine[12] == pytest.approx(0.5)  # half-way between warm-up and end
    assert linear[10] == 0.5
    for curve in (linear, cosine):
        assert curve[4:] == sorted(curve[4:], reverse=True)
        assert curve[19] < 0.1
    assert linear[20] == cosine[20] == constant[20] == 0.0


def test_weight_decay_shrinks_matrices_and_spares_vectors(tiny_model: Path, rows: list[Encoded]) -> None:
    found = {}
    for decay in (0.0, 0.5):
        _, model, _ = loop(
            tiny_model, rows, "base", learning_rate=1e-2, tokens_per_batch=10_000, epochs=1,
            evaluations=1, weight_decay=decay, schedule="constant", warmup_fraction=0.0,
        )  # fmt: skip
        found[decay] = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, free in found[0.0].items():
        if free.ndim > 1:
            assert found[0.5][name].norm() < free.norm()
        else:
            assert torch.equal(found[0.5][name], free)


def test_same_seed_gives_exactly_the_same_curve_and_another_seed_another(
    tiny_model: Path, rows: list[Encoded]
) -> None:
    first, again, other = (loop(tiny_model, rows, seed=seed)[2].points for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_points_are_evenly_spread_and_the_last_is_at_the_end(tiny_model: Path, rows: list[Encoded]) -> None:
    _, _, outcome = loop(tiny_model, rows, tokens_per_batch=1, epochs=4, evaluations=4)
    assert [p.step for p in outcome.points] == [5, 10, 15, 20]
    per_epoch = sum(len(row.ids) for row in rows)
    assert [p.tokens_seen for p in outcome.points] == [per_epoch * n for n in (1, 2, 3, 4)]
    assert outcome.tokens_seen == per_epoch * 4
    assert outcome.eval_loss == outcome.points[-1].eval_loss
    assert outcome.points[-1].train_loss < outcome.points[0].train_loss


def test_part_of_an_epoch_is_part_of_the_steps(tiny_model: Path, rows: list[Encoded]) -> None:
    _, _, outcome = loop(tiny_model, rows, tokens_per_batch=1, epochs=1.6, evaluations=1)
    assert outcome.points[-1].step == 8


def test_rate_warms_up_and_decays(tiny_model: Path, rows: list[Encoded]) -> None:
    _, _, outcome = loop(
        tiny_model, rows, tokens_per_batch=1, epochs=4, evaluations=20, learning_rate=1e-3, warmup_fraction=0.25
    )  # fmt: skip
    rates = [p.learning_rate for p in outcome.points]
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) <= 1e-3
    assert rates[-1] < 0.1e-3


def test_divergence_makes_the_trial_infeasible_with_the_step(tiny_model: Path, rows: list[Encoded]) -> None:
    with pytest.raises(InfeasibleTrialError, match=r"diverged: the loss is (nan|inf) at step \d+ of 15"):
        loop(tiny_model, rows, "base", learning_rate=1e30, tokens_per_batch=1)


def test_stop_from_outside_ends_training_and_leaves_the_base_as_it_was(
    tiny_model: Path, rows: list[Encoded]
) -> None:
    base, model = prepared(tiny_model, "lora")
    seen: list[LossPoint] = []

    def stop(point: LossPoint) -> None:
        seen.append(point)
        raise SystemExit

    settings = LoopSettings(1e-3, epochs=3, tokens_per_batch=128, evaluations=3)
    with pytest.raises(SystemExit):
        train(model, base, rows, rows, settings, pad_id=0, device="cpu", report=stop)
    assert len(seen) == 1
    assert "forward" not in vars(base)


# Answers


@pytest.mark.parametrize("kind", SETTINGS)
def test_answers_in_padded_batches_are_those_given_one_by_one(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    _, model = prepared(tiny_model, kind, std=0.3)
    model.eval()
    prompts = [prompt_ids(tiny_tokenizer, c.prompt) for c in CHATS]
    assert len({len(p) for p in prompts}) > 3
    done: list[int] = []

    def answers(order: Sequence[int], size: int) -> list[str]:
        return generate(
            model, tiny_tokenizer, [prompts[i] for i in order], max_new_tokens=12, batch_size=size,
            progress=done.append,
        )  # fmt: skip

    one_by_one = answers(range(5), 1)
    assert done == [1, 2, 3, 4, 5]
    assert len(set(one_by_one)) > 2
    assert answers(range(5), 5) == one_by_one
    assert answers(range(5), 2) == one_by_one
    assert answers([4, 2, 0], 3) == [one_by_one[i] for i in (4, 2, 0)]


def test_known_scores_are_not_asked_again(tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = ZeroShot().load(tiny_model, None, "float32", "cpu")
    ask = {"settings": EvaluateSection(max_new_tokens=4), "dataset_id": "d", "split": "e"}
    whole = score(model, tiny_tokenizer, CHATS, **ask)  # type: ignore[arg-type]
    marked = whole.examples[0].model_copy(update={"output": "kept from before"})
    again = score(model, tiny_tokenizer, CHATS, **ask, known=[marked])  # type: ignore[arg-type]
    assert [e.output for e in again.examples] == ["kept from before", *[e.output for e in whole.examples[1:]]]
    stale = marked.model_copy(update={"reference": "another"})
    assert score(model, tiny_tokenizer, CHATS, **ask, known=[stale]) == whole  # type: ignore[arg-type]


# Memory


def test_memory_bound_follows_the_weights_and_what_is_trained(tiny_model: Path) -> None:
    needs = [least_gib(m, tiny_model, "bfloat16") for m in (ZeroShot(), LoRA(), Full())]
    assert needs == sorted(needs)
    with pytest.raises(
        InfeasibleTrialError, match=r"full lr=0.0001 needs at least .*trial_memory_gib is 0\.1"
    ):
        require_memory(Full(), tiny_model, "bfloat16", "cpu", 0.1)


# A whole trial, with the records kept in memory


class FakeRun:
    run_id = "run-1"

    def __init__(self) -> None:
        self.curve: list[LossPoint] = []
        self.results: list[TrialResult] = []
        self.files: list[str] = []

    def log_curve(self, points: Sequence[LossPoint]) -> None:
        self.curve += points

    def log_adapter(self, folder: Path, **_: Any) -> str:
        self.files = sorted(p.name for p in folder.rglob("*"))
        return "m-1"

    def finish(self, result: TrialResult) -> TrialResult:
        self.results.append(result.model_copy(update={"run_id": self.run_id}))
        return self.results[-1]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    started: list[FakeRun] = []

    class FakeTracker:
        def __init__(self, uri: str, experiment: str) -> None: ...

        def start_trial(self, *_: Any, **__: Any) -> FakeRun:
            started.append(FakeRun())
            return started[-1]

    monkeypatch.setattr(trials, "_tracker", FakeTracker)
    return started


DATASET = make_dataset(
    "d", {"train": CHATS[:4], "evaluation": CHATS[4:]}, sources={}, leakage_jaccard=0.9
)  # fmt: skip


def spec(folder: Path, method: dict[str, Any], **sweep: Any) -> TrialSpec:
    return TrialSpec(
        sweep_id="s",
        sweep_run_id="r",
        experiment="e",
        tracking_uri="http://127.0.0.1:9",
        method=parse_method(method).model_dump(mode="json"),
        model=ModelSection(source=str(folder), dtype="float32", device="cpu"),
        base_revision=resolve(str(folder)).revision,
        dataset_id=DATASET.id,
        sweep=SweepSection.model_validate(
            {"methods": [method], "tokens_per_batch": 128, "evaluations": 2, "epochs": 2} | sweep
        ),
        evaluate=EvaluateSection(max_new_tokens=6, latency_prompts=1, final_share=0),
    )


LORA = {"name": "lora", "rank": 4, "learning_rate": 5e-3, "dropout": 0.1}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "zero_shot"},
        {"name": "few_shot", "shots": 2},
        LORA,
        {"name": "pissa", "rank": 2},
        {"name": "full"},
    ],
    ids=lambda m: m["name"],
)
def test_finished_trial_is_recorded_with_its_scores_and_what_it_trained(
    tiny_model: Path, runs: list[FakeRun], method: dict[str, Any]
) -> None:
    reports: list[dict[str, Any]] = []
    run_trial(spec(tiny_model, method), DATASET, report=reports.append, bases=BaseCache())
    (result,) = runs[0].results
    assert result.status == "completed"
    assert result.report is not None
    assert [e.tags["set"] for e in result.report.examples] == ["evaluation"]
    assert result.speed is None  # beside whatever else runs it would say nothing
    assert result.report.whole["general_nats"] > 0
    assert not result.report.failure_count
    assert result.eval_loss is not None
    trained = not method["name"].endswith("_shot")
    assert (result.logged_model_id == "m-1") == trained
    assert any(name.endswith(".safetensors") for name in runs[0].files) == trained
    assert (result.cost.adapter_bytes > 0) == trained
    assert (result.cost.energy_wh is not None) == bool(result.cost.energy_how) == trained
    assert ("energy_wh" in result.figures) == trained
    assert len(runs[0].curve) == (2 if trained else 0)
    assert result.data["packed"] == 1
    assert [r["status"] for r in reports] == [*["training"] * (2 if trained else 0), "completed"]


@pytest.mark.parametrize(
    ("method", "packing", "packed"),
    [
        ({"name": "lora", "rank": 4}, "auto", 1),
        ({"name": "lora", "rank": 4}, False, 0),
        ({"name": "prefix_tuning", "initial_text": None}, "auto", 0),
    ],
)
def test_examples_share_rows_where_method_and_sweep_let_them(
    tiny_model: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch, method: dict[str, Any],
    packing: Any, packed: int,
) -> None:  # fmt: skip
    seen: list[int] = []
    plain = loops.Layout.batch

    def noting(self: Any, group: Sequence[Encoded]) -> Any:
        made = plain(self, group)
        seen.append(len(made.lengths))
        return made

    monkeypatch.setattr(loops.Layout, "batch", noting)
    run_trial(spec(tiny_model, method, packing=packing), DATASET, report=lambda _: None, bases=BaseCache())
    assert runs[0].results[0].data["packed"] == packed
    assert seen
    assert all((lengths > 0) == bool(packed) for lengths in seen)


def test_trial_that_cannot_run_is_recorded_with_its_reason_and_never_raises(
    tiny_model: Path, runs: list[FakeRun]
) -> None:
    reports: list[dict[str, Any]] = []
    full = spec(tiny_model, {"name": "full", "learning_rate": 1e-2}, trial_memory_gib=0.1)
    run_trial(full, DATASET, report=reports.append, bases=BaseCache())
    (result,) = runs[0].results
    assert result.status == "infeasible"
    assert result.reason.startswith("memory: ")
    assert reports[-1]["status"] == "infeasible"
    assert math.isinf(reports[-1]["eval_loss"])
    assert TrialResult.model_validate_json(reports[-1]["record"]) == result


@pytest.mark.parametrize(
    ("settings", "smaller"),
    [({"tokens_per_batch": 512}, 256), ({"tokens_per_batch": 64}, 0)],
)
def test_trial_whose_memory_runs_out_says_with_what_it_may_fit_and_leaves_the_record_to_who_started_it(
    tiny_model: Path,
    runs: list[FakeRun],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    smaller: int,
) -> None:
    def exhausted(*_: Any, **__: Any) -> Outcome:
        raise MemoryError("no memory left")

    asked = spec(tiny_model, LORA, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(attempt, "train", exhausted)
        with pytest.raises(TrialMemoryError, match="out of memory: no memory left") as caught:
            run_trial(asked, DATASET, report=lambda _: None, bases=BaseCache())
    assert caught.value.smaller == smaller, "no smaller than the longest row"
    assert runs[0].results == []
    travelled = pickle.loads(pickle.dumps(caught.value))
    assert (travelled.problem, travelled.smaller) == (caught.value.problem, smaller)
    less = asked.with_less(smaller)
    assert (less is None) == (smaller == 0)
    if less is not None:
        assert less.key == asked.key
        assert less.with_less(smaller // 2) is None, "it is tried once"
        run_trial(less, DATASET, report=lambda _: None, bases=BaseCache())
        assert runs[1].results[0].data["micro_batch_tokens"] == 256


def test_trial_stopped_from_outside_has_told_what_it_cost_and_leaves_the_record_to_who_stopped_it(
    tiny_model: Path, runs: list[FakeRun]
) -> None:
    reports: list[dict[str, Any]] = []

    def stop(metrics: dict[str, Any]) -> None:
        reports.append(metrics)
        raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(spec(tiny_model, LORA), DATASET, report=stop, bases=BaseCache())
    assert runs[0].results == []
    (only,) = reports
    assert only["eval_loss"] > 0
    assert all(
        only["cost"][figure] > 0 for figure in ("trainable_parameters", "tokens_seen", "memory_peak_gib")
    )


def test_failed_trial_is_recorded_with_its_error_and_raised(
    tiny_model: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Outcome:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(attempt, "train", broken)
    with pytest.raises(ZeroDivisionError):
        run_trial(spec(tiny_model, LORA), DATASET, report=lambda _: None, bases=BaseCache())
    assert [(r.status, r.reason) for r in runs[0].results] == [("failed", "ZeroDivisionError: by zero")]


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the methods that load a base from disk."""
    loads: list[str] = []
    real = LoRA.load_base

    def load_base(self: LoRA, *args: Any) -> Any:
        loads.append(self.name)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LoRA, "load_base", load_base)
        yield loads


def test_reused_process_loads_its_base_once_and_never_reuses_one_left_by_a_failure(
    tiny_model: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = BaseCache()
    with counted(monkeypatch) as loads:
        for _ in range(2):
            run_trial(spec(tiny_model, LORA), DATASET, report=lambda _: None, bases=bases)
        assert loads == ["lora"]

        def stop(_: dict[str, Any]) -> None:
            raise SystemExit

        with pytest.raises(SystemExit):
            run_trial(spec(tiny_model, LORA), DATASET, report=stop, bases=bases)
        run_trial(spec(tiny_model, LORA), DATASET, report=lambda _: None, bases=bases)
        assert loads == ["lora", "lora"]


def test_trial_cut_short_goes_on_where_it_was_and_a_finished_one_keeps_nothing(
    tiny_model: Path, runs: list[FakeRun], tmp_path: Path
) -> None:
    wanted = spec(tiny_model, LORA, checkpoint_seconds=0).model_copy(update={"storage": str(tmp_path)})
    kept = tmp_path / "checkpoints" / wanted.key

    def lose_the_node(metrics: dict[str, Any]) -> None:
        if metrics["point"] == 2:
            raise ConnectionError("node lost")

    with pytest.raises(ConnectionError):
        run_trial(wanted, DATASET, report=lose_the_node, bases=BaseCache())
    assert kept.is_dir()
    reports: list[dict[str, Any]] = []
    run_trial(wanted, DATASET, report=reports.append, bases=BaseCache())
    assert [r["point"] for r in reports] == [1, 2, 3]
    assert not kept.exists()
    run_trial(spec(tiny_model, LORA), DATASET, report=lambda _: None, bases=BaseCache())
    lost, resumed, whole = runs
    assert lost.results[0].status == "failed"
    assert resumed.curve == whole.curve


def test_same_trial_gives_the_same_curve_whatever_the_process_did_before(
    tiny_model: Path, runs: list[FakeRun]
) -> None:
    for before in (0, 1):
        torch.manual_seed(before)
        run_trial(spec(tiny_model, LORA), DATASET, report=lambda _: None, bases=BaseCache())
    first, again = runs
    assert first.curve == again.curve


def test_key_of_a_trial_changes_with_what_decides_its_result_alone(tiny_model: Path) -> None:
    key = spec(tiny_model, LORA).key
    assert spec(tiny_model, LORA, max_concurrent=2, cpus_per_trial=2).key == key
    assert spec(tiny_model, LORA, seed=1).key != key
    assert spec(tiny_model, LORA, epochs=3).key != key
    assert spec(tiny_model, LORA | {"rank": 8}).key != key
    assert spec(tiny_model, LORA).model_copy(update={"dataset_id": "other"}).key != key
    assert spec(tiny_model, LORA).model_copy(update={"base_revision": "other"}).key != key
