"""The Kubernetes manifests: valid, consistent with the server, and what the overlays make of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxyserve.api.auth import PUBLIC_PATHS
from proxyserve.api.families import Kind, all_families
from proxyserve.api.server import _FAREWELL_SECONDS
from proxyserve.cli.main import COMMANDS
from proxyserve.cli.options import parse_size
from proxyserve.config import ServerConfig
from tests.deploy.kubernetes_schema import class_of, complaints

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
#: Objects of operators, whose API is not in the package that the others are checked with.
OTHERS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
KUSTOMIZE = {"Kustomization", "Component"}

Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def read_all() -> list[tuple[str, Manifest]]:
    """Every manifest of Kubernetes itself, with its file."""
    return [
        (f"{file.relative_to(FOLDER)}: {document['kind']}", document)
        for file in sorted(FOLDER.rglob("*.yaml"))
        for document in documents(file.read_text())
        if document.get("kind") and document["kind"] not in KUSTOMIZE | OTHERS
    ]


def base(kind: str, name: str = "proxyserve") -> Manifest:
    (found,) = [
        document
        for where, document in read_all()
        if where.startswith("base/") and (document["kind"], document["metadata"]["name"]) == (kind, name)
    ]
    return found


@pytest.fixture(scope="module")
def pod() -> Manifest:
    spec: Manifest = base("StatefulSet")["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def server(pod: Manifest) -> Manifest:
    (container,) = pod["containers"]
    return dict(container)


# Schemas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "manifest"), read_all(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_kubernetes_knows_every_field(where: str, manifest: Manifest) -> None:
    found = complaints(manifest, class_of(manifest))
    if where.startswith("overlays/"):  # patches: what they leave out is in the base
        found = [complaint for complaint in found if not complaint.endswith("is required")]
    assert found == []


def test_the_check_finds_mistakes() -> None:
    manifest = json.loads(json.dumps(base("StatefulSet")))
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["livenessprobe"] = container.pop("livenessProbe")
    container["ports"][0]["containerPort"] = "8000"
    container["env"][0] = {"value": "x"}
    del manifest["spec"]["template"]
    assert complaints(manifest, class_of(manifest)) == [".spec.template: is required"]
    container_type = class_of({"apiVersion": "v1", "kind": "Container"})
    assert [found.split(":")[0] for found in complaints(container, container_type, "container")] == [
        "container.livenessprobe",
        "container.env[0].name",
        "container.ports[0].containerPort",
    ]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu", "keda"])
def test_what_kustomize_makes_of_it(folder: str, tmp_path: Path) -> None:
    """Every reference within the result leads somewhere; names of ConfigMaps carry the hash of their content."""
    path = FOLDER / folder
    if folder == "keda":  # the component that no overlay uses
        shutil.copytree(FOLDER.parent, tmp_path / "deploy")
        path = tmp_path / "deploy" / "kubernetes" / "overlays" / "cpu"
        kustomization = path / "kustomization.yaml"
        kustomization.write_text(kustomization.read_text().replace("components/hpa", "components/keda"))
    command = ["kubectl", "kustomize", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    objects = documents(result.stdout)
    for manifest in objects:
        if manifest["kind"] not in OTHERS:
            assert complaints(manifest, class_of(manifest)) == []
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "proxyserve"
    by_kind = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in objects}
    stateful = by_kind["StatefulSet", "proxyserve"]
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    pod = stateful["spec"]["template"]["spec"]
    assert labels == stateful["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": "proxyserve"}
    for name in ("proxyserve", "proxyserve-servers"):
        assert by_kind["Service", name]["spec"]["selector"] == labels
    assert by_kind["PodDisruptionBudget", "proxyserve"]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["NetworkPolicy", "proxyserve"]["spec"]["podSelector"]["matchLabels"] == labels
    assert by_kind["NetworkPolicy", "proxyserve"]["spec"] == base("NetworkPolicy")["spec"]
    monitor = by_kind["ServiceMonitor", "proxyserve"]["spec"]
    scraped = by_kind["Service", "proxyserve-servers"]
    assert monitor["selector"]["matchLabels"].items() <= scraped["metadata"]["labels"].items()
    assert scraped["metadata"]["labels"][monitor["jobLabel"]] == "proxyserve", "the job that rules ask for"
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in scraped["spec"]["ports"]}
    (config,) = [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume]
    assert re.fullmatch(r"proxyserve-config-[a-z0-9]{10}", config)
    assert ("ConfigMap", config) in by_kind
    assert (("HorizontalPodAutoscaler", "proxyserve") in by_kind) != (
        ("ScaledObject", "proxyserve") in by_kind
    )
    (container,) = pod["containers"]
    assert re.search(r":\d+\.\d+\.\d+(-gpu)?$", container["image"]), "no tag that moves"
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (folder == "overlays/gpu")
    boards = by_kind["ConfigMap", "proxyserve-boards"]["data"]
    made = FOLDER.parent / "monitoring" / "boards"
    assert {name: json.loads(text) for name, text in boards.items()} == {
        file.name: json.loads(file.read_text()) for file in made.iterdir()
    }


# The server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_the_server_reads_its_configuration(folder: str, tmp_path: Path) -> None:
    """By the command line's own reader, with the types of its options."""
    text = (FOLDER / folder / "config.yaml").read_text()
    file = tmp_path / "config.yaml"
    # The one folder that must be there when options are read.
    file.write_text(text.replace("expert-root: [/models]", f"expert-root: [{tmp_path}]"))
    options = COMMANDS["serve"].load("serve").make_context("serve", ["--config", str(file)]).params
    assert options["base"] == "/models/base"
    assert list(options["expert"]) == ["qa=/models/qa,/models/small"]
    assert options["expert_root"] == [tmp_path]
    assert options["admin_port"] == 8001
    assert parse_size(options["kv_memory"]) >= 2**30
    written = yaml.safe_load(text)
    assert {name.replace("-", "_") for name in written} - {"experts"} <= set(options)
    assert ("threads" in written) == (folder == "overlays/cpu")


def test_the_server_has_time_to_drain(pod: Manifest, server: Manifest) -> None:
    for folder in ("base", *(f"overlays/{name}" for name in OVERLAYS)):
        drain = yaml.safe_load((FOLDER / folder / "config.yaml").read_text())["drain-seconds"]
        before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] > before + drain + 2 * _FAREWELL_SECONDS


def test_probes_ask_what_is_there(server: Manifest) -> None:
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    config = yaml.safe_load((FOLDER / "base" / "config.yaml").read_text())
    assert ports == {"http": ServerConfig().port, "admin": config["admin-port"]}
    for probe in ("startupProbe", "readinessProbe"):
        assert server[probe]["httpGet"] == {"path": "/ready", "port": "http"}
    assert "/ready" in PUBLIC_PATHS, "probes have no key"
    python, script, live = server["livenessProbe"]["exec"]["command"]
    assert (python, Path(script).name, live) == ("python", "healthcheck.py", "--live")
    grace = server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"]
    assert grace == 600


def test_it_may_do_nothing_that_it_need_not(pod: Manifest, server: Manifest) -> None:
    """The profile `restricted` of Kubernetes' Pod Security Standards, which the namespace demands, and more."""
    assert base("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert base("ServiceAccount")["automountServiceAccountToken"] is False
    kinds = {next(iter(set(volume) - {"name"})) for volume in pod["volumes"]}
    assert kinds <= {"configMap", "secret", "persistentVolumeClaim", "emptyDir"}
    text = "".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    assert "kind: Secret" not in text, "no key is in the repository"


def test_keys_are_where_the_server_looks(server: Manifest, pod: Manifest) -> None:
    """The image's own variable would win over the file, so the StatefulSet sets it."""
    variables = {entry["name"]: entry["value"] for entry in server["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert variables["PROXYSERVE_API_KEY_FILE"] == f"{mounts['keys']}/keys.yaml"
    assert variables["PROXYSERVE_CONFIG"] == f"{mounts['config']}/config.yaml"
    config = yaml.safe_load((FOLDER / "base" / "config.yaml").read_text())
    assert config["state-dir"] == mounts["state"]
    written = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert written == {mounts["state"], mounts["tmp"]}


def test_autoscalers_ask_for_the_queue() -> None:
    """By a gauge, of the same servers, and both in the same way."""
    gauges = {family.name for family in all_families() if family.kind is Kind.GAUGE}
    components = FOLDER / "components"
    (scaler,) = documents((components / "hpa" / "autoscaler.yaml").read_text())
    (scaled,) = documents((components / "keda" / "scaled-object.yaml").read_text())
    (rule,) = documents((components / "hpa" / "adapter-rules.yaml").read_text())[0]["rules"]["custom"]
    (metric,) = scaler["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in gauges
    assert rule["seriesQuery"].startswith(f"{name}{{")
    (trigger,) = scaled["spec"]["triggers"]
    assert f'{name}{{job="proxyserve"}}' in trigger["metadata"]["query"]
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]
    advanced = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    assert advanced["behavior"] == scaler["spec"]["behavior"]
    target = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "proxyserve"}
    assert scaler["spec"]["scaleTargetRef"] == scaled["spec"]["scaleTargetRef"] == target
    assert "replicas" not in base("StatefulSet")["spec"], "applying it again would undo the scaling"
