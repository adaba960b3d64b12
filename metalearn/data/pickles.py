"""Unpickle arrays, containers, numbers, text and bytes; nothing else, so that no code can run."""

import pickle
import re
from collections import OrderedDict
from typing import IO, Any

import numpy as np


class _DType:
    """A dtype of numbers, text, bytes or objects; its state is ignored except the byte order."""

    def __init__(self, spec: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d*|O8?", spec):
            raise pickle.UnpicklingError(f"an array of {spec}")
        self.value = np.dtype(spec)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that takes its state from a pickle."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # type: ignore[override]
        version, shape, dtype, is_fortran, content = state
        super().__setstate__((version, shape, dtype.value, is_fortran, content))


def _latin1(content: bytes | str, *_: Any) -> bytes:
    return content.encode("latin1") if isinstance(content, str) else content


#: What NumPy names in its pickles. `ndarray` is only named there, so it need not be the class.
_NUMPY: dict[str, Any] = {
    "ndarray": "ndarray",
    "_reconstruct": lambda *_: np.ndarray.__new__(_Array, (0,), "b"),
    "_frombuffer": lambda buffer, dtype, shape, order: np.frombuffer(buffer, dtype.value).reshape(
        shape, order=order
    ),
    "scalar": lambda dtype, content: np.frombuffer(_latin1(content), dtype.value)[0],
    "dtype": _DType,
}
#: How Python 2 and 3 name containers, and bytes in old protocols.
_OTHERS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict, "builtins.set": set,
    "builtins.bytearray": lambda content=b"", *_: bytearray(_latin1(content)[:]),  # no count
    "builtins.bytes": lambda *_: b"",  # the empty ones
    "_codecs.encode": _latin1,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _OTHERS.get(f"{module.replace('__builtin__', 'builtins')}.{name}")
        if re.fullmatch(r"numpy(\._?core\.(multiarray|numeric))?", module):
            known = _NUMPY.get(name)
        if known is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not data")
        return known


def load(stream: IO[bytes]) -> Any:
    """Unpickle arrays, containers, numbers, text and bytes, also of Python 2.

    Raise UnpicklingError for anything else, and any exception for a corrupt file.
    """
    return _Unpickler(stream, encoding="latin1").load()
