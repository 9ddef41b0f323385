"""What /openapi.json tells of Triton's routes: their paths, and what they answer."""

from __future__ import annotations

from dataclasses import replace

from kttrio.server.schema.operations import (
    ANY,
    BOOLEAN,
    INTEGER,
    OBJECT,
    STRING,
    Operation,
    Parameter,
    Schema,
    list_of,
    map_of,
    one_of,
    record_of,
)
from kttrio.server.triton.request import WHOLE_GENERATE_BODY, IndexBody, InferBody

TAG = "Triton"
NAME = Parameter(name="name", help="of the model")
VERSION = Parameter(name="version", help="of the model; there is one")
MODEL = "/v2/models/{name}"
BINARY = "application/octet-stream"
"""A body whose tensors lie behind its JSON."""

ERROR = record_of({"error": STRING})
TENSOR = record_of({"name": STRING, "datatype": STRING, "shape": list_of(INTEGER)})
METADATA = record_of(
    {
        "name": STRING,
        "versions": list_of(STRING),
        "platform": STRING,
        "inputs": list_of(TENSOR),
        "outputs": list_of(TENSOR),
    }
)
CONFIGURED = record_of(
    {"name": STRING, "data_type": STRING, "dims": list_of(INTEGER)}, optional=BOOLEAN
)
CONFIG = record_of(
    {
        "name": STRING,
        "backend": STRING,
        "max_batch_size": INTEGER,
        "input": list_of(CONFIGURED),
        "output": list_of(CONFIGURED),
        "model_transaction_policy": record_of({"decoupled": BOOLEAN}),
    }
)
SPENT = record_of({"count": INTEGER, "ns": INTEGER})
STATISTICS = record_of(
    {
        "model_stats": list_of(
            record_of(
                {
                    "name": STRING,
                    "version": STRING,
                    "last_inference": INTEGER,
                    "inference_count": INTEGER,
                    "execution_count": INTEGER,
                    "inference_stats": map_of(SPENT),
                }
            )
        )
    }
)
INDEX = list_of(
    record_of(
        {
            "name": STRING,
            "version": STRING,
            "state": one_of("READY", "UNAVAILABLE"),
            "reason": STRING,
        }
    )
)
GENERATED = record_of(
    {"model_name": STRING, "model_version": STRING, "text_output": ANY}, id=STRING
)
INFERRED = record_of(
    {"model_name": STRING, "model_version": STRING, "outputs": list_of(TENSOR)}, id=STRING
)


def _get(path: str, summary: str, answer: Schema | None) -> Operation:
    return Operation(method="get", path=path, summary=summary, tag=TAG, answer=answer, error=ERROR)


def _of_model(operation: Operation) -> tuple[Operation, Operation]:
    """The operation on a model, and on a version of it."""
    versioned = operation.path.replace(MODEL, f"{MODEL}/versions/{{version}}")
    return (
        replace(operation, parameters=(NAME,)),
        replace(operation, path=versioned, parameters=(NAME, VERSION)),
    )


def _post(path: str, summary: str, body: type, answer: Schema) -> Operation:
    return Operation(
        method="post", path=path, summary=summary, tag=TAG, body=body, answer=answer, error=ERROR
    )


def _change(verb: str) -> Operation:
    return Operation(
        method="post",
        path=f"/v2/repository/models/{{name}}/{verb}",
        summary="Refused: the server has the model that it was started with.",
        tag=TAG,
        answer=None,
        error=ERROR,
        parameters=(NAME,),
    )


OPERATIONS = (
    replace(_get("/v2/health/live", "Whether the server is there.", None), open=True),
    replace(_get("/v2/health/ready", "Whether requests are served; 400: not.", None), open=True),
    _get("/v2", "The server and what it can do.", OBJECT),
    *_of_model(_get(f"{MODEL}/ready", "Whether it is served; 400: not.", None)),
    *_of_model(_get(MODEL, "Its inputs and outputs.", METADATA)),
    *_of_model(_get(f"{MODEL}/config", "The same as Triton's ModelConfig.", CONFIG)),
    *_of_model(_get(f"{MODEL}/stats", "Its requests over this protocol.", STATISTICS)),
    _get("/v2/models/stats", "The same of all models.", STATISTICS),
    _post("/v2/repository/index", "The models, and whether they are ready.", IndexBody, INDEX),
    _change("load"),
    _change("unload"),
    *_of_model(
        replace(
            _post(f"{MODEL}/infer", "Outputs for input tensors.", InferBody, INFERRED),
            other_bodies=(BINARY,),
            other_answers=(BINARY,),
        )
    ),
    *_of_model(
        _post(f"{MODEL}/generate", "The answer to a prompt.", WHOLE_GENERATE_BODY, GENERATED)
    ),
    *_of_model(
        replace(
            _post(f"{MODEL}/generate_stream", "The same in pieces.", WHOLE_GENERATE_BODY, {}),
            answer=None,
            streams=True,
        )
    ),
)
