"""The files of deploy/ parse, and what they name exists: options, files, extras, variables, ports and paths."""

import configparser
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import yaml

from deferral.gateway.endpoints import routes
from deferral.gateway.experts_file import read_experts
from deferral.gateway.serve import serve

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
EXPERTS = read_experts(DEPLOY / "experts.toml", {"LARGE_KEY": "a-key"})
# What the gateway reads of the environment, and what the experts file wants.
READ = {"DEFERRAL_DATABASE", "DEFERRAL_ADMIN_KEY", "LARGE_KEY", "OMP_NUM_THREADS"}


def container() -> dict[str, list[str]]:
    """Instruction -> what was said with it."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def kubernetes() -> dict[str, dict[str, Any]]:
    """By kind."""
    return {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))}


def understood(words: list[str], port: int) -> None:
    """A command line of `deferral` that serves on all addresses at the port."""
    assert words[0] == "serve"
    # The paths are those inside the container.
    parameters = {option: one for one in serve.params for option in one.opts}
    names = [word for word in words if word.startswith("--")]
    assert set(names) <= set(parameters)
    values = dict(zip(words[2::2], words[3::2], strict=True))
    assert values == {"--experts": "/etc/deferral/experts.toml", "--host": "0.0.0.0", "--port": str(port)}
    assert words[1] == "/data/router"
    assert isinstance(parameters["--port"].type, click.IntRange)


def test_the_container_is_made_of_what_is_here() -> None:
    made = container()
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK"}
    assert set(made) == known | {"STOPSIGNAL", "ENTRYPOINT", "CMD"}
    for line in made["COPY"]:
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    [install] = [line for line in made["RUN"] if "pip install" in line]
    assert set(re.findall(r"\[([\w,-]+)\]", install)) <= set(metadata["options.extras_require"])
    # What the metadata reads has to be there when it is installed.
    copied = " ".join(made["COPY"]).split()
    assert {metadata["metadata"]["long_description"].removeprefix("file: "), metadata["metadata"]["license_files"]} <= set(copied)
    script = metadata["options.entry_points"]["console_scripts"].split("=")[0].strip()
    assert json.loads(made["ENTRYPOINT"][0]) == ["/usr/bin/tini", "--", script]
    assert any("apt-get install" in line and "tini" in line for line in made["RUN"])
    assert made["EXPOSE"] == ["8080"]
    understood(json.loads(made["CMD"][0]), 8080)
    assert made["USER"] == ["deferral"]


def test_compose_names_what_is_here() -> None:
    services = compose()["services"]
    gateway, postgres = services["gateway"], services["postgres"]
    assert (DEPLOY / gateway["build"]["context"] / gateway["build"]["dockerfile"]).is_file()
    assert set(gateway["environment"]) == READ | {"DEFERRAL_ALARM_URL"}
    url, server = gateway["environment"]["DEFERRAL_DATABASE"], postgres["environment"]
    assert url == f"postgresql+psycopg://{server['POSTGRES_USER']}:${{POSTGRES_PASSWORD}}@postgres/{server['POSTGRES_DB']}"
    mounted = dict(volume.split(":")[:2] for volume in gateway["volumes"])
    assert mounted == {"./experts.toml": "/etc/deferral/experts.toml", "./data": "/data"}
    assert (gateway["read_only"], gateway["tmpfs"]) == (True, "/tmp")
    replicas = gateway["deploy"]["replicas"]
    first, last = re.fullmatch(r"127\.0\.0\.1:(\d+)-(\d+):8080", gateway["ports"][0]).groups()  # type: ignore[union-attr]
    assert int(last) - int(first) + 1 == replicas == 2
    assert set(gateway["depends_on"]) <= set(services)
    kept = [volume.split(":")[0] for service in services.values() for volume in service["volumes"] if not volume.startswith(".")]
    assert kept == list(compose()["volumes"])
    assert int(gateway["stop_grace_period"].removesuffix("s")) > max(expert.total_s for expert in EXPERTS.values()) + 30


def test_who_watches_is_asked_for_and_finds_the_gateway() -> None:
    services, secrets = compose()["services"], compose()["secrets"]
    assert {name for name, service in services.items() if "profiles" in service} == {"prometheus", "grafana"}
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["watch"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
        assert all((DEPLOY / volume.split(":")[0]).is_file() for volume in services[name]["volumes"] if volume.startswith("."))
    watch = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (DEPLOY / "watch").glob("*.yaml")}
    [scraped] = watch["prometheus.yaml"]["scrape_configs"]
    [secret] = services["prometheus"]["secrets"]
    assert scraped["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert secrets == {secret: {"environment": "DEFERRAL_ADMIN_KEY"}}
    [found] = scraped["dns_sd_configs"]
    assert (found["names"], found["port"]) == (["gateway"], int(container()["EXPOSE"][0]))
    rules = watch["alerts.yaml"]["groups"][0]["rules"]
    assert any(f'up{{job="{scraped["job_name"]}"}}' in rule["expr"] for rule in rules)
    mounted = dict(volume.split(":")[:2] for name in ("prometheus", "grafana") for volume in services[name]["volumes"])
    folder = Path(mounted["./watch/prometheus.yaml"]).parent
    assert [str(folder / name) for name in watch["prometheus.yaml"]["rule_files"]] == [mounted["./watch/alerts.yaml"]]
    [provider] = watch["grafana-dashboards.yaml"]["providers"]
    assert Path(mounted["./watch/dashboard.json"]).parent == Path(provider["options"]["path"])
    [source] = watch["grafana-datasources.yaml"]["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0].split(':')[-1]}"


def test_kubernetes_names_what_is_here() -> None:
    parts = kubernetes()
    deployment = parts["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    [gateway] = pod["containers"]
    understood(gateway["args"], 8080)
    assert deployment["replicas"] == 2
    assert {one["name"] for one in gateway["env"]} == READ
    [port] = gateway["ports"]
    assert port["containerPort"] == 8080
    # What several workers share lies in a temporary folder.
    assert gateway["securityContext"]["readOnlyRootFilesystem"]
    assert {"/data", "/tmp"} <= {one["mountPath"] for one in gateway["volumeMounts"]}
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == parts["Service"]["spec"]["selector"] == labels
    assert parts["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert {one["name"] for one in gateway["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == parts["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > max(expert.total_s for expert in EXPERTS.values()) + 30
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    for one in gateway["env"]:
        if "valueFrom" in one:
            assert f"--from-literal={one['valueFrom']['secretKeyRef']['key']}=" in text


def test_the_probes_ask_what_the_gateway_answers() -> None:
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    probes = {value["httpGet"]["path"] for name, value in pod["containers"][0].items() if name.endswith("Probe")}
    [health] = container()["HEALTHCHECK"]
    probes |= set(re.findall(r"127\.0\.0\.1:8080(/\w+)", health))
    assert probes == {"/health", "/ready"}
    assert probes <= {route.path for route in routes(SimpleNamespace())}  # type: ignore[arg-type]
