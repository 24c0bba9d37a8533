"""The manifests in docs/kubernetes: well-formed, consistent with each other and with what the server accepts. No
cluster is asked."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from quota.server.config import settings

FOLDER = Path(__file__).parents[2] / "docs" / "kubernetes"
POD = {"automountServiceAccountToken", "containers", "securityContext", "terminationGracePeriodSeconds", "volumes"}
CONTAINER = {
    "args",
    "env",
    "image",
    "lifecycle",
    "livenessProbe",
    "name",
    "ports",
    "readinessProbe",
    "resources",
    "securityContext",
    "startupProbe",
    "volumeMounts",
}
PROBE = {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}


def documents(name: str) -> dict[str, Any]:
    """kind -> document."""
    found = list(yaml.safe_load_all((FOLDER / name).read_text()))
    assert all({"apiVersion", "kind", "metadata"} <= set(one) and one["metadata"]["name"] for one in found)
    return {one["kind"]: one for one in found}


def check_pod(pod: dict[str, Any]) -> dict[str, Any]:
    """Only fields of the API, every mount has its volume, limits equal requests. Returns its only container."""
    assert set(pod) <= POD
    (container,) = pod["containers"]
    assert (
        set(container) <= CONTAINER
        and container["image"]
        and container["resources"]["limits"] == container["resources"]["requests"]
    )
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    return container


def test_deployment():
    found = documents("deployment.yaml")
    made = settings(tomllib.loads(found["ConfigMap"]["data"]["serve.toml"]), None, {})
    template = found["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    pod = template["spec"]
    container = check_pod(pod)
    assert (
        container["ports"][0]["containerPort"] == made.port and made.host == "0.0.0.0" and made.api_key_file is not None
    )
    for probe, path in (("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")):
        assert set(container[probe]) <= PROBE and container[probe]["httpGet"] == {
            "path": path,
            "port": container["ports"][0]["name"],
        }
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > made.drain_s + pause
    assert int(container["resources"]["limits"]["cpu"]) == made.threads
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    keys = Path(made.api_key_file)
    assert mounts["keys"] == str(keys.parent) and keys.name in found["Secret"]["stringData"]
    assert mounts["settings"] in container["args"][-1] and made.checkpoint.startswith(mounts["models"])
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_rayservice():
    found = documents("rayservice.yaml")["RayService"]
    assert found["apiVersion"] == "ray.io/v1" and set(found["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = found["spec"]["rayClusterConfig"]
    assert (
        set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
        and cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    )
    (workers,) = cluster["workerGroupSpecs"]
    serving = yaml.safe_load(found["spec"]["serveConfigV2"])
    (app,) = serving["applications"]
    made = settings(app["args"], None, {})
    head, worker = (check_pod(group["template"]["spec"]) for group in (cluster["headGroupSpec"], workers))
    assert int(worker["resources"]["limits"]["cpu"]) == made.threads
    assert (
        workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
        and workers["replicas"] == made.replicas + 1
    )
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > made.drain_s
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports["serve"] == serving["http_options"]["port"]
    secret = documents("deployment.yaml")["Secret"]
    assert made.api_key_file is not None and Path(made.api_key_file).name in secret["stringData"]
    module, _, name = app["import_path"].partition(":")
    assert module == "quota.server.replicas" and name == "application"
    constraints = (FOLDER.parents[1] / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in constraints


def test_ray_accepts_the_serve_config():
    schema = pytest.importorskip("ray.serve.schema", reason="needs Ray Serve: make ray")
    config = yaml.safe_load(documents("rayservice.yaml")["RayService"]["spec"]["serveConfigV2"])
    parsed = schema.ServeDeploySchema(**config)
    assert parsed.applications[0].args["checkpoint"] == "/models/quantized"
