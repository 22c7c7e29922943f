"""Drifted exchanges on their way to becoming examples: put before a reviewer, and read back once reviewed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from monitoring.measures import failed
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.records import CapturedExchange, Example, RetrainDecision, content_hash

#: The tag of an answer that nobody has looked at: it is the model's own, and nothing to learn from.
DRAFT = {"review": "draft"}


def reviewed(experiment: Experiment) -> tuple[Example, ...]:
    """The examples of `retrain.reviewed` but for those that are still tagged as drafts.

    None where there is no file, or an empty one: a reviewer may have dropped everything.

    Raises:
        DataError: If the file cannot be read.
    """
    path = experiment.retrain.reviewed
    if path is None or not path.exists() or path.stat().st_size == 0:
        return ()
    return tuple(e for e in read_chats(path) if e.tags.get("review") != DRAFT["review"])


def text_hash(example: Example) -> str:
    """What tells examples apart by their texts, whatever they are called."""
    return content_hash([m.model_dump() for m in example.messages])


def put_before_reviewer(
    experiment: Experiment,
    decision: RetrainDecision,
    workspace: Path,
    drifted: Sequence[CapturedExchange],
    most: int,
) -> str:
    """Write exchanges as chats with the answer as a draft.

    What was written before is never touched, a person may have edited it: later checks of the same alarm add
    files (`ALARM-2.jsonl`) with exchanges that were in none. An empty answer stays empty, so that the file
    cannot be trained on before somebody has written one.

    Args:
        experiment: Whose exchanges.
        decision: To collect.
        workspace: Where `review/MODEL/` lies.
        drifted: Those that drifted most first. What failed, and what is no chat, is left out.
        most: So many of an alarm, over all its checks.

    Returns:
        What was done, in words.
    """
    folder = workspace / "review" / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    alarm = decision.alarm_id or decision.drift_report_id
    listed = folder / f".{alarm}.offered.json"
    files = [folder / f"{alarm}.jsonl", *sorted(folder.glob(f"{alarm}-*.jsonl"))]
    before = set(json.loads(listed.read_text())) if listed.exists() else set()
    before |= {name for file in files if file.exists() for name in _ids(file)}
    room = max(0, most - len(before))
    chosen = [e for e in drifted if e.id not in before and not failed(e) and _is_chat(e)][:room]
    if not chosen:
        return f"nothing new to review: {len(before)} exchanges of alarm {alarm} are in {folder}"
    file = _write_new(folder, alarm, "".join(_line(e) for e in chosen))
    _replace(listed, json.dumps(sorted(before | {e.id for e in chosen})))
    return f"{len(chosen)} exchanges to review in {file}: mend the answers, and drop the tag `review`"


def _line(exchange: CapturedExchange) -> str:
    turns = [m.model_dump() for m in exchange.messages]
    turns.append({"role": "assistant", "content": exchange.output})
    tags = DRAFT | {"answered_by": f"{exchange.model}/{exchange.model_version}", "created": exchange.created}
    return json.dumps({"id": exchange.id, "messages": turns, "tags": tags}, ensure_ascii=False) + "\n"


def _is_chat(exchange: CapturedExchange) -> bool:
    """Whether its turns are those of an example: user and assistant by turns, the user's last."""
    roles = [m.role for m in exchange.messages if m.role != "system"]
    system = [i for i, m in enumerate(exchange.messages) if m.role == "system"]
    wanted = ["user", "assistant"] * len(roles)
    return system in ([], [0]) and roles == wanted[: len(roles)] and len(roles) % 2 == 1


def _ids(file: Path) -> list[str]:
    """Ids in a file that a person may have edited; a line that is no JSON has none."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        try:
            raw = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(raw, dict) and "id" in raw:
            found.append(str(raw["id"]))
    return found


def _write_new(folder: Path, alarm: str, text: str) -> Path:
    """Write a file by a name that no file has yet, whole or not at all."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=".part-") as scratch:
        scratch.write(text)
        scratch.flush()
        number = 1
        while True:
            file = folder / (f"{alarm}.jsonl" if number == 1 else f"{alarm}-{number}.jsonl")
            try:
                os.link(scratch.name, file)  # fails where there is one
            except FileExistsError:
                number += 1
            else:
                return file


def _replace(file: Path, text: str) -> None:
    scratch = file.with_suffix(".part")
    scratch.write_text(text)
    scratch.replace(file)
