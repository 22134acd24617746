"""The OpenAPI document of a server."""

from __future__ import annotations

import math
from typing import Any

import edgeguard
from edgeguard.open_inference import DTYPES, HEADER
from edgeguard.serve.answers import LONGEST_ID
from edgeguard.serve.model import VERSION, Model
from edgeguard.serve.options import ServeOptions

JSON, BYTES = "application/json", "application/octet-stream"


def document(model: Model, options: ServeOptions) -> dict[str, Any]:
    """OpenAPI 3.1 of what this server answers, and of the limits that it has."""
    own = f"/v2/models/{model.name}"
    paths: dict[str, Any] = {
        "/v2/health/live": _get("The process answers", "Health", public=True),
        "/v2/health/ready": _get("The engine takes requests", "Health", public=True, busy=True),
        "/v2": _get("Name, version and extensions of the server", "ServerMetadata"),
        "/metrics": {"get": {**_get("Figures for Prometheus", "Error")["get"], "responses": {
            "200": {"description": "Exposition format 0.0.4", "content": {"text/plain": {"schema": {"type": "string"}}}},
            **_errors(401)}}},
        "/openapi.json": _get("This document", "Document"),
    }  # fmt: skip
    for prefix in (own, f"{own}/versions/{VERSION}"):
        paths[prefix] = _get("Inputs and outputs of the model", "ModelMetadata")
        paths[f"{prefix}/ready"] = _get("The model takes requests", "Health", busy=True)
        paths[f"{prefix}/infer"] = {"post": _infer(model, options)}
    security: dict[str, Any] = {}
    schemes: dict[str, Any] = {}
    if options.token is not None:
        schemes = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        security = {"security": [{"token": []}]}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"EdgeGuard, model {model.name}", "version": edgeguard.__version__,
                 "description": "Open Inference Protocol, version 2, with the binary tensor data extension."},
        "paths": paths, "components": {"schemas": _schemas(model), **schemes}, **security,
    }  # fmt: skip


def _get(summary: str, schema: str, public: bool = False, busy: bool = False) -> dict[str, Any]:
    errors = (*(() if public else (401,)), *((503,) if busy else ()))
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {JSON: {"schema": _ref(schema)}}}, **_errors(*errors)},
    }
    if public:
        operation["security"] = []
    return {"get": operation}


def _infer(model: Model, options: ServeOptions) -> dict[str, Any]:
    parameter = {"name": HEADER, "in": "header", "required": False, "schema": {"type": "integer", "minimum": 0},
                 "description": "Where the JSON of the body ends and the bytes of tensors begin"}  # fmt: skip
    answer = {"description": "The logits", "content": {
        JSON: {"schema": _ref("InferResponse")}, BYTES: {"schema": {"type": "string", "format": "binary"}}}}  # fmt: skip
    return {
        "summary": f"Logits of at most {model.max_batch} images; bodies of at most {options.max_body} bytes",
        "parameters": [parameter],
        "requestBody": {"required": True, "content": {
            JSON: {"schema": _ref("InferRequest")}, BYTES: {"schema": {"type": "string", "format": "binary"}}}},
        "responses": {"200": answer, **_errors(400, 401, 408, 411, 413, 415, 500, 503, 504)},
    }  # fmt: skip


def _errors(*statuses: int) -> dict[str, Any]:
    meanings = {
        400: "The request is wrong; the sentence says how", 401: "The token is missing or wrong", 404: "No such thing here",
        408: "The body did not arrive in time", 411: "The body has no length that can be read", 413: "Too large",
        415: "Compressed bodies are not taken", 500: "The engine failed", 503: "Overloaded or not ready; try again later",
        504: "The engine did not answer in time",
    }  # fmt: skip
    return {str(status): {"description": meanings[status], "content": {JSON: {"schema": _ref("Error")}}} for status in statuses}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _schemas(model: Model) -> dict[str, Any]:
    text, flag = {"type": "string"}, {"type": "boolean"}
    identity = {"type": "string", "maxLength": LONGEST_ID}
    sizes = {"type": "array", "items": {"type": "integer"}}
    spec = _object(("name", "datatype", "shape"), name=text, datatype=text, shape=sizes)

    def tensor(shape: tuple[int, ...], datatype: str, name: str) -> dict[str, Any]:
        batch = {"type": "integer", "minimum": 1, "maximum": model.max_batch}
        exact = {"type": "array", "prefixItems": [batch, *({"const": size} for size in shape[1:])], "items": False,
                 "minItems": len(shape)}  # fmt: skip
        size = {"type": "integer", "minimum": 0, "maximum": model.max_batch * math.prod(shape[1:]) * DTYPES[datatype].itemsize}
        return _object(
            ("name", "datatype", "shape"), name={"const": name}, datatype={"const": datatype}, shape=exact,
            data={"type": "array", "description": "row by row, flat or nested", "items": {"type": ["integer", "array"]}}
            if datatype == "UINT8" else {"type": "array", "items": {"type": "number"}},
            parameters=_object((), binary_data_size=size),
        )  # fmt: skip

    return {
        "Error": _object(("error",), error=text),
        "Health": _object((), live=flag, ready=flag, name=text),
        "Document": {"type": "object"},
        "ServerMetadata": _object(("name", "version", "extensions"), name=text, version=text,
                                  extensions={"type": "array", "items": text}),
        "ModelMetadata": _object(
            ("name", "platform", "inputs", "outputs"), name=text, platform=text, versions={"type": "array", "items": text},
            inputs={"type": "array", "items": spec}, outputs={"type": "array", "items": spec}, parameters={"type": "object"},
        ),
        "InferRequest": _object(
            ("inputs",), id=identity, inputs={"type": "array", "minItems": 1, "maxItems": 1, "items": tensor(
                model.pixels.shape, "UINT8", model.pixels.name)},
            outputs={"type": "array", "maxItems": 1, "items": _object(
                ("name",), name={"const": model.logits.name}, parameters=_object((), binary_data=flag))},
            parameters=_object((), binary_data_output=flag),
        ),
        "InferResponse": _object(
            ("model_name", "outputs"), model_name=text, model_version=text, id=text,
            outputs={"type": "array", "items": tensor(model.logits.shape, "FP32", model.logits.name)},
        ),
    }  # fmt: skip
