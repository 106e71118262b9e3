"""Runs in MLflow. `store.py`, `source.py` and `system.py` are the only files that import mlflow."""

from repfusion.tracking.config import TrackingConfig, flatten
from repfusion.tracking.store import (
    StoreError,
    metric_history,
    newest_experiment,
    prepare_store,
    sqlite_path,
    sqlite_uri,
    store_identity,
)
from repfusion.tracking.tracker import Tracker

__all__ = [
    "StoreError",
    "Tracker",
    "TrackingConfig",
    "flatten",
    "metric_history",
    "newest_experiment",
    "prepare_store",
    "sqlite_path",
    "sqlite_uri",
    "store_identity",
]
