from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from regraft.config import DataSection, Experiment
from regraft.data.chats import read_chats, write_chats
from regraft.data.checks import find_leaks, prompt_words, without_repeats
from regraft.data.dataset import load_dataset, make_dataset, union_of_evaluations
from regraft.errors import DataError
from regraft.records import DatasetVersion, Example, Message


def chat(prompt: str, answer: str = "Yes.", key: str | None = None, **tags: str) -> Example:
    messages = (Message(role="user", content=prompt), Message(role="assistant", content=answer))
    return Example(id=key or prompt, messages=messages, tags=tags)


def line(*turns: tuple[str, str], **more: object) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], **more})


def dataset(train: list[Example], **evaluation: list[Example]) -> DatasetVersion:
    return make_dataset("d", {"train": train, **evaluation}, sources={}, leakage_jaccard=0.7)


GOOD = line(("user", "a"), ("assistant", "b"))
BROKEN = {
    "not JSON": ('{"messages": [', "not valid JSON"),
    "not an object": ("[1]", "the line: must be an object, not list"),
    "no messages": ('{"id": "x"}', "messages: Field required"),
    "one message": (line(("assistant", "b")), "messages: "),
    "unknown role": (line(("human", "a"), ("assistant", "b")), "messages.0.role: "),
    "content not text": ('{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "b"}]}',
                         "messages.0.content: "),
    "empty content": (line(("user", ""), ("assistant", "b")), "messages.0.content: "),
    "blank content": (line(("user", "a"), ("assistant", " \n")), "messages.1.content: is blank"),
    "no content": ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
                   "messages.0.content: Field required"),
    "unknown key": (line(("user", "a"), ("assistant", "b"), label=1), "label: "),
    "tag not text": (line(("user", "a"), ("assistant", "b"), tags={"n": 1}), "tags.n: "),
    "two users": (line(("user", "a"), ("user", "a"), ("assistant", "b")), "messages.1.role: is 'user'"),
    "system in the middle": (line(("user", "a"), ("system", "s"), ("assistant", "b")), "messages.1.role: is 'system'"),
    "assistant first": (line(("assistant", "b"), ("user", "a"), ("assistant", "b")), "messages.0.role: "),
    "ends with the user": (line(("user", "a"), ("assistant", "b"), ("user", "c")), "messages.2.role: the last turn"),
    "system only": (line(("system", "s"), ("assistant", "b")), "messages.1.role: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_line_is_reported_with_file_line_and_field(tmp_path: Path, kind: str) -> None:
    broken, words = BROKEN[kind]
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{broken}\n")
    with pytest.raises(DataError) as caught:
        read_chats(path)
    assert caught.value.problem.startswith(f"{path}:3: {words}")
    assert '"role": "user"' in caught.value.mend


def test_all_broken_lines_are_reported_at_once_and_those_beyond_twenty_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(broken for broken, _ in BROKEN.values()))
    with pytest.raises(DataError) as caught:
        read_chats(path)
    lines = {int(n) for n in re.findall(r"^.*?:(\d+): ", caught.value.problem, re.MULTILINE)}
    assert lines == set(range(1, len(BROKEN) + 1))
    path.write_text("{\n" * 25)
    with pytest.raises(DataError) as caught:
        read_chats(path)
    assert caught.value.problem.splitlines()[-1] == "… and 5 more"
    assert len(caught.value.problem.splitlines()) == 21


def test_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [line(("user", c), ("assistant", "b"), id=i) for c, i in (("a", "x"), ("b", "y"), ("c", "x"))]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"train\.jsonl:3: id: 'x' is already the id of line 1"):
        read_chats(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"\n\n", "no examples"), (b"\xff\xfe", "byte 0 is not UTF-8")],
)
def test_missing_empty_or_garbled_file_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_chats(path)
    assert str(path) in caught.value.problem
    assert caught.value.mend


def test_written_chats_are_read_back_unchanged(tmp_path: Path) -> None:
    examples = (
        chat("Wer zahlt? → 😀\nZeile", intent="billing"),
        Example(
            id="multi",
            messages=tuple(
                Message(role=r, content=c)  # type: ignore[arg-type]
                for r, c in [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
            ),
        ),
    )  # fmt: skip
    write_chats(tmp_path / "new" / "file.jsonl", examples)
    assert read_chats(tmp_path / "new" / "file.jsonl") == examples
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file.jsonl"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path, separator: str) -> None:
    example = chat(f"one{separator}two")
    write_chats(tmp_path / "file.jsonl", [example])
    assert read_chats(tmp_path / "file.jsonl") == (example,)


def test_example_without_an_id_gets_the_same_one_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text(f"{line(('user', 'z'), ('assistant', 'b'))}\n{GOOD}")
    first = read_chats(tmp_path / "a.jsonl")[0]
    other, again = read_chats(tmp_path / "b.jsonl")
    assert first.id == again.id
    assert other.id != first.id


def test_exact_duplicates_are_dropped_from_training_and_counted() -> None:
    train = [chat("one", key="1"), chat("one", key="2"), chat("one", "No.", key="3")]
    kept, dropped = without_repeats(train)
    assert ([e.id for e in kept], dropped) == (["1", "3"], 1)
    version = dataset(train, evaluation=[chat("quite another")])
    assert [e.id for e in version.split("train")] == ["1", "3"]
    assert version.checks["exact_duplicates_dropped"] == 1


def test_one_of_two_equal_examples_without_ids_is_kept(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "evaluation").write_text(line(("user", "quite another"), ("assistant", "b")))
    section = DataSection(
        train=(tmp_path / "a", tmp_path / "b"), evaluation={"evaluation": tmp_path / "evaluation"}
    )
    assert len(load_dataset("d", section).split("train")) == 1


@pytest.mark.parametrize("other", ["train", "storm"])
def test_id_that_repeats_across_files_or_sets_is_refused(other: str) -> None:
    splits = {"train": [chat("one", key="t")], "evaluation": [chat("two", key="e")], "storm": [chat("three", key="s")]}  # fmt: skip
    splits[other] = [*splits[other], chat("four", key="e")]
    with pytest.raises(DataError):
        make_dataset("d", splits, sources={}, leakage_jaccard=0.7)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_leaks_are_exactly_the_pairs_at_or_above_the_threshold(threshold: float) -> None:
    draw = random.Random(7)
    words = [f"w{i}" for i in range(400)]
    evaluation, train = [], []
    for i in range(60):
        prompt = draw.sample(words, 10)
        evaluation.append(chat(" ".join(prompt), key=f"e{i}"))
        same = i % 10 == 0
        kept = draw.sample(prompt, 10 if same else draw.randint(4, 10))
        others = draw.sample([w for w in words if w not in prompt], 0 if same else draw.randint(0, 3))
        train.append(chat(" ".join([*kept, *others]).upper(), key=f"t{i}"))
    expected = set()
    for t in train:
        for e in evaluation:
            a, b = prompt_words(t), prompt_words(e)
            if len(a & b) / len(a | b) >= threshold:
                expected.add((t.id, e.id))
    assert expected
    assert {
        (leak.train_id, leak.evaluation_id) for leak in find_leaks(train, evaluation, threshold)
    } == expected


def test_leak_is_refused_naming_both_examples_and_the_set() -> None:
    held = chat("How do I report an outage at night", key="e7")
    with pytest.raises(DataError, match=r"leak the evaluation set 'storm'") as caught:
        dataset(
            [chat("how do I report an outage at night?!", key="t3")], evaluation=[chat("x")], storm=[held]
        )
    assert "t3 is 1.00 alike to e7" in caught.value.problem
    assert "leakage_jaccard" in caught.value.mend


def test_dataset_id_does_not_depend_on_where_the_files_lie(example_folder: Path, tmp_path: Path) -> None:
    section = Experiment.load(example_folder).data
    copies = {}
    for name, path in [("train", section.train[0]), ("evaluation", section.evaluation["evaluation"])]:
        copies[name] = tmp_path / f"{name}-elsewhere.jsonl"
        copies[name].write_bytes(path.read_bytes())
    moved = DataSection(train=(copies["train"],), evaluation={"evaluation": copies["evaluation"]})
    assert load_dataset("other", moved).id == load_dataset("d", section).id


def test_dataset_id_depends_on_every_text_and_on_the_sets() -> None:
    base = dataset([chat("a", key="1")], evaluation=[chat("b", key="2")])
    changed = [
        dataset([chat("a", "No.", key="1")], evaluation=[chat("b", key="2")]),
        dataset([chat("c", key="1")], evaluation=[chat("b", key="2")]),
        dataset([chat("a", key="1")], evaluation=[chat("b", "No.", key="2")]),
        dataset([chat("a", key="1")], storm=[chat("b", key="2")]),
        dataset([chat("a", key="1"), chat("z", key="3")], evaluation=[chat("b", key="2")]),
    ]
    assert len({version.id for version in (base, *changed)}) == 6


def test_union_of_evaluations_tags_each_example_with_its_set() -> None:
    version = dataset([chat("a")], evaluation=[chat("b", fact="1")], storm=[chat("c")])
    union = union_of_evaluations(version)
    assert [(e.id, e.tags) for e in union] == [
        ("b", {"fact": "1", "set": "evaluation"}),
        ("c", {"set": "storm"}),
    ]


# The data that comes with the project.

NUMBER = re.compile(r"\d+(?:[-.,:]\d+)*")


@pytest.fixture(scope="module")
def written(example_folder: Path) -> dict[str, tuple[Example, ...]]:
    return {path.stem: read_chats(path) for path in sorted((example_folder / "data").glob("*.jsonl"))}


def facts(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Part, intent and text of every fact."""
    part = intent = ""
    for text in (folder / "FACTS.md").read_text(encoding="utf-8").splitlines():
        if text.startswith("## "):
            part = text[3:]
        elif text.startswith("### "):
            intent = text[4:]
        elif text.startswith("- "):
            yield part, intent, text


def test_example_data_is_as_large_as_promised(written: dict[str, tuple[Example, ...]]) -> None:
    ordinary = [*written["train"], *written["evaluation"]]
    assert len(ordinary) >= 300
    assert len({e.tags["intent"] for e in written["train"]}) >= 12
    assert {e.tags["intent"] for e in written["train"]} == {e.tags["intent"] for e in written["evaluation"]}
    assert 100 <= len(written["storm_reviewed"]) + len(written["storm_evaluation"]) <= 140
    ids = [e.id for rows in written.values() for e in rows]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("seen", "unseen"),
    [
        (["train"], ["evaluation", "traffic", "storm_evaluation", "storm_reviewed"]),
        (["storm_reviewed"], ["evaluation", "storm_evaluation"]),
    ],
)
def test_no_unseen_example_prompt_is_nearly_one_that_trains(
    written: dict[str, tuple[Example, ...]], seen: list[str], unseen: list[str]
) -> None:
    trained = [(e.id, prompt_words(e)) for name in seen for e in written[name]]
    alike = [
        (a, e.id)
        for name in unseen
        for e in written[name]
        for a, words in trained
        if len(words & prompt_words(e)) >= 0.7 * len(words | prompt_words(e))
    ]
    assert not alike


def test_every_number_of_an_example_answer_stands_among_the_facts_of_its_topic(
    written: dict[str, tuple[Example, ...]], example_folder: Path
) -> None:
    known: dict[str, set[str]] = {}
    for _, intent, text in facts(example_folder):
        known.setdefault(intent, set()).update(NUMBER.findall(text))
    wrong = [
        (e.id, number)
        for rows in written.values()
        for e in rows
        for number in NUMBER.findall(e.reference)
        if number not in known[e.tags["intent"]]
    ]
    assert not wrong


def test_storm_topics_are_absent_from_training_and_ordinary_traffic(
    written: dict[str, tuple[Example, ...]], example_folder: Path
) -> None:
    storm = {intent for part, intent, _ in facts(example_folder) if part == "Storm week"}
    ordinary_numbers = {
        n for part, _, text in facts(example_folder) if part != "Storm week" for n in NUMBER.findall(text)
    }
    storm_numbers = {
        n for part, _, text in facts(example_folder) if part == "Storm week" for n in NUMBER.findall(text)
    } - ordinary_numbers
    assert {e.tags["intent"] for e in written["storm_reviewed"]} == storm
    assert {e.tags["intent"] for e in written["storm_evaluation"]} == storm
    for name in ("train", "evaluation", "traffic"):
        for e in written[name]:
            assert e.tags["intent"] not in storm
            assert not storm_numbers & set(NUMBER.findall(e.reference))
