"""What Prometheus and Grafana are told to look at is in the metrics of a real gateway, and alerts rise when they should."""

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deferral.gateway.experts_file import Expert
from deferral.gateway.history import history
from deferral.gateway.metrics import Metrics
from deferral.gateway.settings import Settings
from deferral.gateway.status import status
from tests.faulty_upstream import Upstream
from tests.handmade_cascade import GUESS, unsure_router
from tests.running_gateway import EASY, HARD, RunningGateway, small_router

ROOT = Path(__file__).parent.parent
ALERTS = ROOT / "deploy" / "watch" / "alerts.yaml"
DASHBOARD = ROOT / "deploy" / "watch" / "dashboard.json"
ADMIN = "admin-key-of-the-tests"
# Labels that the scraper adds.
SCRAPED = {"job", "instance"}


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def expressions() -> list[str]:
    """Of the alerts, and of the dashboard with its variables filled in."""
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    for name, value in (("$__rate_interval", "1m"), ("$__range", "6h"), ("$job", ".*"), ("$instance", ".*")):
        shown = [expression.replace(name, value) for expression in shown]
    return [rule["expr"] for rule in rules()] + shown


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool was not found; install it, as with `apt-get install prometheus`")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The samples of a gateway to which everything has happened: their names, and their labels."""
    folder = tmp_path_factory.mktemp("watch")
    router = unsure_router()
    router.save(folder / "router")
    settings = Settings(database=str(folder / "gateway.db"), admin_key=ADMIN, shadow_folder=folder / "router")
    with Upstream() as upstream:
        experts = {
            name: Expert(name, upstream.url, input_price=price, output_price=price, logprobs=True)
            for name, price in (("small", 1.0), ("large", 100.0))
        }
        with RunningGateway(router, experts, settings) as gateway:
            token, _ = gateway.state.keys.create("tests", budget=1.0)
            for text in (EASY, HARD, f"{GUESS} 72"):
                assert gateway.chat(text, key=token)[0] == 200
            assert gateway.chat(EASY, key=token, model="nobody")[0] == 404
            upstream.behave("small", "status-500")
            assert gateway.chat(EASY, key=token)[0] == 200
            gateway.state.record.stop()
            gateway.state.alarms.look(gateway.state.current.decider.expected)
            text = gateway.ask("GET", "/metrics", key=ADMIN)[2].decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_what_is_counted_begins_at_nothing_so_that_a_scraper_sees_the_first_of_it() -> None:
    metrics = Metrics()
    metrics.answered(
        "small", "ok", price=0.5, best_price=1.0, input_tokens=3, output_tokens=4, first_byte_s=0.1, latency_s=0.2
    )  # fmt: skip
    # As after a reload: what was counted stays.
    metrics.expect(["small", "large"])
    text = asyncio.run(metrics.text()).decode()
    for line in (
        'deferral_price_dollars_total{expert="small"} 0.5',
        'deferral_price_dollars_total{expert="large"} 0.0',
        'deferral_answers_total{expert="large",outcome="truncated"} 0.0',
        'deferral_tokens_total{direction="input",expert="large"} 0.0',
        'deferral_requests_total{path="chat",status="503"} 0.0',
        'deferral_requests_total{path="responses",status="500"} 0.0',
    ):
        assert line in text


@pytest.mark.ci_slow
def test_metrics_page_and_status_tell_of_the_same_outage(tmp_path: Path) -> None:
    dead = {name: Expert(name, "http://127.0.0.1:1/v1", input_price=1.0, output_price=1.0) for name in ("small", "large")}
    settings = Settings(database=str(tmp_path / "gateway.db"), admin_key=ADMIN)
    with RunningGateway(small_router(), dead, settings) as gateway:
        statuses = Counter(gateway.chat(EASY)[0] for _ in range(20))
        assert set(statuses) == {502, 503}, "at first they do not answer, then they are not asked any more"
        text = gateway.ask("GET", "/metrics", key=ADMIN)[2].decode()
        for code, count in statuses.items():
            assert f'deferral_requests_total{{path="chat",status="{code}"}} {count:.1f}' in text
        gateway.state.record.stop()
        shares = status(gateway.state.record.engine, []).shares
        assert [(share.expert, share.requests, share.failed) for share in shares] == [("", 20, 20)]
        totals = history(gateway.state.record.engine, since=time.time() - 3600, until=time.time() + 60).totals
        assert (totals[""].requests, totals[""].failed) == (20, 20)


@pytest.mark.ci_slow
def test_every_metric_and_label_that_is_looked_at_is_shown_by_a_gateway(shown: dict[str, set[str]]) -> None:
    for expression in expressions():
        names = set(re.findall(r"\bdeferral_\w+", expression))
        assert names <= shown.keys(), expression
        known = set.union(SCRAPED, *(shown[name] for name in names))
        # The brackets of a job may come without its metric, as in up{...}.
        selected = set(re.findall(r'(\w+)\s*(?:=|!=|=~|!~)\s*"', expression))
        grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}
        assert selected | grouped <= known, expression


@pytest.mark.ci_slow
def test_what_alerts_and_legends_say_is_there_to_be_said(shown: dict[str, set[str]]) -> None:
    every = set.union(SCRAPED, *shown.values())
    for rule in rules():
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= every
    for variable in dashboard()["templating"]["list"]:
        assert set(re.findall(r"\bdeferral_\w+", str(variable["query"]))) <= shown.keys()
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            assert named <= grouped, panel["title"]


def test_values_of_labels_are_those_of_the_gateway() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "deferral" / "gateway").glob("*.py"))
    for expression in expressions():
        for value in re.findall(r'\b(?:code|kind|outcome|path|what|alarm)="(\w+)"', expression):
            assert f'"{value}"' in source, expression


def test_every_alert_says_what_it_means_and_what_to_do_and_is_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    for rule in rules():
        assert {"summary", "description", "action"} == set(rule["annotations"])
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert f"`{rule['alert']}`" in runbook
    assert len({rule["alert"] for rule in rules()}) == len(rules()) <= 12


def test_the_panels_lie_beside_each_other_and_have_a_source() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        sources = [panel, *panel["targets"]] if panel["type"] != "row" else []
        assert all(one["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for one in sources)


@pytest.mark.ci_slow
def test_promtool_reads_the_rules_and_what_the_dashboard_asks(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS))
    asked = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions())]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    promtool("check", "rules", str(tmp_path / "asked.yaml"))


@pytest.mark.ci_slow
def test_the_alerts_rise_on_what_they_are_for_and_on_nothing_else() -> None:
    path = ROOT / "tests" / "alert_rules.yaml"
    text = path.read_text(encoding="utf-8")
    for rule in rules():
        assert f'ALERTS{{alertname="{rule["alert"]}",alertstate="firing"' in text, "no case in which it rises"
    promtool("test", "rules", str(path))
