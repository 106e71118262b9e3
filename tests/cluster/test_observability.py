"""The dashboard and the alerts ask for what the code emits, and for all of it."""

import re

import pytest
from observed import dashboard, names_in, panels, queries, rules

from pipelines.runtime.metrics import METRICS

EXPORTED = {metric.exported: metric for metric in METRICS}
LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def test_every_metric_that_is_asked_for_is_emitted_and_every_emitted_one_is_shown():
    assert {name for query in queries() for name in names_in(query)} == EXPORTED.keys()
    shown = {name for panel in panels() for one in panel["targets"] for name in names_in(one["expr"])}
    assert shown == EXPORTED.keys()


def test_metrics_have_names_of_their_own_and_say_what_they_count():
    assert len(EXPORTED) == len(METRICS)
    assert all(re.fullmatch(r"repfusion(_[a-z]+)+", metric.name) and metric.text for metric in METRICS)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: f"{panel['id']} {panel['title']}")
def test_a_panel_s_queries_use_labels_that_their_metrics_have(panel):
    for target in panel["targets"]:
        every = [EXPORTED[name] for name in names_in(target["expr"])]
        grouped = {
            name for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(", ")
        }
        used = grouped | {*LEGEND.findall(target["legendFormat"])}
        assert all(used <= {*metric.labels} for metric in every), target
        assert target["expr"].count('workflow=~"$workflow"') == len(re.findall(r"\bray_\w+", target["expr"]))
        counters = [one for one in every if one.kind == "counter"]
        assert all(re.search(rf"(rate|increase)\({one.exported}\{{", target["expr"]) for one in counters)


def test_the_dashboard_is_one_that_grafana_lays_out():
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in every):
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert {one["name"] for one in dashboard()["templating"]["list"]} == {"datasource", "workflow"}


def test_alerts_ask_for_no_label_that_their_metric_lacks_and_say_what_to_do():
    assert {"StalledStage", "StalledTraining", "FailingEvaluation"} <= {rule["alert"] for rule in rules()}
    for rule in rules():
        (name,) = names_in(rule["expr"])
        texts = rule["annotations"]
        used = {*re.findall(r"\$labels\.(\w+)", " ".join(texts.values()))}
        assert used <= {*EXPORTED[name].labels} and EXPORTED[name].kind == "gauge"
        assert texts["summary"] and texts["description"] and rule["labels"]["severity"]
