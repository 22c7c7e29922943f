"""The one place that knows MLflow: its server, the runs of a sweep, the saved view, the registry."""

import os

# Read by MLflow when it is imported, so before any module of this package does. A fine-tuning job should
# not call home, nor write a link and a progress bar to standard output for every run it closes.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Its seven tries block for minutes; what can wait for a server that is away is tried again by a thread.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}.items():
    os.environ.setdefault(_name, _value)
