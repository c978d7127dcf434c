"""Keys, origins, hosts, and what the open pages show."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import NAME, ask, make_service, without_port

from vlm.apps.api.guard import check_access
from vlm.apps.api.limits import Access
from vlm.cli.main import main
from vlm.errors import ConfigError
from vlm.inference.load import LoadedModel

CHAT = "/v1/chat/completions"
KEYS = Access(api_keys=("first-secret-key", "second-secret-key"))
Call = Callable[..., httpx.Response]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-secret-ke", "Bearer first-secret-key2",
     "Basic first-secret-key", "first-secret-key", b"Bearer \xff\xfe\xe9"],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")])
def test_without_the_key_nothing_is_told(call: Call, method: str, path: str, authorization: Any):
    headers = {} if authorization is None else {"Authorization": authorization}
    response = call(method, path, access=KEYS, headers=headers, **({"json": ask()} if method == "POST" else {}))
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS.api_keys)
def test_each_key_opens_everything(call: Call, key: str):
    headers = {"Authorization": f"Bearer {key}"}
    assert call("POST", CHAT, access=KEYS, headers=headers, json=ask()).status_code == 200
    assert call("GET", "/v1/models", access=KEYS, headers=headers).json()["data"][0]["id"] == NAME
    assert b"vlm_running" in call("GET", "/metrics", access=KEYS, headers=headers).content


def test_the_key_is_checked_before_the_body_is_read(loaded: LoadedModel):
    async def unread() -> Any:
        raise AssertionError("read")
        yield b""

    async def post() -> httpx.Response:
        async with without_port(make_service(loaded), KEYS) as client:
            return await client.post(CHAT, content=unread())

    assert asyncio.run(post()).status_code == 401


def test_keys_are_compared_in_constant_time_and_all_of_them(call: Call, monkeypatch: pytest.MonkeyPatch):
    compared = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return given == key

    monkeypatch.setattr(hmac, "compare_digest", compare)
    headers = {"Authorization": "Bearer first-secret-key"}
    assert call("GET", "/v1/models", access=KEYS, headers=headers).status_code == 200
    assert compared == [b"first-secret-key", b"second-secret-key"]


def test_the_open_pages_need_no_key_and_hold_none(call: Call):
    for path in ("/health", "/docs", "/openapi.json"):
        response = call("GET", path, access=KEYS)
        assert response.status_code == 200
        assert "secret" not in response.text


PREFLIGHT = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}


def test_web_pages_of_other_origins_are_denied(call: Call):
    response = call("OPTIONS", CHAT, headers=PREFLIGHT)
    assert response.status_code >= 400
    asked = call("POST", CHAT, headers={"Origin": "https://page.example"}, json=ask())
    for headers in (response.headers, asked.headers):
        assert not [name for name in headers if name.startswith("access-control-")]


def test_an_allowed_origin_may_ask_first_and_others_still_not(call: Call):
    access = Access(KEYS.api_keys, origins=("https://page.example",))
    response = call("OPTIONS", CHAT, access=access, headers=PREFLIGHT)  # browsers send no key with this question
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    other = call("OPTIONS", CHAT, access=access, headers=PREFLIGHT | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.5", ""])
def test_without_a_key_a_name_that_was_made_to_point_here_is_refused(call: Call, host: str):
    """DNS rebinding: the page at evil.example becomes of one origin with the server, but the Host header tells."""
    response = call("GET", "/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_this_machine_by_any_of_its_names_is_served(call: Call, host: str):
    assert call("GET", "/v1/models", headers={"Host": host}).status_code == 200


def test_with_a_key_any_host_is_served(call: Call):
    headers = {"Host": "chat.example", "Authorization": "Bearer first-secret-key"}
    assert call("GET", "/v1/models", access=KEYS, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "chat.example"])
def test_others_may_connect_only_with_a_key(host: str):
    with pytest.raises(ConfigError, match="an API key is needed"):
        check_access(host, Access())
    check_access(host, KEYS)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_needs_none(host: str):
    check_access(host, Access())


@pytest.mark.parametrize("key", ["", "short", "with a space", "mit-ümlaut-key", "line\nbreak-key"])
def test_a_key_that_cannot_be_sent_or_guarded_is_refused(key: str):
    with pytest.raises(ConfigError, match="printable ASCII"):
        check_access("127.0.0.1", Access(api_keys=("good-enough-key", key)))


def test_every_origin_without_a_key_is_refused():
    with pytest.raises(ConfigError, match="every web page"):
        check_access("127.0.0.1", Access(origins=("*",)))
    check_access("127.0.0.1", Access(KEYS.api_keys, origins=("*",)))


def test_the_command_refuses_to_start_open_to_others(export: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["serve", str(export), "--host", "0.0.0.0", "--port", "0"])
    assert end.value.code == 2
    assert re.fullmatch(r"error: --host 0\.0\.0\.0 lets other machines connect, .*\n", capsys.readouterr().err)


def test_the_documentation_is_complete_in_itself(call: Call):
    response = call("GET", "/docs")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "<script" not in response.text
    assert not re.findall(r'(?:src|href|url\()="?(?:https?:)?//', response.text)
    for word in ("/v1/chat/completions", "ChatRequest", "max_completion_tokens", "repetition_penalty", NAME):
        assert word in response.text
    assert call("GET", "/").headers["location"] == "/docs"


def test_the_document_tells_the_limits_of_this_server(call: Call):
    document = call("GET", "/openapi.json").json()
    properties = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties["model"]["enum"] == [NAME]
    assert properties["n"]["anyOf"][0] == {"maximum": 8, "minimum": 1, "type": "integer"}
    assert properties["max_tokens"]["anyOf"][0]["maximum"] == 1024
    assert "$defs" not in json.dumps(document)
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert names <= set(document["components"]["schemas"])


def test_health_and_metrics_tell_what_goes_on(loaded: LoadedModel):
    async def talk() -> tuple[Any, str]:
        service = make_service(loaded)
        async with without_port(service) as client:
            await client.post(CHAT, json=ask(logit_bias={"2": -100}))
            await client.post(CHAT, json=ask(temperature=9))
            await client.get("/a/path/that/is/not")
            while service.scheduler.num_running or service.scheduler.num_reserved:
                await asyncio.sleep(0.01)  # the model's thread puts its last reply away
            return (await client.get("/health")).json(), (await client.get("/metrics")).text

    health, metrics = asyncio.run(talk())
    assert health == {"status": "ok", "model": NAME, "running": 0, "waiting": 0}
    counted = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert counted['vlm_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert counted['vlm_requests_total{path="/v1/chat/completions",status="400"}'] == "1.0"
    assert counted['vlm_requests_total{path="other",status="404"}'] == "1.0"
    assert counted["vlm_generated_tokens_total"] == "4.0"
    assert counted["vlm_first_token_seconds_count"] == "1.0"
    assert counted["vlm_cache_tokens"] == "0.0"
