"""A node's processors, memory, disks, network and GPUs -> metrics `system/NODE/...` of a run, by MLflow's
monitor.
"""

import logging
import sys
from collections.abc import Callable, Mapping

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from repfusion.tracking.store import with_driver

log = logging.getLogger("repfusion.tracking")
STOP_SEC = 10.0


class NodeMonitor(SystemMetricsMonitor):
    """MLflow's monitor with its figures given to `put(metrics, step)`: its own loop ends for good when the
    store does not answer once.
    """

    def __init__(
        self,
        put: Callable[[Mapping[str, float], int], None],
        uri: str,
        run_id: str,
        node: str,
        interval_sec: float,
    ):
        super().__init__(
            run_id,
            sampling_interval=interval_sec,
            resume_logging=True,
            node_id=node,
            tracking_uri=with_driver(uri),
        )
        self.put = put
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and len(self.monitors) == 3:
            log.warning("no figures of the GPUs: MLflow reads them through the package nvidia-ml-py")

    def monitor(self) -> None:
        while not self._shutdown_event.is_set():
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    break
            self.publish_metrics(self.aggregate_metrics())

    def publish_metrics(self, metrics: Mapping[str, float]) -> None:
        self.put(
            {f"system/{self.node_id}/{name}": value for name, value in metrics.items()}, self._logging_step
        )
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()

    def finish(self) -> None:
        """Ends the thread, with its last figures put."""
        self._shutdown_event.set()
        if self._process is not None:
            self._process.join(STOP_SEC)
            self._process = None
