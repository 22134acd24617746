"""The same ONNX model behind MLServer, a server that we did not write: query and engine access, over HTTP and gRPC.

MLServer pins old versions of much, so it lives in a virtual environment of its own: `EDGEGUARD_MLSERVER` names its Python,
which needs mlserver and onnxruntime. Without it, and where mlserver cannot be imported here, the test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import graphs
import numpy as np
import pytest
from small_artifact import labelled

from edgeguard.artifact import Artifact
from edgeguard.errors import EngineError
from edgeguard.report.read import check_report
from edgeguard.targets import open_engine
from edgeguard.targets.asking import RemoteOptions
from edgeguard.targets.remote import RemoteEngine, read_remote
from edgeguard.verify import Remote, VerifyOptions, verify

OPTIONS = RemoteOptions(patience=90.0)
RUNTIME = '''
import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Onnx(MLModel):
    async def load(self):
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload):
        images = NumpyCodec.decode_input(payload.inputs[0]).astype(np.uint8)
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: images})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])
'''


def python_with_mlserver() -> str:
    named = os.environ.get("EDGEGUARD_MLSERVER")
    if named:
        return named
    if importlib.util.find_spec("mlserver") is None:
        pytest.skip("mlserver is not installed; EDGEGUARD_MLSERVER can name the Python of an environment that has it")
    return sys.executable


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def urls(ort_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of the model, by protocol."""
    python, folder = python_with_mlserver(), tmp_path_factory.mktemp("mlserver")
    http, grpc, metrics = free_ports(3)
    manifest = ort_artifact.manifest
    (folder / "onnx_model.py").write_text(RUNTIME)
    (folder / "settings.json").write_text(json.dumps({
        "host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics, "parallel_workers": 0, "debug": False,
    }))  # fmt: skip
    (folder / "model-settings.json").write_text(json.dumps({
        "name": "small", "implementation": "onnx_model.Onnx", "platform": "onnx", "parameters": {"uri": str(ort_artifact.onnx)},
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, *manifest["input_shape"]]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, manifest["num_classes"]]}],
    }))  # fmt: skip
    command = [python, "-c", "from mlserver.cli import main; main()", "start", "."]
    env = {**os.environ, "PYTHONPATH": str(folder), "MLSERVER_HOST": "127.0.0.1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)
    address, deadline = f"http://127.0.0.1:{http}/v2/models/small", time.monotonic() + 120
    try:
        while True:  # it answers before its models are loaded
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                read_remote(address, RemoteOptions(patience=0.5))
                break
            except EngineError:
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield {"http": address, "grpc": f"grpc://127.0.0.1:{grpc}/v2/models/small"}
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, urls: dict[str, str]) -> str:
    if request.param == "grpc":
        pytest.importorskip("grpc")
    return urls[request.param]


def test_its_answers_are_the_local_engines(url: str, ort_artifact: Artifact) -> None:
    images = graphs.random_images((3, 16, 16), 40)
    model = read_remote(url, OPTIONS)
    assert model.server.startswith("mlserver")
    assert model.transport == ("gRPC" if url.startswith("grpc") else "JSON")
    assert model.claims == {}
    with open_engine(ort_artifact) as local, RemoteEngine(model, OPTIONS) as engine:
        np.testing.assert_array_equal(engine(images), local(images))
        batches = [images[:7], images[7:8], images[8:]]
        for batch, logits in zip(batches, engine.stream(batches), strict=True):
            np.testing.assert_array_equal(logits, local(batch))


def test_it_is_attacked_as_the_local_engine_is(url: str, ort_artifact: Artifact) -> None:
    """Query and engine access, patch for patch."""
    dataset = labelled(ort_artifact.graph(), 80)
    options = VerifyOptions(
        attacks=("a-qapa", "patch-rs"), accesses=("engine", "query"), patch_sizes=(4,), steps=6, attack_batch=20,
        universal_queries=120, limit=40, batch_size=16,
    )  # fmt: skip
    found = check_report(verify(Remote(read_remote(url, OPTIONS), ort_artifact, OPTIONS), dataset, options))
    local = verify(ort_artifact, dataset, options)
    for part in ("attacks", "patches", "clean", "survival", "heat_map"):
        assert found[part] == local[part]
    assert {row["access"] for row in found["attacks"]} == {"none", "engine", "query"}
    assert found["artifact"]["integer_mac_coverage"] is None, "it does not say what it executes"
    assert found["environment"]["engine"]["server"].startswith("mlserver")
    assert found["environment"]["engine"]["url"] == url


def test_a_model_that_it_does_not_have(url: str) -> None:
    with pytest.raises(EngineError, match=r"other.*(404|NOT_FOUND)"):
        read_remote(url.replace("small", "other"), OPTIONS)
