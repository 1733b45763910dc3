"""Rules and dashboard against what the server really exports, read by a real Prometheus."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import httpx
import pytest
import yaml
from conftest import Serve, Served

from loadtest.adapter_file import AdapterMaker
from server.keys import new_key
from server.routes import adapters, critic, encode, openai, residency

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/trunkline.json").read_text("utf-8"))
# Made by Prometheus itself, or by the rules
RECORDED = {
    rule["record"]
    for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    for rule in group["rules"]
    if "record" in rule
}


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not there (Debian package prometheus)")
    return found


def dashboard_expressions() -> list[str]:
    targets = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]
    return [expr.replace("$__rate_interval", "30s").replace("$instance", ".*") for expr in targets]


def rule_expressions() -> list[str]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def exported(tiny_server: Served) -> set[str]:
    """Names of the samples that the server exports, once it has answered something."""
    with tiny_server.client() as client:
        client.post("/encode", json={"adapter": "plain", "inputs": "to be"})
        text = client.get("/metrics").text
    return set(re.findall(r"^((?:trunkline|process)_\w+)[{ ]", text, re.MULTILINE))


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *rule_expressions()])
def test_an_expression_asks_for_metrics_that_are_exported(
    expression: str, exported: set[str]
) -> None:
    bare = re.sub(r'"[^"]*"', "", expression)
    asked = set(re.findall(r"\b(?:trunkline[_:]|process_)[\w:]+", bare)) - RECORDED
    assert asked or "up" in bare or any(name in bare for name in RECORDED)
    assert asked <= exported


def test_routes_of_the_dashboard_are_the_servers(tiny_server: Served) -> None:
    paths = {r.path for m in (adapters, critic, encode, openai, residency) for r in m.router.routes}
    for expression in [*dashboard_expressions(), *rule_expressions()]:
        for operator, value in re.findall(r'route(=~?)"([^"]+)"', expression):
            routes = value.split("|") if operator == "=~" else [value]
            assert set(routes) <= paths


ALERTS = {  # by the code of an answer of 503 or 500, every second: what fires within 15 minutes
    "draining": set(),
    "overloaded": {"TrunklineOverloaded"},
    "not_ready": {"TrunklineErrors"},
    "internal_error": {"TrunklineErrors"},
    "read_only": {"TrunklineErrors", "TrunklineWritesRefused"},
}


def test_refusals_that_are_meant_do_not_trip_the_error_alert(tmp_path: Path) -> None:
    def series(code: str, status: int) -> dict[str, str]:
        labels = f'route="/encode",status="{status}",code="{code}",instance="one",job="trunkline"'
        return {"series": f"trunkline_requests_total{{{labels}}}", "values": "0+60x20"}

    alerts = set().union(*ALERTS.values())
    cases = []
    for code, firing in ALERTS.items():
        expected = [
            {
                "alertname": name,
                "eval_time": "15m",
                "exp_alerts": [fired(name)] if name in firing else [],
            }
            for name in sorted(alerts)
        ]
        status = 500 if code == "internal_error" else 503
        given = [series("", 200), series(code, status)]
        cases.append({"interval": "1m", "input_series": given, "alert_rule_test": expected})
    (tmp_path / "tests.yml").write_text(json.dumps({"rule_files": [str(RULES)], "tests": cases}))
    done = subprocess.run(
        [tool("promtool"), "test", "rules", str(tmp_path / "tests.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def fired(alert: str) -> dict[str, Any]:
    """The alert as promtool expects it of the instance `one`."""
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    (rule,) = [rule for group in groups for rule in group["rules"] if rule.get("alert") == alert]
    summary = rule["annotations"]["summary"].replace("{{ $labels.instance }}", "one")
    labels = {"instance": "one", **rule["labels"]}
    return {"exp_labels": labels, "exp_annotations": {"summary": summary}}


def test_the_shipped_prometheus_is_given_its_key_by_compose() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
    (secret,) = compose["services"]["prometheus"]["secrets"]
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text("utf-8"))
    (scrape,) = config["scrape_configs"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    default = re.fullmatch(r"\${\w+:-(.+)}", compose["secrets"][secret]["file"])
    assert (ROOT / default[1]).read_text().strip()  # a server without keys takes anything


def test_the_rules_are_well_formed() -> None:
    done = subprocess.run(
        [tool("promtool"), "check", "rules", str(RULES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Keyed:
    """A server with keys: its operator's client, and the key that Prometheus is to have."""

    served: Served
    client: httpx.Client
    metrics_key: str


@pytest.fixture
def keyed(tiny_backbone: Path, serve: Serve, tmp_path: Path) -> Iterator[Keyed]:
    file = tmp_path / "keys.json"
    _, secret = new_key(file, "operator", scopes=frozenset({"infer", "admin"}))
    _, metrics_key = new_key(file, "prometheus", scopes=frozenset({"metrics"}))
    served = serve(tiny_backbone, "--dtype", "float32", "--keys", file)
    with served.client(headers={"x-api-key": secret}) as client:
        yield Keyed(served, client, metrics_key)


def shipped_config(keyed: Keyed, key_file: Path) -> dict[str, Any]:
    """The Prometheus configuration that we ship, with another target, clock and key file."""
    config: dict[str, Any] = yaml.safe_load((RULES.parent / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES.parent / name) for name in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    scrape["authorization"]["credentials_file"] = str(key_file)
    scrape["static_configs"][0]["targets"] = [keyed.served.url.removeprefix("http://")]
    return config


@pytest.fixture
def prometheus(keyed: Keyed, tmp_path: Path) -> Iterator[httpx.Client]:
    """A real one, with our rules, that reads the server with its key every second."""
    binary = tool("prometheus")
    (tmp_path / "metrics.key").write_text(f"{keyed.metrics_key}\n")
    config = shipped_config(keyed, tmp_path / "metrics.key")
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [
            binary,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=log,
        env=os.environ | {"GOMAXPROCS": "1"},
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        yield client
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    log.close()


def query(prometheus: httpx.Client, expression: str) -> dict[str, Any]:
    answer: dict[str, Any] = prometheus.get("/api/v1/query", params={"query": expression}).json()
    return answer


def live(client: httpx.Client, maker: AdapterMaker, seed: int) -> None:
    """A little of everything that a panel shows: answers, a refusal, swaps."""
    for path in ("/encode", "/critic"):
        client.post(path, json={"adapter": "full", "inputs": "to be"}).raise_for_status()
    assert client.post("/encode", json={"adapter": "nobody", "inputs": "a"}).status_code == 404
    octets = {"content-type": "application/octet-stream"}
    client.put("/adapters/watched", content=maker.file(seed), headers=octets).raise_for_status()
    for alias in ("stable", "current"):
        path = f"/adapters/watched/aliases/{alias}"
        client.put(path, json={"version": 1}).raise_for_status()
    client.post("/adapters/watched/unload").raise_for_status()


def unanswered(prometheus: httpx.Client) -> list[str]:
    """The dashboard's expressions that have no value."""
    empty = []
    for expression in dashboard_expressions():
        answer = query(prometheus, expression)
        assert answer["status"] == "success", (expression, answer)
        if not answer["data"]["result"]:
            empty.append(expression)
    return empty


def test_a_real_prometheus_reads_the_server_and_answers_every_panel(
    prometheus: httpx.Client, keyed: Keyed
) -> None:
    assert httpx.get(f"{keyed.served.url}/metrics").status_code == 401  # it needs its key
    deadline = time.monotonic() + 60
    info = keyed.client.get("/info").json()
    maker = AdapterMaker(info["config"], info["backbone"]["digest"], rank=2)
    for seed in itertools.count():  # until there are rates, which need two readings
        live(keyed.client, maker, seed)
        try:
            empty = unanswered(prometheus)
        except (httpx.TransportError, ValueError):  # it is not listening, or not ready
            empty = ["all"]
        if not empty:
            break
        assert time.monotonic() < deadline, empty
        time.sleep(0.5)
    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    assert query(prometheus, 'up{job="trunkline"} == 1')["data"]["result"]


def test_grafana_finds_the_dashboard_and_its_data_where_it_is_told_to() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards/trunkline.yaml").read_text())[
        "providers"
    ]
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    mounts = dict(v.split(":")[:2] for v in compose["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert source["url"] == "http://prometheus:9090"
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places)
