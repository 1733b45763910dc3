"""What an operator sees: metrics by adapter within a bound, log lines as JSON, traces."""

import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import Serve, Served
from prometheus_client.parser import text_string_to_metric_families

from server.top import OTHER, TopAdapters, TopKeys

IDS = [20, 21, 22]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def samples(served: Served) -> dict[str, float]:
    """Every sample's value by its name and, where it has one, its adapter."""
    with served.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name + (f" {sample.labels['adapter']}" if "adapter" in sample.labels else ""): value
        for family in families
        for sample in family.samples
        for value in [sample.value]
    }


def test_metrics_tell_of_every_step_and_of_every_adapter(tiny_backbone: Path, serve: Serve) -> None:
    served = serve(tiny_backbone, "--dtype", "float32")
    with served.client() as client:
        for adapter, times in (("plain", 3), ("full", 1), (None, 2)):
            for _ in range(times):
                client.post("/encode", json={"adapter": adapter, "inputs": ["to be", IDS]})
    found = samples(served)
    rows = {name: found[f"trunkline_adapter_rows_total {name}"] for name in ("plain", "full")}
    assert rows == {"plain": 6, "full": 2}
    assert found["trunkline_adapter_rows_total base"] == 4
    tokens = sum(v for name, v in found.items() if name.startswith("trunkline_adapter_tokens_tot"))
    assert tokens == found["trunkline_tokens_total"]
    assert found["trunkline_queue_seconds_count"] == 12
    assert found["trunkline_tokenize_seconds_count"] == 6
    assert found["trunkline_adapter_load_seconds_count"] == 2
    assert found["trunkline_forward_seconds_count"] > 0
    assert "trunkline_event_loop_lag_seconds_count" in found


def test_the_most_used_adapters_are_told_apart_and_no_series_goes_down() -> None:
    dice, top = random.Random(0), TopAdapters(most=5)
    seen: dict[str, float] = {}
    all_rows = all_tokens = 0
    for round_ in range(40):
        for _ in range(100):
            name = f"adapter-{(dice.randrange(12) + round_ // 8) % 20}"
            tokens = dice.randrange(1, 9)
            top.count(name, 1, tokens)
            all_rows, all_tokens = all_rows + 1, all_tokens + tokens
        rows, ran = ({s.labels["adapter"]: s.value for s in m.samples} for m in top.collect())
        assert set(rows) == set(ran)
        assert len(rows) <= 6
        assert (sum(rows.values()), sum(ran.values())) == (all_rows, all_tokens)
        assert rows[OTHER] >= seen.get(OTHER, 0)
        assert all(rows[name] >= seen[name] for name in set(rows) & set(seen) - {OTHER})
        seen = rows


def test_memory_of_names_is_bounded_and_no_sum_changes_by_it() -> None:
    top = TopAdapters(most=5, many=40)
    rows_so_far = []
    for name in range(500):
        top.count(f"short-{name}", 1, 2)
        top.count("long", 1, 3)
        if name % 7 == 0:
            rows_so_far.append(sum(s.value for s in next(iter(top.collect())).samples))
    rows, tokens = (sum(s.value for s in m.samples) for m in top.collect())
    assert (rows, tokens) == (1000, 2500)
    assert rows_so_far == [2 * (name + 1) for name in range(0, 500, 7)]
    assert len(top.usage._totals) <= 40
    assert all(len(view._seen) <= 40 for view in top.usage._views.values())


def test_series_of_a_limited_key_do_not_depend_on_others_and_never_go_down() -> None:
    top, alone = TopAdapters(most=2), TopAdapters(most=2)
    for round_ in range(20):
        for name, rows in (("acme/a", 1), ("acme/b", 2), ("acme/c", round_)):
            for _ in range(rows):
                top.count(name, 1, 1)
                alone.count(name, 1, 1)
        for other in range(round_):
            top.count(f"zeta/{other}", 1, 1)
        own, same = (
            {s.labels["adapter"]: s.value for m in each for s in m.samples}
            for each in (
                top.collect_own(("acme/*",), lambda name: name.startswith("acme/")),
                alone.collect(),
            )
        )
        assert own == same
        list(top.collect())


def test_a_revoked_key_s_usage_goes_to_other_and_no_key_has_a_series_for_ever() -> None:
    top, live = TopKeys(most=3), {"a": "one", "b": "two"}
    top.names = lambda: live
    for key in live:
        top.answered(key, refused=key == "b")
        top.ran(key, 2, 7)
    before = {(s.name, s.labels["key"]): s.value for m in top.collect() for s in m.samples}
    assert before["trunkline_key_refusals_total", "b"] == 1
    del live["b"]
    after = {(s.name, s.labels["key"]): s.value for m in top.collect() for s in m.samples}
    assert {key for _, key in after} == {"a", OTHER}
    for what, value in (("requests", 1), ("refusals", 1), ("rows", 2), ("tokens", 7)):
        assert after[f"trunkline_key_{what}_total", OTHER] == value
    for key in range(10):
        live[f"k{key}"] = "more"
        top.answered(f"k{key}", refused=False)
    assert len({s.labels["key"] for m in top.collect() for s in m.samples}) == 4


def test_log_lines_are_json_with_the_request_id_of_the_answer(
    tiny_backbone: Path, serve: Serve
) -> None:
    served = serve(tiny_backbone, "--dtype", "float32", "--log-format", "json")
    with served.client() as client:
        answers = [
            client.post("/encode", json={"adapter": "plain", "inputs": [IDS]}),
            client.get("/no\u2028such", headers={"x-request-id": "mine-1"}),
        ]
    assert served.stop() == 0
    lines = [line for line in served.log.read_text("utf-8").splitlines() if line[:1] == "{"]
    by_id = {entry.get("request_id"): entry for entry in map(json.loads, lines)}
    first, second = (by_id[answer.headers["x-request-id"]] for answer in answers)
    assert (first["route"], first["status"], first["level"]) == ("/encode", 200, "info")
    assert (first["rows"], first["tokens"], first["adapters"]) == (1, 3, ["plain"])
    assert first["forward_ms"] <= first["total_ms"]
    assert (second["request_id"], second["status"]) == ("mine-1", 404)


@pytest.mark.parametrize("level", ["info", "warning"])
def test_every_line_of_a_server_that_logs_json_is_json_from_its_start_to_its_end(
    level: str, tiny_backbone: Path, serve: Serve
) -> None:
    arguments = ("--dtype", "float32", "--log-format", "json", "--log-level", level)
    served = serve(tiny_backbone, *arguments)  # standard output and error in one file
    with served.client() as client:
        client.post("/encode", json={"adapter": "plain", "inputs": [IDS]})
        info = client.get("/info").json()
    assert served.stop() == 0
    first, *others = map(json.loads, served.log.read_text("utf-8").splitlines())
    assert bool(others) == (level == "info")
    assert first["url"] == served.url
    assert served.url in first["message"].split()
    assert (first["level"], first["backbone"]) == ("info", "tiny")
    assert (first["adapters"], first["adapter_count"]) == (["classes", "full", "plain"], 3)
    told = ("version", "dtype", "device", "operators")
    assert [first[name] for name in told] == [info[name] for name in told]
    assert first["digest"] == info["backbone"]["digest"]


@pytest.mark.parametrize("fault", ["folder", "port"])
def test_why_a_server_that_logs_json_does_not_start_is_a_json_line(
    fault: str, tiny_backbone: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1] if fault == "port" else 0)
        folder = tmp_path if fault == "folder" else tiny_backbone
        command = [sys.executable, "-m", "server.cli", "serve", str(folder), "--port", port]
        command += ["--log-format", "json", "--data", str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["level"] == "error"
    assert ("can't listen on" if fault == "port" else "config.json") in line["message"]


class Collector(BaseHTTPRequestHandler):
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[str]:
    Collector.bodies.clear()
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_is_a_span_of_its_callers_trace(
    collector: str, tiny_backbone: Path, serve: Serve
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="traces need the extra `otel`")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: PLC0415
        ExportTraceServiceRequest,
    )

    served = serve(tiny_backbone, "--dtype", "float32", "--otlp-endpoint", collector)
    with served.client() as client:
        caller = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        answer = client.post("/encode", json={"adapter": "plain", "inputs": [IDS]}, headers=caller)
    assert served.stop() == 0
    spans = [
        span
        for body in Collector.bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    (span,) = [span for span in spans if span.name == "POST /encode"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    facts = {a.key: a.value for a in span.attributes}
    assert facts["http.response.status_code"].int_value == 200
    assert facts["trunkline.tokens"].int_value == 3
    assert facts["trunkline.request_id"].string_value == answer.headers["x-request-id"]
    assert [v.string_value for v in facts["trunkline.adapters"].array_value.values] == ["plain"]


def test_a_collector_that_is_away_costs_no_request(tiny_backbone: Path, serve: Serve) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="traces need the extra `otel`")
    served = serve(tiny_backbone, "--dtype", "float32", "--otlp-endpoint", "http://127.0.0.1:9")
    with served.client() as client:
        answer = client.post("/encode", json={"adapter": "plain", "inputs": [IDS]})
    assert answer.status_code == 200
    assert served.stop() == 0
