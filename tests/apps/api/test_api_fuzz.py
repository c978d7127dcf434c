"""schemathesis: requests made from the OpenAPI document, those it allows and those it does not."""

from __future__ import annotations

import pytest
import schemathesis
from api_server import NAME, SMALL, ask, make_service, on_port
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from vlm.inference.load import LoadedModel

pytestmark = pytest.mark.slow

# What the document promises. A request that it allows may still be refused: an order of turns, a token id or an image
# that does not exist cannot be told by a schema.
PROMISES = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
GOOD = {
    "/v1/chat/completions": lambda stream: ask(stream=stream),
    "/v1/completions": lambda stream: {"model": NAME, "prompt": "Hi", "max_tokens": 4, "stream": stream},
    "/v1/responses": lambda stream: {"model": NAME, "input": "Hi", "max_output_tokens": 4, "stream": stream},
}
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_requests", [10, pytest.param(30, marks=pytest.mark.thorough)])
def test_every_answer_is_as_the_document_says(loaded: LoadedModel, num_requests: int):
    seen: dict[str, set[int]] = {}

    def call(case: schemathesis.Case) -> None:
        response = case.call(timeout=30)
        seen.setdefault(case.path, set()).add(response.status_code)
        case.validate_response(response, checks=PROMISES)

    bounded = settings(
        max_examples=num_requests, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    with on_port(make_service(loaded, SMALL)) as server:
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for result in document.get_all_operations():
            operation = result.ok()
            if operation.body:  # chance alone makes few that a tiny model can answer
                for stream in (False, True):
                    call(operation.Case(body=GOOD[operation.path](stream), media_type="application/json"))
            for mode in MODES if operation.body else MODES[:1]:  # without a body or a parameter nothing is wrong
                bounded(given(operation.as_strategy(generation_mode=mode))(call))()
        assert server.service.num_open == 0
    assert all(seen[path] >= {200, 400} for path in GOOD)  # both kinds were made
    assert seen["/health"] >= {200}
