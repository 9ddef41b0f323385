"""Our messages against those of the published clients: the same bytes for the same meaning."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from kttrio.server.grpc.messages import ENUMS, FIELDS, MESSAGES


def published(message: Descriptor, found: dict[str, Descriptor]) -> None:
    """All messages of theirs by name, also those inside of others."""
    found[message.name] = message
    for inner in message.nested_types:
        published(inner, found)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Descriptor]:
    found: dict[str, Descriptor] = {}
    for file in (model_config_pb2.DESCRIPTOR, service_pb2.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            published(message, found)
    return found


RENAMED = {"VersionsLatest": "Latest"}
ELSEWHERE = {"HealthCheckRequest", "HealthCheckResponse"}
"""Those of gRPC's own health check, of which this client knows nothing."""


def shape(field: FieldDescriptor) -> tuple[Any, ...]:
    choice = field.containing_oneof and field.containing_oneof.name
    return field.name, field.number, field.type, field.is_repeated, field.is_packed, choice


@pytest.mark.parametrize("name", sorted(set(FIELDS) - ELSEWHERE))
def test_fields_are_numbered_as_published(theirs: dict[str, Descriptor], name: str) -> None:
    known = {shape(field) for field in theirs[RENAMED.get(name, name)].fields}
    ours = {shape(field) for field in MESSAGES[name].DESCRIPTOR.fields}
    assert ours <= known
    if name.startswith(("ModelInfer", "Infer")):
        assert ours == known or name == "InferStatistics"


def test_words_are_numbered_as_published() -> None:
    types = model_config_pb2.DataType.DESCRIPTOR
    assert ENUMS["DataType"] == tuple(word.name for word in types.values)
    kinds = model_config_pb2.ModelInstanceGroup.Kind.DESCRIPTOR
    assert ENUMS["InstanceKind"] == tuple(word.name for word in kinds.values)


def test_a_request_of_theirs_is_read_and_written_alike() -> None:
    request = service_pb2.ModelInferRequest(model_name="m", id="x", raw_input_contents=[b"a"])
    request.parameters["greedy"].bool_param = True
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.int_contents.extend([1, -2])
    wire = request.SerializeToString(deterministic=True)
    ours = MESSAGES["ModelInferRequest"].FromString(wire)
    assert ours.parameters["greedy"].bool_param
    assert ours.SerializeToString(deterministic=True) == wire
