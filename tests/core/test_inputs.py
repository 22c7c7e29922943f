"""Bad input ends in a clear error or in a policy that is counted and said; never in silence."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from regraft.config import EvaluateSection, ModelSection, SweepSection
from regraft.data.dataset import make_dataset
from regraft.errors import DataError, InfeasibleTrialError, ModelError
from regraft.evals.generation import generate
from regraft.methods import IA3, METHOD_CLASSES, LoRA, parse_method
from regraft.methods.base import empty_causal_lm, trainable_parameters
from regraft.methods.tuner import TunerMethod
from regraft.models import embedding_rows, load_tokenizer, prompt_ids, resolve
from regraft.records import Example, LossPoint, Message, TrialResult
from regraft.training import encoding
from regraft.training import trial as trials
from regraft.training.batches import IGNORED, Encoded, collate
from regraft.training.candidate import BaseCache, score
from regraft.training.divergence import DivergenceWatch
from regraft.training.encoding import Limits, encode, encode_all, evenly
from regraft.training.loop import train
from regraft.training.loss import supervised_positions_only
from regraft.training.spec import TrialSpec
from regraft.training.steps import LoopSettings
from regraft.training.trial import run_trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

pytestmark = pytest.mark.usefixtures("one_thread")

#: The same texts as the fixture's template, with the answers marked: as some do, and with the newline inside.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_NEWLINE = MARKED.replace(
    "<|im_end|>{% endgeneration %}", "<|im_end|>{{ '\n' }}{% endgeneration %}"
).replace("{% endif %}{{ '\n' }}", "{{ '\n' }}{% endif %}")
WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
#: As Gemma 2's: no system turn, and strict turns.
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Leaves the system turn out without a word.
SILENT = GEMMA.replace("{{ raise_exception('System role not supported') }}", "").replace(
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}",
    "{% if m['role'] != 'system' %}",
).replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")  # fmt: skip
#: As Qwen 3's: what stands in a thought is taken out of earlier turns; marked, and not.
RETHINKS = MARKED.replace(
    "{{ m['content'] }}<|im_end|>{% endgeneration %}",
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>{% endgeneration %}",
)
UNMARKED_RETHINKS = RETHINKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chat(*turns: str, key: str = "") -> Example:
    """User and assistant in turn; a first text that starts with `system:` is the system's."""
    roles = ["user", "assistant"] * len(turns)
    if turns[0].startswith("system:"):
        roles = ["system", *roles]
    messages = [{"role": r, "content": t.removeprefix("system:")} for r, t in zip(roles, turns, strict=False)]
    return Example.model_validate({"id": key or turns[0], "messages": messages})


CHATS = [
    chat("When is the reading due?", "On the first of the month."),
    chat("Who pays for the repair?", "We do."),
    chat("How do you answer?", "Briefly.", "And else?", "Correctly."),
    chat("system:Be brief.", "Is a reading due?", "Yes.", "Really?", "It is."),
]


def with_template(folder: Path, template: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return tokenizer


def supervised_text(tokenizer: PreTrainedTokenizerBase, row: Encoded) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


# Too long


@pytest.fixture
def lengths(tiny_tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [len(encode(tiny_tokenizer, c, 999).ids) for c in CHATS]


def test_refusal_names_the_longest_examples_their_number_and_what_to_do(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = [chat("Who?", "We do. " * n, key=f"q{n}") for n in range(1, 12)]
    with pytest.raises(DataError) as caught:
        encode_all(tiny_tokenizer, examples, Limits(30), name="train")
    assert "train: 9 of 11 examples are longer than sweep.max_length = 30: q11 has " in caught.value.problem
    assert caught.value.problem.endswith(", and 4 more")
    assert "sweep.too_long" in caught.value.mend


def test_dropped_examples_are_counted_and_the_others_untouched(
    tiny_tokenizer: PreTrainedTokenizerBase, lengths: list[int]
) -> None:
    limit = sorted(lengths)[1]
    whole = encode_all(tiny_tokenizer, CHATS, Limits(999), name="train")
    found = encode_all(tiny_tokenizer, CHATS, Limits(limit, "drop"), name="train")
    assert found.rows == tuple(r for r in whole.rows if len(r.ids) <= limit)
    counts = found.counts
    assert (counts["kept"], counts["dropped"], counts["truncated"]) == (2, 2, 0)
    assert counts["longest"] == max(lengths)
    assert counts["tokens"] == sum(len(r.ids) for r in found.rows)
    assert "2 of 4 examples kept, 2 longer than sweep.max_length dropped" in found.summary
    assert f"longest {max(lengths)}" in found.summary


def test_truncation_cuts_the_end_of_the_answer_and_teaches_no_end_of_turn(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = chat("Who pays?", "We do, as we always do.")
    whole = encode(tiny_tokenizer, example, 999)
    found = encode_all(tiny_tokenizer, [example], Limits(len(whole.ids) - 3, "truncate"), name="train")
    (row,) = found.rows
    assert row == Encoded(whole.ids[:-3], whole.labels[:-3])
    assert tiny_tokenizer.eos_token_id not in row.labels
    assert found.counts["truncated"] == 1


def test_answer_that_is_all_cut_away_is_dropped_and_counted_apart(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    long = chat("Who pays for the repair of a very long line? " * 3, "We do.", key="long")
    prompt = len(prompt_ids(tiny_tokenizer, long.prompt))
    found = encode_all(tiny_tokenizer, [CHATS[0], long], Limits(prompt, "truncate"), name="train")
    assert len(found.rows) == 1
    assert (found.emptied, found.truncated, found.dropped) == (1, 0, 0)
    assert "1 dropped because nothing was left of the answer" in found.summary
    with pytest.raises(DataError, match=r"train: none of 1 examples is left .* = truncate"):
        encode_all(tiny_tokenizer, [long], Limits(prompt, "truncate"), name="train")


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_shown_examples_do_not_count_against_the_limit(
    tiny_tokenizer: PreTrainedTokenizerBase, policy: Any
) -> None:
    shown = CHATS[2].messages
    example = chat("Who pays?", "We do, as always.")
    own = len(encode(tiny_tokenizer, example, 999).ids)
    whole = encode(tiny_tokenizer, example, 999, shown)
    found = encode_all(tiny_tokenizer, [example], Limits(own, policy), shown, name="e")
    assert found.rows == (whole,)
    if policy == "truncate":
        (row,) = encode_all(tiny_tokenizer, [example], Limits(own - 2, policy), shown, name="e").rows
        assert row.ids == whole.ids[:-2]


@pytest.mark.parametrize("policy", ["refuse", "drop", "truncate"])
def test_set_without_examples_is_refused_whatever_the_policy(
    tiny_tokenizer: PreTrainedTokenizerBase, policy: Any
) -> None:
    with pytest.raises(DataError, match="train: none of 0 examples"):
        encode_all(tiny_tokenizer, [], Limits(100, policy), name="train")


def test_all_dropped_is_refused_with_the_shortest_length(
    tiny_tokenizer: PreTrainedTokenizerBase, lengths: list[int]
) -> None:
    with pytest.raises(DataError, match=rf"sweep.max_length = 16 .*the shortest has {min(lengths)} tokens"):
        encode_all(tiny_tokenizer, CHATS, Limits(16, "drop"), name="train")


def test_few_examples_are_spread_over_all_sets() -> None:
    assert [e.id for e in evenly(CHATS, 2)] == [CHATS[0].id, CHATS[2].id]
    assert list(evenly(CHATS, None)) == list(evenly(CHATS, 9)) == CHATS


# Empty


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "0 of 0 examples"), ([Encoded((1, 2, 3), (IGNORED,) * 3)], "1 of 1 examples")],
)
@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_loop_refuses_sets_without_a_supervised_token(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase, rows: list[Encoded], words: str, purpose: str
) -> None:
    good = [encode(tiny_tokenizer, CHATS[0], 200)]
    sets = (rows, good) if purpose == "train" else (good, rows)
    with pytest.raises(InfeasibleTrialError, match=f"nothing to {purpose} on: {words}"):
        trained(tiny_model, *sets)


def test_template_that_writes_no_answer_is_refused_naming_the_example(tiny_model: Path) -> None:
    tokenizer = with_template(
        tiny_model, "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"example q1: .*writes nothing of its answers"):
        encode(tokenizer, chat("Who?", "We.", key="q1"), 200)


def test_more_micro_batches_wanted_than_there_are_is_one_step_an_epoch(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [encode(tiny_tokenizer, c, 200) for c in CHATS]
    points = trained(tiny_model, rows, rows, accumulate=99, tokens_per_batch=1, epochs=2)[0]
    assert points[-1].step == 2


# Templates


@pytest.mark.parametrize("template", [MARKED, WITH_NEWLINE, WITHOUT_END])
@pytest.mark.parametrize("shown", [(), CHATS[2].messages], ids=["alone", "after others"])
def test_marks_of_a_template_give_the_labels_that_its_prefixes_give(
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    template: str,
    shown: tuple[Message, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = [encode(tiny_tokenizer, example, 200, shown) for example in CHATS]
    marked = with_template(tiny_model, template)
    monkeypatch.delattr(encoding, "_by_prefixes")  # no way around the marks
    assert [encode(marked, example, 200, shown) for example in CHATS] == wanted


def test_template_that_rewrites_earlier_turns_is_usable_if_it_marks_its_answers(tiny_model: Path) -> None:
    example = chat("Who?", "<think>hm</think>We.", "Sure?", "<think>well</think>Yes.")
    tokenizer = with_template(tiny_model, RETHINKS)
    row = encode(tokenizer, example, 200)
    assert supervised_text(tokenizer, row) == "We.<|im_end|><think>well</think>Yes.<|im_end|>"
    asked = prompt_ids(tokenizer, example.prompt)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(with_template(tiny_model, UNMARKED_RETHINKS), example, 200)
    single = chat("Who?", "<think>hm</think>We.")
    assert encode(with_template(tiny_model, UNMARKED_RETHINKS), single, 200) == encode(tokenizer, single, 200)
    assert asked


@pytest.mark.parametrize("template", [GEMMA, SILENT], ids=["refuses", "leaves out"])
def test_system_turn_goes_before_the_first_question_where_the_template_has_none(
    tiny_model: Path, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(tiny_model, template + "{# " + str(random.random()) + " #}")
    example = CHATS[3]
    for _ in range(2):
        row = encode(tokenizer, example, 200)
    assert caplog.text.count("has no system turn") == 1  # said once
    assert supervised_text(tokenizer, row) == "Yes.<|im_end|>It is.<|im_end|>"
    asked = prompt_ids(tokenizer, example.prompt)  # what evaluation and serving ask
    assert list(row.ids[: len(asked)]) == asked
    text = tokenizer.decode(asked)
    assert text.startswith("<|im_start|>user\nBe brief.\n\nIs a reading due?<|im_end|>")
    same = chat("Be brief.\n\nIs a reading due?", "Yes.", "Really?", "It is.")
    assert encode(tokenizer, same, 200) == row
    shown = encode(tokenizer, example, 200, CHATS[1].messages)
    assert "user\nBe brief.\n\nWho pays" in tokenizer.decode(shown.ids)
    assert supervised_text(tokenizer, shown) == supervised_text(tokenizer, row)


def test_system_turn_stays_its_own_where_the_template_has_one(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    asked = prompt_ids(tiny_tokenizer, CHATS[3].prompt)
    assert tiny_tokenizer.decode(asked).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_refusal_of_a_template_names_the_example_and_the_turns(tiny_model: Path) -> None:
    tokenizer = with_template(tiny_model, GEMMA)
    turns = tuple(Message(role=r, content="x") for r in ("user", "user", "assistant"))  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"example q9: .*refuses a chat of user → user( → assistant)?: .*must alternate"
    ):
        encode(tokenizer, Example(id="q9", messages=turns), 200)


# Tokenizers


def altered(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of the model whose tokenizer's configuration differs; None takes an entry out."""
    shutil.copytree(folder, to)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = to / name
        if file.exists():
            settings = json.loads(file.read_text()) | {k: v for k, v in changes.items() if k != "vocab_size"}
            file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(
        json.dumps(config | {k: v for k, v in changes.items() if k == "vocab_size"})
    )
    return to


def test_without_a_pad_token_the_end_of_turn_pads_and_is_still_learnt(
    tiny_model: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = load_tokenizer(altered(tiny_model, tmp_path / "m", pad_token=None))
    pad = tokenizer.pad_token_id
    assert pad == tokenizer.eos_token_id != tiny_tokenizer.pad_token_id
    rows = [encode(tokenizer, c, 200) for c in CHATS[:3]]
    assert rows == [encode(tiny_tokenizer, c, 200) for c in CHATS[:3]]
    batch = collate(rows, int(pad))
    for index, row in enumerate(rows):
        assert (batch.labels[index] == pad).sum() == row.labels.count(pad) >= 1
        assert batch.attention_mask[index].sum() == len(row.ids)
        assert (batch.labels[index, len(row.ids) :] == IGNORED).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eos_token": None}, "has no eos_token: answers would never end"),
        ({"eos_token": None, "pad_token": None}, "neither an end-of-turn nor a pad token"),
        ({"vocab_size": 100}, r"has \d+ tokens, but the model's embedding 100 rows"),
    ],
)
def test_tokenizer_that_cannot_work_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        load_tokenizer(altered(tiny_model, tmp_path / "m", **changes))


def test_token_beyond_the_embedding_is_refused_only_where_it_is_used(
    tiny_model: Path,
) -> None:
    tokenizer = load_tokenizer(tiny_model)
    rows = embedding_rows(tiny_model)
    assert rows == len(tokenizer)
    tokenizer.add_tokens(["<|beyond|>"])
    encode_all(tokenizer, CHATS, Limits(200, rows=rows), name="train")
    with pytest.raises(ModelError, match=rf"example q2: token {rows} is beyond the {rows} the model knows"):
        encode_all(tokenizer, [chat("A <|beyond|> B", "C", key="q2")], Limits(200, rows=rows), name="train")


# Adapters


@pytest.mark.parametrize("cls", [c for c in METHOD_CLASSES if issubclass(c, TunerMethod)])
def test_every_adapter_finds_its_default_layers_and_refuses_names_that_are_not_there(
    tiny_model: Path, cls: type[TunerMethod]
) -> None:
    skeleton = empty_causal_lm(tiny_model)
    assert all(p.is_meta for p in skeleton.parameters())
    name = cls.model_fields["name"].default
    cls.model_validate({"name": name}).check_targets(skeleton)
    for targets in (("nope",), ("q_proj", "nope")):
        wrong = cls.model_validate({"name": name, "target_modules": targets})
        with pytest.raises(InfeasibleTrialError) as caught:
            wrong.check_targets(skeleton)
        assert caught.value.problem == (
            "target_modules: the base model has no layer nope; "
            "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
        )


@pytest.mark.parametrize("targets", ["q_proj", "(", ()])
def test_one_text_is_a_pattern_for_whole_names(tiny_model: Path, targets: Any) -> None:
    skeleton = empty_causal_lm(tiny_model)
    LoRA(target_modules=r".*\.q_proj").check_targets(skeleton)
    with pytest.raises(InfeasibleTrialError, match="target_modules: the base model has no layer"):
        LoRA(target_modules=targets).check_targets(skeleton)


def test_inner_layers_of_ia3_are_checked_too(tiny_model: Path) -> None:
    skeleton = empty_causal_lm(tiny_model)
    IA3(feedforward_modules=()).check_targets(skeleton)
    with pytest.raises(InfeasibleTrialError, match="feedforward_modules: the base model has no layer nope"):
        IA3(feedforward_modules=("nope",)).check_targets(skeleton)
    with pytest.raises(InfeasibleTrialError, match="up_proj is not among target_modules"):
        IA3(feedforward_modules=("up_proj",)).check_targets(skeleton)


# Answers while training


def trained(
    folder: Path,
    train_set: Sequence[Encoded],
    evaluation_set: Sequence[Encoded],
    method: dict[str, object] | None = None,
    probe: Any = None,
    **changes: Any,
) -> tuple[tuple[LossPoint, ...], Any, float]:
    chosen = parse_method(method or {"name": "lora", "rank": 4})
    base = chosen.load_base(folder, "float32", "cpu")
    torch.manual_seed(5)
    model = chosen.apply(base)
    settings = LoopSettings(
        **{"learning_rate": 5e-3, "epochs": 3, "tokens_per_batch": 128, "evaluations": 2} | changes
    )
    outcome = train(
        model, base, train_set, evaluation_set, settings, pad_id=0, device="cpu", report=lambda _: None,
        probe=probe(model) if probe else None,
    )  # fmt: skip
    return outcome.points, model, outcome.seconds


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        {"name": "full"},
        {"name": "lora", "rank": 4, "dropout": 0.2},
        {"name": "prompt_tuning", "virtual_tokens": 5, "initial_text": None},
        {"name": "p_tuning", "virtual_tokens": 6, "encoder_hidden_size": 16},
    ],
    ids=lambda m: m["name"],
)
def test_answers_on_the_way_are_the_models_own_and_change_nothing(
    tiny_model: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    method: dict[str, object],
    checkpointing: bool,
) -> None:
    rows = [encode(tiny_tokenizer, c, 200) for c in CHATS]
    reports: list[Any] = []

    def probe(model: Any) -> Any:
        def ask() -> dict[str, float]:
            assert not model.training
            settings = EvaluateSection(max_new_tokens=8)
            reports.append(
                score(model, tiny_tokenizer, CHATS, settings, dataset_id="d", split="e")
            )  # fmt: skip
            return {"rougeL": float(len(reports))}

        return ask

    how = {"learning_rate": 1e-2, "gradient_checkpointing": checkpointing}
    points, model, _ = trained(tiny_model, rows, rows, method, probe, **how)
    assert [p.scores for p in points] == [{"rougeL": 1.0}, {"rougeL": 2.0}]
    without, other, _ = trained(tiny_model, rows, rows, method, **how)
    assert [p.model_copy(update={"scores": {}}) for p in points] == list(without)
    for a, b in zip(trainable_parameters(model), trainable_parameters(other), strict=True):
        assert torch.equal(a, b)
    # Asked again after training, outside of the patched loss, the last model answers the same.
    if method["name"] != "full":  # that one answers under autocast while it trains
        after = score(
            model.eval(), tiny_tokenizer, CHATS, EvaluateSection(max_new_tokens=8), dataset_id="d", split="e"
        )
        assert [e.output for e in reports[-1].examples] == [e.output for e in after.examples]


def test_answers_on_the_way_know_the_positions_of_padded_rows(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    # Learnt positions: with a model that only knows distances nothing would show.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tiny_tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2, initializer_range=0.5,
            bos_token_id=None, eos_token_id=tiny_tokenizer.eos_token_id,
        )
    ).eval()  # fmt: skip
    prompts = [prompt_ids(tiny_tokenizer, c.prompt) for c in CHATS]

    def answers() -> list[str]:
        return generate(base, tiny_tokenizer, prompts, max_new_tokens=8, batch_size=4)

    wanted = answers()
    with supervised_positions_only(base):
        assert "forward" in vars(base)
        assert answers() == wanted


def test_time_for_answers_is_not_time_of_training(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [encode(tiny_tokenizer, c, 200) for c in CHATS]

    def probe(_: Any) -> Any:
        return lambda: time.sleep(1.5) or {"x": 1.0}

    points, _, seconds = trained(tiny_model, rows, rows, probe=probe)
    assert len(points) == 2
    assert seconds < 2.5


# Divergence


def watched(losses: Sequence[float], total: int | None = None) -> str:
    watch = DivergenceWatch(total or len(losses), vocabulary=1000)  # guessing costs 6.9 nats
    try:
        for step, loss in enumerate(losses, start=1):
            watch.see(step, loss)
    except InfeasibleTrialError as error:
        return error.problem
    return ""


def test_run_that_stays_worse_than_guessing_has_diverged() -> None:
    reason = watched([3.0] * 20 + [9.5] * 80)
    assert reason.startswith("diverged: the loss of the last 10 steps is ")
    assert "it began at 3.00, and guessing gives 6.91" in reason
    assert "at step 27 of 100" in reason
    assert "the loss is nan at step 2 of 3" in watched([1.0, math.nan, 1.0])


@pytest.mark.parametrize(
    "losses",
    [
        [3.0 - 0.02 * step for step in range(100)],
        [3.0] * 20 + [30.0] + [3.0] * 79,  # a spike
        [3.0, *[8.0] * 4, *[3.0] * 95],  # a short one at the height of the warm-up
        [12.0 + (-1) ** step for step in range(60)] + [4.0] * 40,  # a bad start that gets better
        [1.0] * 20 + [4.5] * 80,  # worse than it began, yet better than guessing
        [0.5] + [9.0] * 5,  # too short to tell
    ],
    ids=["good", "spike", "warm-up", "bad start", "forgetting", "short"],
)
def test_run_that_may_come_to_good_goes_on(losses: list[float]) -> None:
    assert watched(losses) == ""


def test_start_is_remembered_over_a_checkpoint() -> None:
    watch = DivergenceWatch(100, vocabulary=1000, first=3.0)
    with pytest.raises(InfeasibleTrialError, match=r"it began at 3\.00"):
        for step in range(50, 70):
            watch.see(step, 9.5)


def test_hopeless_rate_ends_a_trial_before_its_loss_is_no_number(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [encode(tiny_tokenizer, c, 200) for c in CHATS]
    with pytest.raises(InfeasibleTrialError, match=r"diverged: the loss of the last 8 steps is"):
        trained(
            tiny_model, rows, rows, {"name": "full"}, learning_rate=1.0, tokens_per_batch=1, epochs=20,
        )  # fmt: skip


# A whole trial

DATASET = make_dataset(
    "d", {"train": CHATS[:3], "evaluation": CHATS[3:]}, sources={}, leakage_jaccard=0.9
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


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[list[LossPoint], list[TrialResult]]:
    """The curve and the results that trials record."""
    curve: list[LossPoint] = []
    results: list[TrialResult] = []

    class Run:
        run_id = "run-1"
        log_curve = staticmethod(curve.extend)

        @staticmethod
        def finish(result: TrialResult) -> TrialResult:
            results.append(result)
            return result

        @staticmethod
        def log_adapter(*_: Any, **__: Any) -> str:
            return "m-1"

    class FakeTracker:
        def __init__(self, *_: str) -> None: ...

        def start_trial(self, *_: Any, **__: Any) -> Run:
            return Run()

    monkeypatch.setattr(trials, "_tracker", FakeTracker)
    return curve, results


Recorded = tuple[list[LossPoint], list[TrialResult]]


def test_trial_records_what_became_of_its_examples_and_the_answers_on_the_way(
    tiny_model: Path, lengths: list[int], recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    curve, results = recorded
    limits = {"max_length": sorted(lengths)[-2], "too_long": "truncate", "answers_at_points": 1}
    wanted = spec(tiny_model, {"name": "lora", "rank": 2}, **limits)
    run_trial(wanted, DATASET, report=lambda _: None, bases=BaseCache())
    (result,) = results
    assert result.status == "completed"
    assert result.data["train_kept"] == 3
    assert result.data["train_truncated"] == 0
    assert result.data["evaluation_truncated"] == 1
    assert "evaluation: 1 of 1 examples kept, 1 truncated" in caplog.text
    assert result == TrialResult.model_validate_json(result.model_dump_json())
    assert [set(p.scores) >= {"rougeL"} for p in curve] == [True, True]


def test_adapter_without_a_layer_is_an_infeasible_trial_with_the_names_there_are(
    tiny_model: Path, recorded: Recorded
) -> None:
    wanted = spec(tiny_model, {"name": "lora", "target_modules": ["q_proj", "nope"]})
    run_trial(wanted, DATASET, report=lambda _: None, bases=BaseCache())
    assert recorded[1][0].status == "infeasible"
    assert "no layer nope; it has down_proj, " in recorded[1][0].reason


def test_what_becomes_of_long_examples_decides_a_result_and_answers_on_the_way_do_not(
    tiny_model: Path,
) -> None:
    method = {"name": "lora"}
    key = spec(tiny_model, method).key
    assert spec(tiny_model, method, too_long="drop").key != key
    assert spec(tiny_model, method, answers_at_points=3).key == key
