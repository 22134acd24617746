"""schemathesis against our own OpenAPI document: what it allows, what it forbids, and what it says of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import Served, serve_toy, toy_images

schemathesis = pytest.importorskip("schemathesis")

import hypothesis  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

TOKEN = "a-secret-of-the-tests-alone"
OF_THE_ANSWER = [
    schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance,
]  # fmt: skip


def few(count: int) -> Callable[[Any], Any]:
    return settings(derandomize=True, deadline=None, max_examples=count, database=None, phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The toy engine behind a token."""
    with serve_toy(tmp_path_factory.mktemp("guarded"), max_body=100_000, max_batch=4, token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def schema(guarded: Served) -> Any:
    root = guarded.url.partition("/v2/")[0]
    return schemathesis.openapi.from_url(f"{root}/openapi.json", headers=authorized())


def authorized() -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKEN}"}


def operations(schema: Any) -> list[Any]:
    return [result.ok() for result in schema.get_all_operations()]


def answered(applied: list[Any]) -> Callable[..., None]:
    def check(case: Any) -> None:
        case.validate_response(case.call(headers=authorized()), checks=applied)

    return check


def fine(server: Served) -> None:
    """The log names no bug and no traceback, and the server is there."""
    assert server.ready()
    text = server.log.read_text()
    assert "Traceback" not in text
    assert not [line for line in server.lines() if line["event"] == "bug" or line.get("exception")]
    assert TOKEN not in text


def test_the_document_is_valid_and_names_every_path(schema: Any) -> None:
    schema.validate()
    paths = {operation.path for operation in operations(schema)}
    assert {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/toy", "/v2/models/toy/infer", "/metrics"} <= paths


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_the_document_says(guarded: Served, schema: Any, mode: Any) -> None:
    for operation in operations(schema):
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # what takes nothing can be given nothing wrong
        applied = [*OF_THE_ANSWER, *([checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else [])]
        few(60 if operation.method == "post" else 5)(given(case=operation.as_strategy(generation_mode=mode))(answered(applied)))()
    fine(guarded)


def test_everything_but_health_asks_for_the_token(guarded: Served, schema: Any) -> None:
    for operation in operations(schema):

        @few(3)
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            for headers in ({}, {"Authorization": f"Bearer {TOKEN[1:]}"}):
                response = case.call(headers=headers)
                assert response.status_code == (200 if "/health/" in case.path else 401)
                case.validate_response(response, checks=OF_THE_ANSWER)

        check()
    fine(guarded)


def test_bytes_behind_json(guarded: Served, schema: Any) -> None:
    """The binary tensor extension, which a schema cannot describe: JSON of a request, then bytes, then lies about both."""
    infer = next(operation for operation in operations(schema) if operation.path == "/v2/models/toy/infer")
    blob, side = toy_images(2).tobytes(), hypothesis.strategies.sampled_from([0, 1, 2, 3, 4, 16, 2**31 - 1])
    statuses = set()

    @few(150)
    @given(
        sizes=hypothesis.strategies.lists(side, min_size=3, max_size=5),
        announced=hypothesis.strategies.sampled_from([0, 48, 96, 97, -1, 2**63]),
        sent=hypothesis.strategies.integers(0, len(blob) + 9),
        off=hypothesis.strategies.sampled_from([0, 0, 0, 1, -1, 10**6]),
        binary=hypothesis.strategies.booleans(),
    )
    @hypothesis.example(sizes=[2, 3, 4, 4], announced=96, sent=96, off=0, binary=True)
    def check(sizes: list[int], announced: int, sent: int, off: int, binary: bool) -> None:
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": sizes, "parameters": {"binary_data_size": announced}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": binary}}).encode()
        case = infer.Case(
            body=head + (blob + bytes(9))[:sent], media_type="application/octet-stream",
            headers={"Inference-Header-Content-Length": str(len(head) + off)},
        )  # fmt: skip
        response = case.call(headers=authorized())
        case.validate_response(response, checks=OF_THE_ANSWER)
        statuses.add(response.status_code)

    check()
    assert statuses >= {200, 400}
    fine(guarded)
