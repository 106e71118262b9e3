"""Runs in MLflow. `store.py`, `source.py` and `system.py` are the only files that import mlflow."""

from repfusion.tracking.config import TrackingConfig, flatten, without_password
from repfusion.tracking.store import StoreError, metric_history, prepare_store
from repfusion.tracking.tracker import Tracker

__all__ = [
    "StoreError",
    "Tracker",
    "TrackingConfig",
    "flatten",
    "metric_history",
    "prepare_store",
    "without_password",
]
