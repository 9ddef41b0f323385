"""The messages of KServe's and Triton's gRPC services and of gRPC's health check, as far as they
are served: what the published protocols number, as classes of protobuf.

One flat name space is enough: names of types do not travel. Nothing is registered for others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)

PACKAGE = "inference"

MODEL = ("1 string name", "2 string version")
REPOSITORY_CHANGE = (
    "1 string repository_name",
    "2 string model_name",
    "3 map ModelRepositoryParameter parameters",
)
OUTPUT_TENSOR = (
    "1 string name",
    "2 string datatype",
    "3 repeated int64 shape",
    "4 map InferParameter parameters",
    "5 InferTensorContents contents",
)

FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ServerLiveRequest": (),
        "ServerLiveResponse": ("1 bool live",),
        "ServerReadyRequest": (),
        "ServerReadyResponse": ("1 bool ready",),
        "ModelReadyRequest": MODEL,
        "ModelReadyResponse": ("1 bool ready",),
        "ServerMetadataRequest": (),
        "ServerMetadataResponse": (*MODEL, "3 repeated string extensions"),
        "ModelMetadataRequest": MODEL,
        "TensorMetadata": ("1 string name", "2 string datatype", "3 repeated int64 shape"),
        "ModelMetadataResponse": (
            "1 string name",
            "2 repeated string versions",
            "3 string platform",
            "4 repeated TensorMetadata inputs",
            "5 repeated TensorMetadata outputs",
        ),
        "InferParameter": (
            "1 bool bool_param",
            "2 int64 int64_param",
            "3 string string_param",
            "4 double double_param",
            "5 uint64 uint64_param",
        ),
        "InferTensorContents": (
            "1 repeated bool bool_contents",
            "2 repeated int32 int_contents",
            "3 repeated int64 int64_contents",
            "4 repeated uint32 uint_contents",
            "5 repeated uint64 uint64_contents",
            "6 repeated float fp32_contents",
            "7 repeated double fp64_contents",
            "8 repeated bytes bytes_contents",
        ),
        "InferInputTensor": OUTPUT_TENSOR,
        "InferRequestedOutputTensor": ("1 string name", "2 map InferParameter parameters"),
        "ModelInferRequest": (
            "1 string model_name",
            "2 string model_version",
            "3 string id",
            "4 map InferParameter parameters",
            "5 repeated InferInputTensor inputs",
            "6 repeated InferRequestedOutputTensor outputs",
            "7 repeated bytes raw_input_contents",
        ),
        "InferOutputTensor": OUTPUT_TENSOR,
        "ModelInferResponse": (
            "1 string model_name",
            "2 string model_version",
            "3 string id",
            "4 map InferParameter parameters",
            "5 repeated InferOutputTensor outputs",
            "6 repeated bytes raw_output_contents",
        ),
        "ModelStreamInferResponse": (
            "1 string error_message",
            "2 ModelInferResponse infer_response",
        ),
        "ModelConfigRequest": MODEL,
        "VersionsLatest": ("1 uint32 num_versions",),
        "ModelVersionPolicy": ("1 VersionsLatest latest",),
        "ModelInput": (
            "1 string name",
            "2 DataType data_type",
            "4 repeated int64 dims",
            "8 bool optional",
        ),
        "ModelOutput": ("1 string name", "2 DataType data_type", "3 repeated int64 dims"),
        "ModelInstanceGroup": ("1 string name", "2 int32 count", "4 InstanceKind kind"),
        "ModelTransactionPolicy": ("1 bool decoupled",),
        "ModelConfig": (
            "1 string name",
            "2 string platform",
            "3 ModelVersionPolicy version_policy",
            "4 int32 max_batch_size",
            "5 repeated ModelInput input",
            "6 repeated ModelOutput output",
            "7 repeated ModelInstanceGroup instance_group",
            "17 string backend",
            "19 ModelTransactionPolicy model_transaction_policy",
        ),
        "ModelConfigResponse": ("1 ModelConfig config",),
        "ModelStatisticsRequest": MODEL,
        "StatisticDuration": ("1 uint64 count", "2 uint64 ns"),
        "InferStatistics": (
            "1 StatisticDuration success",
            "2 StatisticDuration fail",
            "3 StatisticDuration queue",
            "4 StatisticDuration compute_input",
            "5 StatisticDuration compute_infer",
            "6 StatisticDuration compute_output",
            "7 StatisticDuration cache_hit",
            "8 StatisticDuration cache_miss",
        ),
        "ModelStatistics": (
            "1 string name",
            "2 string version",
            "3 uint64 last_inference",
            "4 uint64 inference_count",
            "5 uint64 execution_count",
            "6 InferStatistics inference_stats",
        ),
        "ModelStatisticsResponse": ("1 repeated ModelStatistics model_stats",),
        "RepositoryIndexRequest": ("1 string repository_name", "2 bool ready"),
        "ModelIndex": ("1 string name", "2 string version", "3 string state", "4 string reason"),
        "RepositoryIndexResponse": ("1 repeated ModelIndex models",),
        "ModelRepositoryParameter": (
            "1 bool bool_param",
            "2 int64 int64_param",
            "3 string string_param",
            "4 bytes bytes_param",
        ),
        "RepositoryModelLoadRequest": REPOSITORY_CHANGE,
        "RepositoryModelLoadResponse": (),
        "RepositoryModelUnloadRequest": REPOSITORY_CHANGE,
        "RepositoryModelUnloadResponse": (),
        "HealthCheckRequest": ("1 string service",),
        "HealthCheckResponse": ("1 ServingStatus status",),
    }
)
"""Of each message its fields: number, `repeated` or `map` from strings, type, name."""

CHOICES: Mapping[str, str] = MappingProxyType(
    {
        "InferParameter": "parameter_choice",
        "ModelRepositoryParameter": "parameter_choice",
        "ModelVersionPolicy": "policy_choice",
    }
)
"""Messages of which at most one field is set, and the name of that choice."""

ENUMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "DataType": (
            *("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32"),
            *("TYPE_UINT64", "TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64"),
            *("TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING", "TYPE_BF16"),
        ),
        "InstanceKind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
        "ServingStatus": ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"),
    }
)
"""Their words, from 0 on."""

SCALARS = ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")


def message_classes() -> dict[str, Any]:
    """A class for each message, by its name."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in FIELDS
    }


def _file() -> FileDescriptorProto:
    return FileDescriptorProto(
        name="kttrio/inference.proto",
        package=PACKAGE,
        syntax="proto3",
        message_type=[_message(name, lines, CHOICES.get(name)) for name, lines in FIELDS.items()],
        enum_type=[_enum(name, words) for name, words in ENUMS.items()],
    )


def _enum(name: str, words: Iterable[str]) -> EnumDescriptorProto:
    enum = EnumDescriptorProto(name=name)
    for number, word in enumerate(words):
        enum.value.add(name=word, number=number)
    return enum


def _message(name: str, lines: Iterable[str], choice: str | None = None) -> DescriptorProto:
    message = DescriptorProto(name=name)
    if choice is not None:
        message.oneof_decl.add(name=choice)
    for line in lines:
        number, *labels, kind, field_name = line.split()
        if labels == ["map"]:
            entry = f"{field_name.title().replace('_', '')}Entry"
            message.nested_type.append(_entry(entry, kind))
            kind, labels = f"{name}.{entry}", ["repeated"]
        field = message.field.add(name=field_name, number=int(number), **_typed(kind))
        label = FieldDescriptorProto.LABEL_REPEATED if labels else None
        field.label = label or FieldDescriptorProto.LABEL_OPTIONAL
        if choice is not None:
            field.oneof_index = 0
    return message


def _entry(name: str, kind: str) -> DescriptorProto:
    """How a map from strings is written: as repeated pairs."""
    entry = _message(name, ("1 string key", f"2 {kind} value"))
    entry.options.map_entry = True
    return entry


def _typed(kind: str) -> dict[str, Any]:
    if kind in SCALARS:
        return {"type": FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")}
    word = "ENUM" if kind in ENUMS else "MESSAGE"
    number = FieldDescriptorProto.Type.Value(f"TYPE_{word}")
    return {"type": number, "type_name": f".{PACKAGE}.{kind}"}


MESSAGES: Mapping[str, Any] = MappingProxyType(message_classes())
