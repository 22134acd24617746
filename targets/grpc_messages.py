"""The messages of the Open Inference Protocol over gRPC, as far as a client needs them.

Built at run time from the published definition instead of generated: generated code asks for one range of protobuf versions,
and registers its names for the whole process, where they meet those of other clients of the protocol. Fields that are left out
here, such as parameters, are skipped by protobuf when it reads.

Source: KServe, "Open Inference Protocol (V2)", `open_inference_grpc.proto`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from edgeguard.errors import require

SERVICE = "inference.GRPCInferenceService"
EXTRA = "grpc"
"""Of this package, that installs gRPC and protobuf."""
FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {"name": (1, "string"), "version": (2, "string"), "extensions": (3, "string*")},
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "TensorMetadata": {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*")},
    "ModelMetadataResponse": {
        "name": (1, "string"), "versions": (2, "string*"), "platform": (3, "string"), "inputs": (4, "TensorMetadata*"),
        "outputs": (5, "TensorMetadata*"),
    },
    "InferTensorContents": {"fp32_contents": (6, "float*")},
    "InferTensor": {
        "name": (1, "string"), "datatype": (2, "string"), "shape": (3, "int64*"), "contents": (5, "InferTensorContents"),
    },
    "ModelInferRequest": {
        "model_name": (1, "string"), "model_version": (2, "string"), "inputs": (5, "InferTensor*"),
        "raw_input_contents": (7, "bytes*"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"), "model_version": (2, "string"), "outputs": (5, "InferTensor*"),
        "raw_output_contents": (6, "bytes*"),
    },
}  # fmt: skip
"""Messages: number and type of every field; a star marks those that are repeated."""


@cache
def messages() -> dict[str, Any]:
    """The class of each message in `FIELDS`; raises MissingDependency without protobuf."""
    descriptors, pools = require("google.protobuf.descriptor_pb2", EXTRA), require("google.protobuf.descriptor_pool", EXTRA)
    factory = require("google.protobuf.message_factory", EXTRA)
    field_type = descriptors.FieldDescriptorProto
    document = descriptors.FileDescriptorProto(name="open_inference_grpc.proto", package="inference", syntax="proto3")
    for name, fields in FIELDS.items():
        message = document.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number)
            added.label = field_type.LABEL_REPEATED if kind.endswith("*") else field_type.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            if kind in FIELDS:
                added.type, added.type_name = field_type.TYPE_MESSAGE, f".inference.{kind}"
            else:
                added.type = getattr(field_type, f"TYPE_{kind.upper()}")
    pool = pools.DescriptorPool()
    pool.AddSerializedFile(document.SerializeToString())
    return {name: factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in FIELDS}
