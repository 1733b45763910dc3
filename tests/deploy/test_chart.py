"""The Helm chart, rendered by helm itself and held against Kubernetes' own schemas."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings

CHART = Path(__file__).parent.parent.parent / "deploy" / "helm" / "trunkline"
HELM = shutil.which("helm")
VARIANTS = {
    "default": (),
    "gpu": ("gpu.count=1", "settings.device=cuda", "image.repository=trunkline-cuda"),
    "backbone": ("backbone.existingClaim=trunks", "backbone.path=shakespeare"),
    "several": ("registry.perPod=true", "replicas=3", "registry.storageClass=fast"),
    "scaled": ("registry.perPod=true", "autoscaling.enabled=true"),
}

pytestmark = pytest.mark.skipif(HELM is None, reason="helm is not there")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *arguments], capture_output=True, text=True, check=False)


def rendered(*values: str) -> dict[str, dict[str, Any]]:
    """The objects by kind."""
    flags = [flag for value in values for flag in ("--set", value)]
    done = helm("template", "test", str(CHART), *flags)
    assert done.returncode == 0, done.stderr
    return {thing["kind"]: thing for thing in yaml.safe_load_all(done.stdout) if thing}


def container_of(things: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    workload = things.get("Deployment") or things["StatefulSet"]
    pod = workload["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_the_chart_has_nothing_to_complain_of() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_object_fits_its_schema(values: tuple[str, ...]) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for thing in rendered(*values).values():
        schemas.validate(thing, "1.31", strict=True)


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_no_pod_gets_variables_of_other_services(values: tuple[str, ...]) -> None:
    pod, _ = container_of(rendered(*values))
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_grace_covers_a_whole_drain(values: tuple[str, ...]) -> None:
    pod, container = container_of(rendered(*values))
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    window = float(environment["TRUNKLINE_DRAIN_WINDOW_S"])
    longest = Settings().default_timeout_ms / 1e3
    assert pod["terminationGracePeriodSeconds"] >= sleep + window + longest


def test_settings_are_ones_that_the_server_takes() -> None:
    _, container = container_of(rendered("settings.max_body_bytes=8388608"))
    names = {entry["name"].removeprefix("TRUNKLINE_").lower(): entry for entry in container["env"]}
    assert set(names) <= set(Settings.model_fields)
    assert Settings(**{name: entry["value"] for name, entry in names.items()})
    assert names["max_body_bytes"]["value"] == "8388608"


def test_a_pod_runs_without_rights_and_asks_the_right_paths() -> None:
    pod, container = container_of(rendered())
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_a_service_monitor_sends_the_key_of_its_secret() -> None:
    assert "ServiceMonitor" not in rendered()
    monitor = "metrics.serviceMonitor"
    things = rendered(f"{monitor}.enabled=true", f"{monitor}.keySecret.name=scraper")
    (endpoint,) = things["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "scraper", "key": "key"}
    port = things["Service"]["spec"]["ports"][0]["name"]
    assert (endpoint["port"], endpoint["path"]) == (port, "/metrics")
    (open_one,) = rendered(f"{monitor}.enabled=true")["ServiceMonitor"]["spec"]["endpoints"]
    assert "authorization" not in open_one


def test_a_gpu_is_asked_for_only_where_it_is_wanted() -> None:
    _, plain = container_of(rendered())
    _, gpu = container_of(rendered(*VARIANTS["gpu"]))
    assert "nvidia.com/gpu" not in plain["resources"]["limits"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("value", ["replicas=2", "autoscaling.enabled=true"])
def test_two_servers_on_one_data_folder_are_refused_with_a_sentence(value: str) -> None:
    done = helm("template", "test", str(CHART), "--set", value)
    assert done.returncode != 0
    assert "registry.perPod" in done.stderr


def test_a_budget_is_there_where_there_is_more_than_one_pod() -> None:
    assert "PodDisruptionBudget" not in rendered()
    for name in ("several", "scaled"):
        assert "PodDisruptionBudget" in rendered(*VARIANTS[name])
    assert "HorizontalPodAutoscaler" in rendered(*VARIANTS["scaled"])
