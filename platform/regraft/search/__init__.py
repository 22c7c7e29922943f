"""How the space of methods is searched, and when a trial is stopped: settings and behaviour, without Ray.

To add a search, write one file with a subclass of `Search` and add it to `AnySearch`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from regraft.search.base import Outcome, Proposer, Search
from regraft.search.grid import Draws, Grid
from regraft.search.space import Arm, SearchError, arms, expand
from regraft.search.stopping import AnyStopping, Asha, Median, Rule
from regraft.search.tpe import TPE

AnySearch = Annotated[Grid | Draws | TPE, Field(discriminator="name")]

__all__ = [
    "TPE",
    "AnySearch",
    "AnyStopping",
    "Arm",
    "Asha",
    "Draws",
    "Grid",
    "Median",
    "Outcome",
    "Proposer",
    "Rule",
    "Search",
    "SearchError",
    "arms",
    "expand",
]
