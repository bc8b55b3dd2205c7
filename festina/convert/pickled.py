"""What a file of torch.save describes: its structure and where its tensors lie. Nothing is called, imported or allocated.

`torch.load(weights_only=True)` calls constructors that take a size from the file, such as `torch.Tensor(2**40)`, allocates
the storages of the older format before it has seen their data, hashes tuples of any depth as keys (many levels end the
process) and formats what it refuses to call. Under `FakeTensorMode` it allocates fewer of these and does the rest all the same.
Here a pickle becomes a description, whose sizes `festina.convert.files` compares with the file before it reads any tensor.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

MOST_PICKLED = 64 * 2**20
"""The most bytes of a pickle. 100 bytes describe a tensor, and a byte may become an object of 60."""


MOST_AXES = 64
"""As in NumPy."""

SPARSE = "is sparse; call .to_dense() before saving"
NESTED = "is nested; save its parts, from .unbind()"
QUANTISED = "is quantised; call .dequantize() before saving"
META = "is on the meta device, which has no values"


class ForeignError(ValueError):
    """A pickle holds an object of this name, which is neither a tensor nor a plain value."""


@dataclass(frozen=True)
class Storage:
    """The elements of one or more tensors: `length` of `dtype`, under `key` in the file."""

    dtype: torch.dtype
    key: str
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor: a view of a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all its elements; more than the storage's if the stride repeats some."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self) -> None:
        """Raise unless the view lies within its storage.

        Raises:
            ValueError: it does not.
        """
        numbers = (self.storage.length, self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > MOST_AXES:
            raise ValueError(f"a tensor must have as many strides as axes, at most {MOST_AXES}")
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise ValueError("a tensor must have sizes and strides of at least 0")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride))
        held = self.storage.length * self.storage.dtype.itemsize // self.dtype.itemsize
        if math.prod(self.shape) and last >= held:
            raise ValueError(f"a tensor of shape {list(self.shape)} must lie within its storage of {held} elements")

    def view(self, data: Tensor) -> Tensor:
        """The tensor, given its storage as bytes."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        whole = data[: data.numel() // self.dtype.itemsize * self.dtype.itemsize]
        return whole.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Unsupported:
    """A tensor that is no plain block of numbers; `what` says what it is and what to do."""

    what: str


def load(file: IO[bytes]) -> tuple[object, dict[str, Storage]]:
    """Read one pickle from where the file stands to just after it.

    Returns:
        The object: dicts, lists, tuples and numbers as they were, tensors as `StoredTensor` or `Unsupported`, None for other
        values; and by key the storages that it names.

    Raises:
        ForeignError: it holds an object that torch.save would not write for a state dict.
        Exception: it is damaged; of many types.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}

    def popped() -> list[Any]:
        """What was pushed since the last mark."""
        at = marks.pop()
        found = stack[at:]
        del stack[at:]
        return found

    argument: Any
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        if (position or 0) - start > MOST_PICKLED:
            raise ValueError(f"its structure takes more than {MOST_PICKLED} bytes")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop(), storages
            case "MARK":
                marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT" | "LONG1" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(popped()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                _of_type(list, stack[-1]).append(item)
            case "APPENDS":
                items = popped()
                _of_type(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = popped() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _set(_of_type(dict, stack[-1]), items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(argument))
            case "BINPERSID":
                storage = _storage(*stack.pop())
                storages.setdefault(storage.key, storage)
                stack.append(storage)
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack[-1] = _call(stack[-1], arguments)
            case "BUILD":
                stack.pop()  # attributes, such as the versions of a state dict's modules
            case _:
                raise ValueError(f"torch.save writes no {opcode.name} into a pickle")
    raise EOFError("a pickle ends too early")  # for mypy: genops raises before


def _of_type(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a pickle must add items to a {kind.__name__}, got {type(value).__name__}")
    return value


def _set(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, (str, int, float, type(None))):  # no tuple: Python hashes a deep one without a limit
            target[key] = value


def _storage(kind: str, dtype: torch.dtype, key: str, location: str, length: int, view: object = None) -> Storage:
    if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
        raise ValueError(f"a pickle must refer to whole storages, got {kind!r}")
    return Storage(dtype, str(key), length)


_Made = Callable[..., Any]


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not callable(function):
        raise ValueError(f"a pickle must call what it has named before, got {type(function).__name__}")
    return function(*arguments)


def _tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: object = None,
    pending: object = None,
) -> StoredTensor | Unsupported:
    return _tensor_of_dtype(storage, offset, shape, stride, requires_grad, hooks, storage.dtype, pending)


def _tensor_of_dtype(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    dtype: torch.dtype,
    pending: object = None,
) -> StoredTensor | Unsupported:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor must have a storage and a dtype")
    if pending:
        return Unsupported("waits to be conjugated or negated; call .resolve_conj().resolve_neg() before saving")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _first(value: Any, *rest: Any) -> Any:
    """A parameter is saved as its tensor and flags; a tensor of a device without storages as one of the CPU."""
    return value


def _skipped(*arguments: Any) -> None:
    """A plain value, of which no tensor is part."""


def _unsupported(what: str) -> _Made:
    return lambda *arguments: Unsupported(what)


def _dict(items: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _set(made, [part for pair in items for part in pair])
    return made


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
    "Untyped": torch.uint8,
}

_GLOBALS: dict[str, Any] = {
    **{f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage UntypedStorage": torch.uint8,
    **{f"torch {name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils _rebuild_parameter": _first,
    "torch._utils _rebuild_parameter_with_state": _first,
    "torch._utils _rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor _rebuild_from_type_v2": lambda function, kind, arguments, state: _call(function, arguments),
    "torch._utils _rebuild_sparse_tensor": _unsupported(SPARSE),
    "torch._utils _rebuild_nested_tensor": _unsupported(NESTED),
    "torch._utils _rebuild_qtensor": _unsupported(QUANTISED),
    "torch._utils _rebuild_meta_tensor_no_storage": _unsupported(META),
    "torch._utils _rebuild_wrapper_subclass": _unsupported("is of a subclass of Tensor; save a plain tensor"),
    "torch._utils _rebuild_device_tensor_from_numpy": _unsupported("is stored as an array; save it from the CPU"),
    "torch Tensor": _skipped,
    "torch.nn.parameter Parameter": _first,
    "torch Size": _skipped,
    "torch device": _skipped,
    "torch.serialization _get_layout": _skipped,
    **{f"torch per_{scheme}": None for scheme in ("tensor_affine", "tensor_symmetric")},
    **{f"torch per_channel_{scheme}": None for scheme in ("affine", "symmetric", "affine_float_qparams")},
    "collections OrderedDict": _dict,
    "collections Counter": _skipped,
    "_codecs encode": _skipped,
    **{
        f"{builtins} {name}": _skipped
        for builtins in ("builtins", "__builtin__")
        for name in ("bytearray", "complex", "set")
    },
}
"""What a pickle may name, and what stands for it: the names that `torch.load(weights_only=True)` allows."""


def _global(name: str) -> Any:
    if name not in _GLOBALS:
        raise ForeignError(name.replace(" ", "."))
    return _GLOBALS[name]
