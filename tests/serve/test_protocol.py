"""What a server answers to clients that speak the protocol: ours, and one that we did not write."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import graphs
import numpy as np
import pytest
from serving import Served, binary_request, json_request, logits_of_reply, toy_images, toy_logits

from edgeguard import files
from edgeguard.artifact import MANIFEST, Artifact
from edgeguard.targets import open_engine


def infer_with_triton(served: Served, images: Any, binary: bool) -> Any:
    client = pytest.importorskip("tritonclient.http")
    model = served.path.rsplit("/", 1)[1]
    with client.InferenceServerClient("{}:{}".format(*served.address)) as connection:
        assert connection.is_server_live()
        assert connection.is_server_ready()
        assert connection.is_model_ready(model)
        assert connection.is_model_ready(model, "1")
        assert "binary_tensor_data" in connection.get_server_metadata()["extensions"]
        metadata = connection.get_model_metadata(model)
        assert metadata["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 16, 16]}]
        tensor = client.InferInput("pixels", images.shape, "UINT8")
        tensor.set_data_from_numpy(images, binary_data=binary)
        wanted = client.InferRequestedOutput("logits", binary_data=binary)
        answer = connection.infer(model, [tensor], outputs=[wanted], request_id="seven")
        assert answer.get_response()["id"] == "seven"
        return answer.as_numpy("logits")


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_gets_the_engines_logits(served: Served, ort_artifact: Artifact, binary: bool) -> None:
    images = graphs.random_images((3, 16, 16), 9)
    with open_engine(ort_artifact) as engine:
        expected = engine(images)
    answer = infer_with_triton(served, images, binary)
    assert answer.dtype == np.float32
    np.testing.assert_array_equal(answer, expected)


def test_triton_client_without_saying_which_output(served: Served, ort_artifact: Artifact) -> None:
    client = pytest.importorskip("tritonclient.http")
    images = graphs.random_images((3, 16, 16), 3)
    with client.InferenceServerClient("{}:{}".format(*served.address)) as connection:
        tensor = client.InferInput("pixels", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        answer = connection.infer("small-4", [tensor]).as_numpy("logits")
        with pytest.raises(Exception, match="at least one image, got uint8"):
            connection.infer("small-4", [client.InferInput("pixels", [1, 16, 16, 3], "UINT8").set_data_from_numpy(
                np.zeros((1, 16, 16, 3), np.uint8))])  # fmt: skip
    with open_engine(ort_artifact) as engine:
        np.testing.assert_array_equal(answer, engine(images))


def test_what_the_metadata_says(served: Served, ort_artifact: Artifact) -> None:
    metadata = served.request("GET", served.path).document
    assert metadata["name"] == "small-4"
    assert metadata["platform"] == "edgeguard_ort"
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]
    assert metadata["parameters"]["artifact_sha256"] == files.sha256(ort_artifact.path / MANIFEST)
    assert metadata["parameters"]["graph_sha256"] == files.sha256(ort_artifact.path / "graph.npz")
    assert metadata["parameters"]["width"] == "4"
    assert served.request("GET", f"{served.path}/versions/1").document == metadata
    assert served.request("HEAD", "/v2").body == b""


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/v2/models", 404), ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/small-4/versions/2", 404),
        ("GET", "/v2/models/small-4/infer", 405), ("POST", "/v2", 405), ("DELETE", "/v2/models/small-4", 405),
        ("POST", "/v2/models/other/infer", 404), ("GET", "/v2/models/..%2f..%2fetc", 404), ("GET", "/v2/models/%00", 404),
        ("GET", "/v2/health/live/x", 404), ("GET", "/v2/models/small-4/versions", 404),
    ],
)  # fmt: skip
def test_what_is_not_there(served: Served, method: str, path: str, status: int) -> None:
    reply = served.request(method, path)
    assert reply.status == status
    assert reply.error
    if status == 405:
        assert reply.headers["allow"]


def test_the_openapi_document_lists_what_answers(served: Served) -> None:
    document = served.request("GET", "/openapi.json").document
    assert document["openapi"].startswith("3.")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            reply = served.request(method.upper(), path, b"" if method == "post" else None)
            assert str(reply.status) in operation["responses"]
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]


def test_json_flat_and_nested_and_binary_are_one(toy: Served) -> None:
    images = toy_images(4)
    flat, nested = json_request(images), json_request(images)
    nested["inputs"][0]["data"] = images.tolist()
    body, headers = binary_request(images)
    for reply in (toy.infer(flat), toy.infer(nested), toy.infer(body, headers)):
        np.testing.assert_array_equal(logits_of_reply(reply), toy_logits(images))


def test_answers_as_bytes_where_they_are_asked_for(toy: Served) -> None:
    images = toy_images(2)
    whole = {"parameters": {"binary_data_output": True}}
    single = {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    neither: dict[str, Any] = {"outputs": [{"name": "logits", "parameters": {"binary_data": False}}], **whole}
    for more, binary in ((whole, True), (single, True), (neither, False), ({}, False)):
        reply = toy.infer(json_request(images, **more))
        assert ("inference-header-content-length" in reply.headers) is binary
        np.testing.assert_array_equal(logits_of_reply(reply), toy_logits(images))


def test_a_chunked_body_is_read(toy: Served) -> None:
    images = toy_images(1)
    payload = json.dumps(json_request(images)).encode()
    parts = (payload[start : start + 50] for start in range(0, len(payload), 50))
    reply = toy.request("POST", f"{toy.path}/infer", parts)
    np.testing.assert_array_equal(logits_of_reply(reply), toy_logits(images))


def test_concurrent_clients_get_their_own_answers(toy: Served) -> None:
    """The toy engine also fails when it is called twice at a time."""
    def ask(number: int) -> bool:
        images = toy_images(1 + number % 7, seed=number)
        body, headers = binary_request(images, id=f"n{number}")
        reply = toy.infer(body, headers)
        head = json.loads(reply.body[: int(reply.headers["inference-header-content-length"])])
        return head["id"] == f"n{number}" and np.array_equal(logits_of_reply(reply), toy_logits(images))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))


def test_metrics_count(toy: Served) -> None:
    def figures() -> dict[str, float]:
        reply = toy.request("GET", "/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in reply.body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    key = 'edgeguard_requests_total{route="infer",status="200"}'
    before = figures()
    for _ in range(3):
        logits_of_reply(toy.infer(json_request(toy_images(2))))
    after = figures()
    assert after[key] == before.get(key, 0) + 3
    assert after["edgeguard_batch_images_sum"] == before["edgeguard_batch_images_sum"] + 6
    assert after["edgeguard_held_bytes"] == 0
    assert after["edgeguard_waiting_requests"] == 0
    assert after['edgeguard_infer_seconds_bucket{le="+Inf"}'] == after["edgeguard_infer_seconds_count"]


def test_every_line_of_the_log_is_json(toy: Served) -> None:
    toy.request("GET", "/v2/models/%0A%22forged%22")
    deadline = time.monotonic() + 10
    paths: list[str] = []
    while '/v2/models/\n"forged"' not in paths:  # a request is logged after its answer has left
        assert time.monotonic() < deadline, paths
        paths = [line["path"] for line in toy.lines() if line["event"] == "request"]
