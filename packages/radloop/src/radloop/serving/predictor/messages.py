"""The messages of the Open Inference Protocol v2 over gRPC (package `inference`), as protobuf classes.

They are built from the table below instead of generated code: field numbers are what the protocol is.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"
_PACKAGE = "inference"
_Field = descriptor_pb2.FieldDescriptorProto

# Message: fields in the order of their numbers, from 1. `*` repeated, `{}` a map from string, `|` one of a choice.
_MESSAGES: dict[str, list[str]] = {
    "ServerLiveRequest": [],
    "ServerLiveResponse": ["bool live"],
    "ServerReadyRequest": [],
    "ServerReadyResponse": ["bool ready"],
    "ModelReadyRequest": ["string name", "string version"],
    "ModelReadyResponse": ["bool ready"],
    "ServerMetadataRequest": [],
    "ServerMetadataResponse": ["string name", "string version", "*string extensions"],
    "ModelMetadataRequest": ["string name", "string version"],
    "ModelMetadataResponse.TensorMetadata": ["string name", "string datatype", "*int64 shape"],
    "ModelMetadataResponse": [
        "string name",
        "*string versions",
        "string platform",
        "*ModelMetadataResponse.TensorMetadata inputs",
        "*ModelMetadataResponse.TensorMetadata outputs",
        "{}string properties",
    ],
    "InferParameter": [
        "|bool bool_param",
        "|int64 int64_param",
        "|string string_param",
        "|double double_param",
        "|uint64 uint64_param",
    ],
    "InferTensorContents": [
        "*bool bool_contents",
        "*int32 int_contents",
        "*int64 int64_contents",
        "*uint32 uint_contents",
        "*uint64 uint64_contents",
        "*float fp32_contents",
        "*double fp64_contents",
        "*bytes bytes_contents",
    ],
    "ModelInferRequest.InferInputTensor": [
        "string name",
        "string datatype",
        "*int64 shape",
        "{}InferParameter parameters",
        "InferTensorContents contents",
    ],
    "ModelInferRequest.InferRequestedOutputTensor": ["string name", "{}InferParameter parameters"],
    "ModelInferRequest": [
        "string model_name",
        "string model_version",
        "string id",
        "{}InferParameter parameters",
        "*ModelInferRequest.InferInputTensor inputs",
        "*ModelInferRequest.InferRequestedOutputTensor outputs",
        "*bytes raw_input_contents",
    ],
    "ModelInferResponse.InferOutputTensor": [
        "string name",
        "string datatype",
        "*int64 shape",
        "{}InferParameter parameters",
        "InferTensorContents contents",
    ],
    "ModelInferResponse": [
        "string model_name",
        "string model_version",
        "string id",
        "{}InferParameter parameters",
        "*ModelInferResponse.InferOutputTensor outputs",
        "*bytes raw_output_contents",
    ],
}
_TYPES = {
    name: getattr(_Field, f"TYPE_{name.upper()}")
    for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
}


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="radloop/open_inference.proto", package=_PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(_MESSAGES, key=lambda name: name.count(".")):  # enclosing messages first
        outer, _, inner = name.rpartition(".")
        message = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=inner)
        made[name] = message
        for number, field in enumerate(_MESSAGES[name], 1):
            _add_field(message, name, number, field)
    pool = descriptor_pool.DescriptorPool()  # not the default one: tritonclient and others register `inference` there
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


def _add_field(message: Any, path: str, number: int, field: str) -> None:
    kind, name = field.split(" ")
    bare = kind.lstrip("*{}|")
    added = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.startswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        added.oneof_index = 0
    if kind.startswith("{}"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, "", 1, "string key")
        _add_field(entry, "", 2, f"{bare} value")
        bare, kind = f"{path}.{entry.name}", "*"
    if kind.startswith("*"):
        added.label = _Field.LABEL_REPEATED
    if bare in _TYPES:
        added.type = _TYPES[bare]
    else:
        added.type, added.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{bare}"


MESSAGES = _build()
"""Message name to its class."""
