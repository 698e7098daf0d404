"""Tensors of the Open Inference Protocol: bytes in, bytes out, and what goes on record."""

from __future__ import annotations

import hashlib
import json
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from phoenix_ml.domain.errors import MalformedBody, TensorInvalid
from phoenix_ml.domain.rows import Column, ElementType, RowFormat
from phoenix_ml.domain.tensors import (
    DTYPE_OF,
    Tensor,
    as_array,
    decode_raw,
    describe_packed,
    describe_tensor,
    encode_raw,
    pack_tensor,
    unpack_tensor,
)
from phoenix_ml.infrastructure.http.tensors import compress, decode_infer, decompress

shapes = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
texts = st.text(st.characters(codec="utf-8"), max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any tensor that the protocol can carry."""
    datatype = draw(st.sampled_from(sorted(DTYPE_OF)))
    shape = draw(shapes)
    if datatype == "BYTES":
        elements = draw(st.lists(texts, min_size=prod(shape), max_size=prod(shape)))
        return Tensor(datatype, np.array(elements, object).reshape(shape))
    return Tensor(datatype, draw(hnp.arrays(DTYPE_OF[datatype], shape)))


def same(one: Tensor, other: Tensor) -> bool:
    return (
        one.datatype == other.datatype
        and one.array.dtype == other.array.dtype
        and one.array.shape == other.array.shape
        and encode_raw(one) == encode_raw(other)
    )


@given(tensors())
def test_raw_bytes_come_back_as_the_tensor(tensor: Tensor) -> None:
    """To the bit, NaNs included: what the engine gets is what the caller sent."""
    array = decode_raw("x", tensor.datatype, tensor.array.shape, encode_raw(tensor))
    assert same(Tensor(tensor.datatype, array), tensor)


@given(tensors(), st.integers(0, 200))
def test_what_is_packed_comes_back_or_is_its_digest(tensor: Tensor, limit_bytes: int) -> None:
    """A record is whole or says which tensor it was; both descriptions agree."""
    packed = pack_tensor(tensor, limit_bytes)
    found = unpack_tensor(packed)
    described = describe_packed(packed)
    # As text: NaN differs from itself.
    assert repr(described) == repr(describe_tensor(tensor, limit_bytes))
    if found is not None:
        assert same(found, tensor)
        assert "sha256" not in described
    else:
        assert described["sha256"] == hashlib.sha256(encode_raw(tensor)).hexdigest()
        assert "data" not in described


@given(st.lists(tensors(), max_size=4))
def test_a_row_of_tensors_comes_back(row: list[Tensor]) -> None:
    """The log splits a row into its tensors again."""
    row_format = RowFormat([Column(f"t{i}", ElementType.TENSOR) for i in range(len(row))])
    packed = [pack_tensor(tensor, 1000) for tensor in row]
    data = row_format.pack_tensors(packed)
    assert list(row_format.split_tensors(data).values()) == packed
    assert repr(row_format.unpack(data)) == repr([describe_packed(one) for one in packed])


@given(tensors())
def test_json_flat_or_nested_is_the_same_tensor(tensor: Tensor) -> None:
    """Clients write either."""
    if tensor.datatype == "BF16":
        return
    array = tensor.array
    if array.dtype.kind == "f":
        array = np.where(np.isinf(array), 0, array).astype(array.dtype)
    shape = list(array.shape)
    decoded = []
    for data in (array.reshape(-1).tolist(), array.tolist()):
        text = json.dumps(data)
        if array.dtype.kind == "f":  # a text may read NaN
            text = text.replace("NaN", "null")
        body = f'{{"inputs":[{{"name":"x","datatype":"{tensor.datatype}","shape":{shape},"data":{text}}}]}}'
        request, _ = decode_infer("m", None, body.encode(), None)
        decoded.append(request.inputs["x"])
    expected = (
        Tensor(tensor.datatype, np.where(np.isnan(array), np.nan, array).astype(array.dtype))
        if (array.dtype.kind == "f")
        else Tensor(tensor.datatype, array)
    )
    assert same(decoded[0], decoded[1])
    assert decoded[0].array.shape == expected.array.shape
    assert repr(decoded[0].elements) == repr(expected.elements)


@given(st.binary(max_size=300), st.none() | st.integers(0, 400))
def test_no_body_does_more_than_being_refused(body: bytes, json_bytes: int | None) -> None:
    """Whatever comes, the answer is a 400 in the end, or a request."""
    with pytest.raises((MalformedBody, TensorInvalid)):
        decode_infer("m", None, b"\0" + body, json_bytes)


@pytest.mark.parametrize(
    ("datatype", "elements"),
    [
        ("UINT8", [256]),
        ("UINT8", [-1]),
        ("INT64", [2**63]),
        ("FP16", [65520.0]),
        ("FP32", [1e39]),
        ("BF16", [1.0]),
    ],
)
def test_what_a_datatype_cannot_hold_is_refused(datatype: str, elements: list[Any]) -> None:
    """A number that wraps around or becomes infinite would be another number."""
    with pytest.raises(TensorInvalid):
        as_array("x", datatype, [1], elements)


def test_bfloat16_is_listed_as_the_numbers_that_it_means() -> None:
    """Its bits are the upper half of a float32's."""
    bits = (np.array([1.0, -2.5, 0.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert Tensor("BF16", bits).elements == [1.0, -2.5, 0.0]


@given(st.binary(max_size=2000), st.sampled_from(["gzip", "deflate"]))
def test_compressed_bodies_come_back(body: bytes, coding: str) -> None:
    """What we compress we can read, and whatever breaks off is refused."""
    packed = compress(body, coding)
    assert decompress(packed, coding, 2000) == body
    with pytest.raises(MalformedBody):
        decompress(packed[:-1], coding, 2000)
    with pytest.raises(MalformedBody):
        decompress(packed + b"x", coding, 2000)
