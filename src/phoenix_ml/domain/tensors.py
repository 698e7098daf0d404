"""Tensors of any shape, as the Open Inference Protocol names and carries them."""

import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from phoenix_ml.domain.errors import TensorInvalid

Array = NDArray[Any]

# What a graph calls its elements, by the protocol's name for them. numpy has no bfloat16: its 16 bits travel as uint16.
ELEMENT_OF: Final[Mapping[str, str]] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "string",
}
DATATYPE_OF: Final[Mapping[str, str]] = {element: datatype for datatype, element in ELEMENT_OF.items()}
DTYPE_OF: Final[Mapping[str, np.dtype[Any]]] = {
    datatype: np.dtype(object)
    if datatype == "BYTES"
    else np.dtype("<u2" if datatype == "BF16" else element).newbyteorder("<")
    for datatype, element in ELEMENT_OF.items()
}
# numpy has 64 at most; nobody's network has more than eight.
_MOST_DIMENSIONS: Final = 32
_MOST_ELEMENTS: Final = 2**40
_LENGTH_BYTES: Final = 4
_STRUCT_CODE_OF: Final = {"FP32": "f", "FP64": "d", "INT64": "q", "INT32": "i", "BOOL": "?"}
_FEW: Final = 64
# What numpy and C give at least. ONNX Runtime adds up in another order where memory begins elsewhere, so the same
# numbers would get other answers by where they stood in a body.
_ALIGNED_BYTES: Final = 16


class Tensor:
    """Elements of a shape, under the protocol's name for their type. BYTES are an array of ``str`` objects.

    It is made from an array, or by ``of_elements`` from a list; what is not asked for is not made, as a list becomes an
    array and an array a list in 3 µs.
    """

    __slots__ = ("_array", "_elements", "_name", "datatype", "shape")

    def __init__(self, datatype: str, array: Array) -> None:
        self.datatype = datatype
        self.shape: tuple[int, ...] = array.shape
        self._array: Array | None = array
        self._elements: list[Any] | None = None
        self._name = ""

    @classmethod
    def of_elements(cls, name: str, datatype: str, shape: Sequence[int], elements: list[Any]) -> "Tensor":
        """A tensor of as many elements as the shape has, in row-major order and of the Python type that fits.

        Raises TensorInvalid when they are more or fewer.
        """
        check_count(name, shape, elements)
        made = cls.__new__(cls)
        made.datatype, made.shape = datatype, tuple(shape)
        made._array, made._elements, made._name = None, elements, name
        return made

    @property
    def array(self) -> Array:
        """Raises TensorInvalid for elements beyond what the datatype holds."""
        if self._array is None:
            self._array = as_array(self._name, self.datatype, self.shape, self._elements or ())
        return self._array

    @property
    def elements(self) -> list[Any]:
        """In row-major order, as JSON has them; BF16 as the numbers that its bits mean."""
        if self._elements is None:
            array = self.array
            if self.datatype == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            self._elements = array.reshape(-1).tolist()
        return self._elements

    @property
    def is_listed(self) -> bool:
        """Whether the elements are there as a list."""
        return self._elements is not None


def count_elements(name: str, shape: Sequence[int]) -> int:
    """How many elements a tensor of the shape has. Raises TensorInvalid for what is no shape."""
    if len(shape) > _MOST_DIMENSIONS:
        raise TensorInvalid(
            f"tensor {name!r} has {len(shape)} dimensions, {_MOST_DIMENSIONS} are allowed", tensor=name
        )
    count = 1
    for size in shape:
        if not 0 <= size <= _MOST_ELEMENTS:
            count = -1
            break
        count *= size
    if not 0 <= count <= _MOST_ELEMENTS:
        raise TensorInvalid(f"tensor {name!r}: {list(shape)} is not the shape of a tensor", tensor=name)
    return count


def check_count(name: str, shape: Sequence[int], elements: Sequence[Any]) -> None:
    """Raises TensorInvalid unless the shape has as many elements."""
    count = count_elements(name, shape)
    if len(elements) != count:
        raise TensorInvalid(
            f"tensor {name!r} has {len(elements)} elements; its shape {list(shape)} takes {count}",
            tensor=name,
        )


def check_datatype(name: str, datatype: str) -> np.dtype[Any]:
    """The array's type. Raises TensorInvalid for a datatype that the protocol does not have."""
    try:
        return DTYPE_OF[datatype]
    except KeyError:
        raise TensorInvalid(
            f"tensor {name!r} is of datatype {datatype[:40]!r}; the protocol has {', '.join(DTYPE_OF)}",
            tensor=name,
        ) from None


def decode_raw(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """The array of the shape that little-endian, row-major bytes hold; of BYTES each has its u32 length before it.

    Raises TensorInvalid when the bytes are more or fewer.
    """
    dtype = check_datatype(name, datatype)
    count = count_elements(name, shape)
    if datatype == "BYTES":
        return as_array(name, datatype, shape, _split_texts(name, count, bytes(data)))
    if len(data) != count * dtype.itemsize:
        raise TensorInvalid(
            f"tensor {name!r} has {len(data)} bytes of data; {datatype} {list(shape)} takes {count * dtype.itemsize}",
            tensor=name,
        )
    array = np.frombuffer(data, dtype)
    if array.__array_interface__["data"][0] % _ALIGNED_BYTES:
        array = array.copy()
    return array if len(shape) == 1 else array.reshape(shape)


def encode_raw(tensor: Tensor) -> bytes:
    """The bytes that ``decode_raw`` takes."""
    code = _STRUCT_CODE_OF.get(tensor.datatype)
    if code is not None and tensor.is_listed and len(tensor.elements) <= _FEW:
        # By way of an array 4 µs, for one or two numbers.
        try:
            return struct.pack(f"<{len(tensor.elements)}{code}", *tensor.elements)
        except (struct.error, OverflowError):
            pass  # the array knows what is wrong
    if tensor.datatype != "BYTES":
        return tensor.array.tobytes()
    texts = [str(text).encode() for text in tensor.array.reshape(-1)]
    return b"".join([piece for text in texts for piece in (len(text).to_bytes(4, "little"), text)])


def as_array(name: str, datatype: str, shape: Sequence[int], elements: Sequence[Any]) -> Array:
    """The array of the shape from its elements in row-major order, which have the Python type that fits.

    Raises TensorInvalid when they are more or fewer, or beyond what the datatype holds.
    """
    dtype = check_datatype(name, datatype)
    check_count(name, shape, elements)
    if datatype == "BF16":
        raise TensorInvalid(f"tensor {name!r}: BF16 is sent as raw bytes only", tensor=name)
    try:
        with np.errstate(over="ignore"):
            array = np.array(elements, dtype)
    except (OverflowError, ValueError, TypeError) as exc:
        raise TensorInvalid(
            f"tensor {name!r} has an element that is no {datatype}: {exc}", tensor=name
        ) from exc
    if (
        datatype in ("FP16", "FP32")
        and np.isinf(array).any()
        and not np.isinf(np.array(elements, float)).any()
    ):
        raise TensorInvalid(f"tensor {name!r} has a number that is too large for {datatype}", tensor=name)
    return array.reshape(shape)


def _split_texts(name: str, count: int, data: bytes) -> list[str]:
    texts: list[str] = []
    position = 0
    while position < len(data) and len(texts) <= count:
        end = position + _LENGTH_BYTES
        end += int.from_bytes(data[position:end], "little")
        if end > len(data):
            raise TensorInvalid(
                f"tensor {name!r}: element {len(texts)} ends beyond the tensor's data", tensor=name
            )
        try:
            texts.append(data[position + _LENGTH_BYTES : end].decode())
        except UnicodeDecodeError as exc:
            raise TensorInvalid(
                f"tensor {name!r}: element {len(texts)} is not UTF-8, as texts of ONNX are: {exc}",
                tensor=name,
            ) from None
        position = end
    return texts


class _Packed(Struct, array_like=True):
    """A tensor on record; ``data`` is None where it was larger than is kept."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes | None
    sha256: str | None


_decode_packed = msgspec.msgpack.Decoder(_Packed).decode


def pack_tensor(tensor: Tensor, limit_bytes: int) -> bytes:
    """A tensor for the record: whole, or beyond the limit its shape and the SHA-256 of its raw bytes."""
    data = encode_raw(tensor)
    kept = data if _is_kept(tensor, data, limit_bytes) else None
    digest = None if kept is not None else sha256(data).hexdigest()
    return msgspec.msgpack.encode(_Packed(tensor.datatype, tensor.shape, kept, digest))


def _is_kept(tensor: Tensor, data: bytes, limit_bytes: int) -> bool:
    # No database stores U+0000 in a text.
    return len(data) <= limit_bytes and not (
        tensor.datatype == "BYTES" and any("\0" in text for text in tensor.array.reshape(-1))
    )


def unpack_tensor(packed: bytes) -> Tensor | None:
    """The tensor that was packed; None where only its digest is on record."""
    found = _decode_packed(packed)
    if found.data is None:
        return None
    return Tensor(found.datatype, decode_raw("", found.datatype, found.shape, found.data))


def describe_tensor(tensor: Tensor, limit_bytes: int) -> dict[str, Any]:
    """What ``describe_packed`` says of the tensor once it is packed."""
    described: dict[str, Any] = {"datatype": tensor.datatype, "shape": list(tensor.shape)}
    data = encode_raw(tensor)
    if not _is_kept(tensor, data, limit_bytes):
        return described | {"sha256": sha256(data).hexdigest()}
    return described | {"data": tensor.elements}


def describe_packed(packed: bytes) -> dict[str, Any]:
    """What people read of a tensor on record: datatype, shape, and its data in a flat list or its digest."""
    found = _decode_packed(packed)
    described: dict[str, Any] = {"datatype": found.datatype, "shape": list(found.shape)}
    if found.data is None:
        return described | {"sha256": found.sha256}
    array = decode_raw("", found.datatype, found.shape, found.data)
    return described | {"data": Tensor(found.datatype, array).elements}
