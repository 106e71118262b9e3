"""Checkpoints -> MLflow: a LoggedModel each, with its scores, and a version of a registered model. The alias
`best` is the version with the highest score; `latest` is MLflow's own name for the newest version. Every
function can be called again with the same result.
"""

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repfusion.files import file_sha256
from repfusion.runs.folder import COMPLETE
from repfusion.tracking.store import Point, send_output, send_points

MODEL_TYPE = "checkpoint"
UNNAMEABLE = r"[/:.%\"']"
"""Characters that a LoggedModel's name may not have."""
FILES = "files"
"""Tag of a LoggedModel and its version: `present`, or `removed` once the folder was pruned."""


def model_name(run_name: str, step: int) -> str:
    """`NAME step 500`, in the characters that a LoggedModel's name may have."""
    return f"{re.sub(UNNAMEABLE, '-', run_name)} step {step}"


def registry_name(name: str) -> str:
    """A name without the characters that a registered model's, or a query for it, may not have."""
    return re.sub(r"[/:'\"`]+", "-", name)


class Checkpoints:
    """The checkpoints of one run, as logged models and registered versions.

    Args:
        client: MlflowClient.
        registered_model: name of the registered model; other runs may have versions in it too.
    """

    def __init__(self, client: Any, run_id: str, registered_model: str):
        self.client, self.run_id, self.name = client, run_id, registry_name(registered_model)

    def find(self, step: int) -> Any | None:
        """The step's LoggedModel; the first, should there be several."""
        query = f"source_run_id = '{self.run_id}' AND tags.step = '{step}'"
        found = self.client.search_logged_models(
            [self._experiment()], query, order_by=[{"field_name": "creation_timestamp", "ascending": True}]
        )
        return found[0] if found else None

    def log(self, folder: Path, step: int) -> str:
        """Records a checkpoint's folder, whose files stay where they are; returns the LoggedModel's id."""
        complete = folder / COMPLETE
        tags = {"folder": str(folder.resolve()), FILES: "present", "step": str(step)}
        if complete.exists():
            tags["digest"] = file_sha256(complete)
        model = self._ensure(step)
        self.client.set_logged_model_tags(model.model_id, tags)
        version = self._version(step) or self._create_version(model, step)
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, version.version, key, value)
        return model.model_id

    def score(self, step: int, metrics: Mapping[str, float], best_by: str | None, time_ms: int) -> None:
        """Metrics of a checkpoint, on the run and on its LoggedModel; the version with the highest `best_by`
        of the registered model becomes `best`.

        Raises:
            ValueError: `best_by` is none of the metrics.
        """
        if best_by is not None and best_by not in metrics:
            raise ValueError(f"best_by is {best_by!r}, the metrics are {sorted(metrics)}")
        model = self._ensure(step)
        send_points(self.client, self.run_id, [Point(metrics, step, time_ms, model.model_id)])
        if best_by is None:
            return
        version = self._version(step) or self._create_version(model, step)
        self.client.set_model_version_tag(
            self.name, version.version, _score_tag(best_by), repr(metrics[best_by])
        )
        self._move_best(_score_tag(best_by))

    def forget(self, step: int) -> None:
        """The folder was pruned: what is known of the checkpoint stays, marked as without files."""
        if (model := self.find(step)) is not None:
            self.client.set_logged_model_tags(model.model_id, {FILES: "removed"})
        if (version := self._version(step)) is not None:
            self.client.set_model_version_tag(self.name, version.version, FILES, "removed")

    def _experiment(self) -> str:
        return self.client.get_run(self.run_id).info.experiment_id

    def _ensure(self, step: int) -> Any:
        model = self.find(step)
        if model is None:
            run = self.client.get_run(self.run_id)
            model = self.client.create_logged_model(
                run.info.experiment_id,
                name=model_name(run.info.run_name or "checkpoint", step),
                tags={"step": str(step)},
                source_run_id=self.run_id,
                params={**run.data.params, "step": str(step)},
                model_type=MODEL_TYPE,
            )
        if str(model.status) != "READY":
            # finalised last: a model that is not ready may lack what comes before
            send_output(self.client, self.run_id, model.model_id, step)
            model = self.client.finalize_logged_model(model.model_id, "READY")
        return model

    def _versions(self) -> list[Any]:
        """All versions that are checkpoints, of any run."""
        found, token = [], None
        while True:
            page = self.client.search_model_versions(f"name = '{self.name}'", page_token=token)
            found += [one for one in page if "step" in one.tags]
            if not (token := page.token):
                return found

    def _version(self, step: int) -> Any | None:
        own = [one for one in self._versions() if one.run_id == self.run_id and one.tags["step"] == str(step)]
        return min(own, key=lambda one: int(one.version)) if own else None

    def _create_version(self, model: Any, step: int) -> Any:
        if not self.client.search_registered_models(f"name = '{self.name}'"):
            self.client.create_registered_model(self.name)
        version = self.client.create_model_version(
            self.name,
            model.artifact_location,
            run_id=self.run_id,
            tags={"step": str(step)},
            model_id=model.model_id,
            await_creation_for=0,
        )
        # what MLflow's page of the LoggedModel links; a server sets it, a client of a database does not
        link = json.dumps([{"name": self.name, "version": version.version}])
        self.client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
        return version

    def _move_best(self, tag: str) -> None:
        # Two evaluations that end at once may each read before the other wrote: look until it stays.
        for _ in range(5):
            scores = {one.version: float(one.tags[tag]) for one in self._versions() if tag in one.tags}
            scores = {version: score for version, score in scores.items() if math.isfinite(score)}
            if not scores:
                return
            best = max(scores, key=lambda version: (scores[version], -int(version)))
            aliases = self.client.get_registered_model(self.name).aliases
            if str(aliases.get("best")) == str(best):
                return
            self.client.set_registered_model_alias(self.name, "best", best)
            time.sleep(0.05)


def _score_tag(metric: str) -> str:
    return f"score.{metric}"
