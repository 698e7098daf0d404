"""The command ``phoenix-ml``. Exit codes: 0, 1 (failed), 2 (usage)."""

# Each module adds its commands to the group.
from phoenix_ml.cli import calls, events, features, models, monitoring, predictions, serving
from phoenix_ml.cli.common import main

__all__ = ["calls", "events", "features", "main", "models", "monitoring", "predictions", "serving"]
