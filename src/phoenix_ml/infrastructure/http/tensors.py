"""The bodies of ``/v2/models/…/infer``: JSON, with the tensors in it or as raw bytes after it.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and Triton's binary tensor data
extension, which its own clients use by default.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from phoenix_ml.application.infer import Inferred, InferRequest
from phoenix_ml.application.protocol import PREDICTION_IDS, answer_parameters, infer_request
from phoenix_ml.domain.errors import BodyTooLarge, InvalidField, MalformedBody, TensorInvalid
from phoenix_ml.domain.tensors import (
    Tensor,
    check_datatype,
    count_elements,
    decode_raw,
    encode_raw,
)
from phoenix_ml.infrastructure.http.bodies import too_large
from phoenix_ml.infrastructure.http.codec import encode_json

Parameters = dict[str, str | int | float | bool | None]

# What /predict takes too. Raw tensors may be larger, as nothing decodes them one by one.
JSON_LIMIT_BYTES: Final = 10 * 1024 * 1024
# Beside this many names nobody finds the one that matters.
_MOST_TENSORS: Final = 1000
_BINARY: Final = "application/octet-stream"


class _Input(Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class _Output(Struct):
    name: str
    parameters: Parameters | None = None


class InferBody(Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: Parameters | None = None
    outputs: list[_Output] | None = None


class InferOutput(Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, int] | None = None


class InferAnswer(Struct, omit_defaults=True):
    """The outputs; `parameters` has the role, the prediction's id and the device."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, str]
    outputs: list[InferOutput]


_decode_body = msgspec.json.Decoder(InferBody).decode
_decode_any = msgspec.json.Decoder().decode
_FLAT: Final[Mapping[str, "msgspec.json.Decoder[Any]"]] = {
    "BOOL": msgspec.json.Decoder(list[bool]),
    "BYTES": msgspec.json.Decoder(list[str]),
    **{f"FP{bits}": msgspec.json.Decoder(list[float]) for bits in (16, 32, 64)},
    **{f"{sign}INT{bits}": msgspec.json.Decoder(list[int]) for sign in ("", "U") for bits in (8, 16, 32, 64)},
}


class Wanted(Struct, gc=False):
    """How the answer is to be written: which outputs as raw bytes, and whether with all rows' ids."""

    binary: bool
    binary_of: Mapping[str, bool]
    prediction_ids: bool


def decode_infer(
    model_id: str,
    model_version: str | None,
    body: bytes,
    json_bytes: int | None,
    json_limit_bytes: int = JSON_LIMIT_BYTES,
) -> tuple[InferRequest, Wanted]:
    """The request; ``json_bytes`` is where raw tensors begin, None without any.

    Raises MalformedBody for what is no JSON, InvalidField for JSON of another shape, TensorInvalid, and BodyTooLarge for
    more JSON than may hold up everybody else.
    """
    if json_bytes is not None and json_bytes > len(body):
        raise MalformedBody(
            f"Inference-Header-Content-Length is {json_bytes}, the whole body has {len(body)} bytes"
        )
    head = body if json_bytes is None else body[:json_bytes]
    if len(head) > json_limit_bytes:
        raise BodyTooLarge(
            f"the request has {len(head)} bytes of JSON, {json_limit_bytes} are allowed: send the tensors as raw bytes",
            limit_bytes=json_limit_bytes,
        )
    try:
        decoded = _decode_body(head)
    except msgspec.ValidationError as exc:
        raise InvalidField(str(exc)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise MalformedBody(f"the body is not valid JSON: {exc}") from exc
    if len(decoded.inputs) > _MOST_TENSORS:
        raise InvalidField(f"the request has {len(decoded.inputs)} inputs, {_MOST_TENSORS} are allowed")
    position = len(head)
    inputs: dict[str, Tensor] = {}
    for given in decoded.inputs:
        if given.name in inputs:
            raise TensorInvalid(f"input {given.name[:80]!r} is given twice", tensor=given.name)
        size = _binary_size(given)
        if size is None:
            inputs[given.name] = _decode_json(given)
            continue
        raw = memoryview(body)[position : position + size]
        position += size
        if position > len(body):
            raise TensorInvalid(
                f"input {given.name!r}: its binary_data_size of {size} bytes goes beyond the body",
                tensor=given.name,
            )
        inputs[given.name] = Tensor(given.datatype, decode_raw(given.name, given.datatype, given.shape, raw))
    if position != len(body):
        raise MalformedBody(f"{len(body) - position} bytes at the end of the body belong to no input")
    parameters = decoded.parameters or {}
    outputs = decoded.outputs or ()
    wanted = Wanted(
        parameters.get("binary_data_output") is True,
        {
            o.name: o.parameters.get("binary_data") is True
            for o in outputs
            if o.parameters and "binary_data" in o.parameters
        },
        parameters.get(PREDICTION_IDS) is True,
    )
    return infer_request(
        model_id, model_version, decoded.id, inputs, [output.name for output in outputs], parameters
    ), wanted


def _binary_size(given: _Input) -> int | None:
    """How many raw bytes the input has; None where its data are in the JSON."""
    size = None if given.parameters is None else given.parameters.get("binary_data_size")
    if size is None:
        return None
    if len(given.data):
        raise TensorInvalid(f"input {given.name!r} has both 'data' and binary data", tensor=given.name)
    if type(size) is not int or size < 0:
        raise TensorInvalid(f"input {given.name!r}: binary_data_size is a number of bytes", tensor=given.name)
    return size


def _decode_json(given: _Input) -> Tensor:
    """The tensor of an input whose elements stand in the JSON, in one list or nested as its shape is."""
    name, datatype = given.name, given.datatype
    if not len(given.data):
        raise TensorInvalid(f"input {name!r} has no 'data'", tensor=name)
    decoder = _FLAT.get(datatype)
    if decoder is None:
        check_datatype(name, datatype)
        raise TensorInvalid(f"input {name!r}: {datatype} is sent as raw bytes only", tensor=name)
    try:
        elements = decoder.decode(given.data)
    except msgspec.ValidationError as flat_error:
        # Nested, with a null, or of another type: 20 times slower, so not tried first.
        count_elements(name, given.shape)
        elements = _flatten(given)
        if datatype.startswith("FP"):
            elements = [float("nan") if element is None else element for element in elements]
        try:
            elements = msgspec.convert(elements, decoder.type)
        except msgspec.ValidationError as exc:
            raise TensorInvalid(f"input {name!r} ({datatype}): {exc}", tensor=name) from flat_error
    return Tensor.of_elements(name, datatype, given.shape, elements)


def _flatten(given: _Input) -> list[Any]:
    """The elements of nested lists in row-major order. Raises TensorInvalid where they are not of the shape."""
    elements = _decode_any(given.data)
    if not isinstance(elements, list):
        return [elements]
    if elements and isinstance(elements[0], list):
        for depth, _ in enumerate(given.shape):
            if len(elements) != _product(given.shape[: depth + 1]):
                raise _misshapen(given)
            if depth == len(given.shape) - 1:
                break
            if not all(isinstance(part, list) and len(part) == given.shape[depth + 1] for part in elements):
                raise _misshapen(given)
            elements = [element for part in elements for element in part]
    return elements


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _misshapen(given: _Input) -> TensorInvalid:
    return TensorInvalid(
        f"input {given.name!r}: its data are not nested as its shape {given.shape} says; one flat list will do",
        tensor=given.name,
    )


def encode_inferred(answer: Inferred, wanted: Wanted) -> tuple[bytes, int | None]:
    """The body, and where in it raw tensors begin, if there are any."""
    outputs = []
    raw: list[bytes] = []
    for name, tensor in answer.outputs:
        shape = list(tensor.shape)
        if wanted.binary_of.get(name, wanted.binary) or tensor.datatype == "BF16":
            data = encode_raw(tensor)
            raw.append(data)
            outputs.append(InferOutput(name, tensor.datatype, shape, None, {"binary_data_size": len(data)}))
        else:
            outputs.append(InferOutput(name, tensor.datatype, shape, tensor.elements))
    parameters = answer_parameters(answer, wanted.prediction_ids)
    head = encode_json(
        InferAnswer(answer.model_id, answer.model_version, answer.request_id, parameters, outputs)
    )
    if not raw:
        return head, None
    return b"".join((head, *raw)), len(head)


def decompress(body: bytes, coding: str, limit_bytes: int) -> bytes:
    """The body as it was before its Content-Encoding. Raises BodyTooLarge, and MalformedBody for what is damaged."""
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "deflate"):
        raise MalformedBody(f"the Content-Encoding {coding[:40]!r} is not known: gzip and deflate are")
    # Both begin with a header that zlib recognises.
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        whole = stream.decompress(body, limit_bytes + 1)
        if len(whole) > limit_bytes:
            raise too_large(limit_bytes)
        if not stream.eof:
            raise MalformedBody(f"the {coding} body ends too early")
    except zlib.error as exc:
        raise MalformedBody(f"the body is no {coding}: {exc}") from exc
    if stream.unused_data:
        raise MalformedBody(f"bytes follow the {coding} body")
    return whole


def compress(body: bytes, coding: str) -> bytes:
    """The body under a Content-Encoding of gzip or deflate; quickly, as its reader waits."""
    wbits = zlib.MAX_WBITS | (16 if coding == "gzip" else 0)
    stream = zlib.compressobj(1, wbits=wbits)
    return stream.compress(body) + stream.flush()
