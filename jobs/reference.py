"""The configuration reference and the JSON schema, generated from the classes that read the YAML.

`python -m jobs.reference` writes docs/configuration.md; a test holds the file against what this gives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from regraft.config import Constraint, Experiment, GateSection, MonitorSection, ServeSection, SweepSection
from regraft.evals import METRIC_CLASSES, AnyMetric, Metric
from regraft.methods import METHOD_CLASSES

_INTRO = """# Configuration

Written by `python -m jobs.reference` from the classes that read the file; do not edit it by hand.

One YAML describes an experiment. Unknown keys are errors, and `regraft check PATH` validates all of it
without starting anything. Relative paths are taken from the folder of the YAML. `regraft schema` prints the
JSON schema for editors.
"""
_METRICS = """## Metrics

Entries of `evaluate.metrics`; the names they give are what `select` uses. A metric that fails on an example
is a recorded failure with its reason, and that example does not count in its mean.
"""

_OWN_METRICS = """### `module:Class`

A metric of your own: a subclass of `regraft.evals.Metric` that says what it gives and scores an answer,
named by its path, with its own fields beside. The module has to be importable wherever trials run: from
`PYTHONPATH`, or from the folder that a job travels with.

```python
from typing import ClassVar

from regraft.evals import Answer, Metric, Output


class Polite(Metric):
    outputs: ClassVar = (Output("polite"),)
    words: tuple[str, ...] = ("please", "thank")

    def score(self, answer: Answer) -> dict[str, float]:
        return {"polite": float(any(word in answer.output.lower() for word in self.words))}
```

```yaml
evaluate:
  metrics: [{name: rouge}, {name: "my_metrics:Polite", words: [danke, bitte]}]
```
"""

_DETECTORS = """## Detectors

`monitor.detector` names one of these and sets its fields ([monitoring](monitoring.md)).
"""

_METHODS = """## Methods

An entry of `sweep.methods` names a method and sets its fields. Any field may be a value, a list (a grid), or
a range that is drawn `sweep.samples` times: `{loguniform: [1e-5, 1e-3]}` or `{uniform: [0, 0.1]}`.
"""
_SUPPORT = (
    "quantised base",
    "merges",
    "mixed batches",
    "engines",
    "replicas (DDP)",
    "parts (FSDP2)",
    "packed rows",
    "checkpointed activations",
)
_SUPPORT_WORDS = """### What each can do

*Quantised base*: the method trains on an NF4 base (`quantise: nf4` or `nf4_double`) as on the same values
in full. *Merges*: the adapter can go into the weights of a base held in full without a change of what the
model says. *Mixed batches*: rows of one batch may take their own adapters in PEFT. *LoRA engines*: the
files are plain LoRA, which vLLM takes; Regraft's own engines serve every method. *Packed rows*:
`sweep.packing`. *Checkpointed activations*: `sweep.gradient_checkpointing`. Each cell is declared by the
method's class and held against what really happens by `tests/core/test_support.py`, on the CPU: a method
that does more or less than it declares fails there. A configuration that asks for what a method does not do
is refused before anything starts.

"""
#: Types under other names than Python's.
_PLAIN = {"str": "text", "Path": "path", "NoneType": "null", "Constraint": "text"}


def _nested(section: str, of: type[BaseModel]) -> Iterator[str]:
    """What stands in the fields of a section that are sections themselves."""
    for name, field in of.model_fields.items():
        for nested in _models(field.annotation):
            # A `name` that tells variants apart has a default; any other is a key of its own.
            default = nested.model_fields["name"].default if "name" in nested.model_fields else None
            variant = default if isinstance(default, str) else None
            title = f"{section}.{name}" + (f": {{name: {variant}}}" if variant else "")
            doc = " ".join((nested.__doc__ or "").split())
            yield f"### `{title}`\n\n{doc}\n\n{_table(nested, skip=('name',) if variant else ())}"
            yield from () if variant else _nested(title, nested)


def schema() -> str:
    """The JSON schema of `regraft.yaml`."""
    return json.dumps(Experiment.model_json_schema(), indent=1)


def markdown() -> str:
    """The reference as Markdown."""
    from monitoring.detectors import DETECTOR_CLASSES

    parts = [_INTRO]
    for name, field in Experiment.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            doc = " ".join((section.__doc__ or "").split())
            parts.append(f"## `{name}`\n\n{doc}\n\n{_table(section)}")
    parts += [*_nested("sweep", SweepSection), *_nested("serve", ServeSection)]
    parts += _nested("monitor", MonitorSection)
    gate = " ".join((GateSection.__doc__ or "").split())
    parts.append(f"### `select.gate`\n\n{gate}\n\n{_table(GateSection)}")
    parts.append(_METHODS)
    parts.append(_support())
    parts += [_variant(method) for method in METHOD_CLASSES]
    parts.append(_METRICS)
    parts += [_metric(metric) for metric in METRIC_CLASSES]
    parts.append(_OWN_METRICS)
    parts.append(_DETECTORS)
    parts += [_variant(detector) for detector in DETECTOR_CLASSES]
    return "\n".join(parts).rstrip() + "\n"


def _metric(metric: type[Metric]) -> str:
    """A metric with its settings, its version, and each of its figures with unit and direction."""
    doc = " ".join((metric.__doc__ or "").split())
    words = {"higher": "higher is better", "lower": "lower is better", "": "neither is better"}
    gives = "; ".join(f"`{out.name}` ({out.unit}, {words[out.better]})" for out in metric.outputs)
    gives += "".join(f"; over a whole set `{out.name}` ({words[out.better]})" for out in metric.wholes)
    title = (
        f"### `{metric.model_fields['name'].default}`\n\n{doc}\n\nVersion {metric.version}. Gives {gives}.\n"
    )
    return title + (f"\n{_table(metric, skip=('name',))}" if len(metric.model_fields) > 1 else "")


def _support() -> str:
    rows = ["| " + " | ".join(("method", *_SUPPORT)) + " |", "|---" * (len(_SUPPORT) + 1) + "|"]
    for method in METHOD_CLASSES:
        trains, support = method.kind != "control", method.support
        adapter = method.kind == "adapter"
        cells = [
            _word(support.quantises) if adapter or not (trains or method.remote) else "–",
            _word(support.merges) if adapter else "–",
            _word(support.mixes) if adapter else "–",
            "–" if method.remote else "static, LoRA engines" if support.plain_lora else "static",
            _word(support.replicas) if trains else "–",
            _word(support.shards) if trains else "–",
            _word(support.packs) if trains else "–",
            _word(support.recomputes) if trains else "–",
        ]
        rows.append(f"| `{method.model_fields['name'].default}` | " + " | ".join(cells) + " |")
    return _SUPPORT_WORDS + "\n".join(rows) + "\n"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _variant(cls: type[BaseModel]) -> str:
    return f"### `{cls.model_fields['name'].default}`\n\n{_first_line(cls)}\n\n{_table(cls, skip=('name',))}"


def _table(cls: type[BaseModel], skip: tuple[str, ...] = ()) -> str:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        if name in skip or field.exclude:
            continue
        words = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {words} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""


def _type(annotation: Any) -> str:
    return "`" + _words(annotation).replace("|", "\\|") + "`"


def _words(annotation: Any) -> str:
    """A type as a reader of YAML knows it."""
    kind, inside = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return "metric" if annotation is AnyMetric else _words(inside[0])
    if kind in (Literal, Union, UnionType):
        words = [str(part) if isinstance(part, str | int) else _words(part) for part in inside]
        return " | ".join(dict.fromkeys(words))
    if kind in (tuple, list):
        return f"list of {_words(inside[0])}"
    if kind is dict:
        return f"mapping of {_words(inside[1])}" if inside[1] is not Any else "mapping"
    if _models(annotation) and annotation is not Constraint:
        return "mapping"
    name = str(annotation.__name__)
    return _PLAIN.get(name, name)


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return "see below"
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value, default=str)}`"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models inside a type, of a union each."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.stdout.write(markdown())
