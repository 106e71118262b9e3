"""The dashboard and the alerts of cluster/observability, and what a scrape of Ray's exporter holds."""

import json
import re
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

FOLDER = Path(__file__).parents[2] / "cluster/observability"
NAME = re.compile(r"\bray_\w+")


def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "dashboard.json").read_text())


def panels() -> list[dict[str, Any]]:
    """All panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def queries() -> list[str]:
    """Every expression of the dashboard and of the alerts."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*shown, *(rule["expr"] for rule in rules())]


def names_in(text: str) -> set[str]:
    """The metrics of an expression."""
    return {*NAME.findall(text)}


Series = dict[frozenset[tuple[str, str]], float]


def scrape(port: int) -> dict[str, Series]:
    """Our metrics as an exporter on loopback has them: name -> labels -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, Series] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_repfusion_"):
                found[sample.name][frozenset(sample.labels.items())] = sample.value
    return found


def value_of(series: Series, **labels: str) -> float:
    """The sum of the series that have these labels."""
    return sum(value for found, value in series.items() if labels.items() <= found)
