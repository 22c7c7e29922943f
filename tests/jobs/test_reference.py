"""Documentation that is generated must be what the code says now."""

import json
from pathlib import Path

from jobs.reference import markdown, schema
from regraft.config import Experiment

DOCS = Path(__file__).parents[2] / "docs"


def test_the_configuration_reference_is_current():
    assert (DOCS / "configuration.md").read_text() == markdown(), (
        "run: python -m jobs.reference > docs/configuration.md"
    )


def test_the_schema_names_every_section():
    assert set(json.loads(schema())["properties"]) == set(Experiment.model_fields)
