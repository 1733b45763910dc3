"""Clients that know HTTP alone and offer an upgrade to HTTP/2 by default: answered as ever."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clients.catalogue import PROGRAMS
from clients.comparing import BY_MODEL, TOLERANCE, encoded
from clients.runs import replaced
from clients.table import Table
from conftest import Served

TEXT = "In the beginning"  # of the program
JAVA = shutil.which("java")
CURL = shutil.which("curl")


@pytest.fixture(scope="module")
def expected(server: Served, adapters: dict[str, str]) -> np.ndarray:
    return encoded(server, adapters["scripture"], [TEXT])


def version_of(*command: str) -> str:
    """The second word of a program's first line, without quotes."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


@pytest.mark.skipif(JAVA is None, reason="no java on this machine")
def test_the_stock_java_client(
    server: Served, adapters: dict[str, str], expected: np.ndarray, tmp_path: Path, table: Table
) -> None:
    """HttpClient.newHttpClient() sends `Upgrade: h2c` with its first request, body and all."""
    program = tmp_path / "Encode.java"
    code = (PROGRAMS / "Encode.java").read_text("utf-8")
    program.write_text(replaced(code, server.url, adapters), encoding="utf-8")
    command = [JAVA, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(rows(done.stdout), expected, **TOLERANCE)
    name = "Java `HttpClient` (java.net.http)"
    table.fill(name, version_of(JAVA, "--version"), BY_MODEL, "exact (`adapter`)")


@pytest.mark.skipif(CURL is None, reason="no curl on this machine")
def test_curl_that_offers_http2(
    server: Served, adapters: dict[str, str], expected: np.ndarray, table: Table
) -> None:
    body = json.dumps({"adapter": adapters["scripture"], "inputs": TEXT})
    headers = ("-H", "content-type: application/json")
    command = [CURL, "-sS", "--http2", f"{server.url}/encode", *headers, "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(rows(done.stdout), expected, **TOLERANCE)
    table.fill("`curl --http2`", version_of(CURL, "--version"), BY_MODEL, "exact (`adapter`)")


def rows(answer: str) -> np.ndarray:
    body = json.loads(answer)
    assert "data" in body, body
    return np.array([row["embedding"] for row in body["data"]])
