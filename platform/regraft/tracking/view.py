"""The saved view that makes MLflow's Runs page a leaderboard: filter, columns and charts.

MLflow keeps a shared view in an experiment tag, compressed, under a key of its own. The format is not
documented, so pyproject.toml pins MLflow and a test reads the view in a browser.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Sequence
from typing import Any

VIEW_ID = "regraft-leaderboard"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_ID}"
TAG_LIMIT = 5000

METRICS = ("rougeL", "rouge1", "token_f1", "exact_match")
COSTS = (
    "eval/loss",
    "cost/train_seconds",
    "cost/memory_peak_gib",
    "cost/trainable_parameters",
    "speed/latency_p95_ms",
)
#: What quality is drawn against, one chart each.
PRICES = ("cost/train_seconds", "speed/latency_p95_ms", "cost/memory_peak_gib")
PARAMS = ("method", "rank", "learning_rate")
SECTIONS = ("Leaderboard", "Learning curves")


def view_path(experiment_id: str) -> str:
    """The part of the URL, after the server's, that opens the view."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW_ID}"


def view_value(metrics: Sequence[str] = METRICS) -> str:
    """The value of the tag `VIEW_TAG`.

    Args:
        metrics: Names of quality metrics, without `eval/`; the first is the one to sort by.

    Raises:
        ValueError: If there are too many metrics for a tag.
    """
    packed = zlib.compress(json.dumps(_state([f"eval/{m}" for m in metrics])).encode(), 9)
    now = int(time.time() * 1000)
    value = json.dumps(
        {
            "name": "Regraft leaderboard",
            "createdAt": now,
            "updatedAt": now,
            "state": "deflate;" + base64.b64encode(packed).decode(),
        }
    )
    if len(value) > TAG_LIMIT:
        raise ValueError(
            f"a view of {len(metrics)} metrics takes {len(value)} characters; MLflow keeps {TAG_LIMIT}"
        )
    return value


def _state(quality: list[str]) -> dict[str, Any]:
    first = quality[0]
    lead, curves = (_section(i) for i in range(len(SECTIONS)))
    charts = [
        _chart(
            "PARALLEL",
            lead,
            # A run that lacks one of the axes is left out, and most methods have no rank.
            selectedParams=["method", "learning_rate"],
            selectedMetrics=["cost/train_seconds", first],
            showAllRuns=True,
        ),
        _chart("BAR", lead, metricKey=first),
        *(_scatter(lead, cost, first) for cost in PRICES),
        *(_line(curves, metric) for metric in ("train/loss", "eval/loss")),
    ]
    for number, chart in enumerate(charts):
        chart["uuid"] = f"{VIEW_ID}-chart-{number}"
    return {
        "searchFilter": "tags.role = 'trial'",
        "orderByKey": f"metrics.`{first}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"metrics.`{m}`" for m in (*quality, *COSTS)] + [f"params.`{p}`" for p in PARAMS],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": charts,
        "compareRunSections": [
            {
                "uuid": _section(number),
                "name": name,
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
                "columns": 3,
                "cardHeight": 360,
            }
            for number, name in enumerate(SECTIONS)
        ],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "groupBy": None,
        "autoRefreshEnabled": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _section(number: int) -> str:
    return f"{VIEW_ID}-section-{number}"


def _chart(kind: str, section: str, **settings: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
        **settings,
    }


def _scatter(section: str, cost: str, quality: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": cost, "type": "METRIC"}, "yaxis": {"key": quality, "type": "METRIC"}}
    return _chart("SCATTER", section, **axes)


def _line(section: str, metric: str) -> dict[str, Any]:
    return _chart(
        "LINE",
        section,
        metricKey=metric,
        selectedMetricKeys=[metric],
        lineSmoothness=0,
        scaleType="linear",
        xAxisScaleType="linear",
        xAxisKey="step",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        range={},
        ignoreOutliers=False,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )
