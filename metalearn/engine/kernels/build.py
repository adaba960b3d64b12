"""The C implementation of the operators: compiled once by the system's compiler, for this CPU."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).parent
#: Not -ffast-math: it would drop NaN. The two options only drop errno and floating-point traps.
_OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SIGNATURES = {
    "conv": "pppliS", "conv_input": "pppliS", "conv_weight": "pppliS",
    "norm": "ppppppllliff", "norm_vjp": "pppppppppplllif", "norm_second": "pppppppppppplllif",
    "affine": "ppppllllif", "affine_weight": "ppppllllif",
    "norm_pool": "ppppppppliSllff", "norm_pool_vjp": "pppppppppppppliSllff",
    "affine_pool": "ppppliSf", "affine_pool_weight": "pppppliSf",
    "patches": "ppS", "moments": "ppplll",
}  # fmt: skip
_RETURN_ERRORS = ("conv", "conv_input", "conv_weight", "moments")


class Shape(ctypes.Structure):
    """Shape of a convolution, as in kernels.h."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("B", "H", "W", "C", "O", "K", "stride"))


class _State:
    """The library of this process: it never changes once computations have used it."""

    library: ctypes.CDLL | None = None
    #: Why there is none.
    reason = "not loaded yet"


def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it could not be made."""
    return _State.library


def reason() -> str:
    """Return why there is no compiled library."""
    return _State.reason


def load(folder: Path) -> None:
    """Load the library from a cache folder; compile it there first if it is missing.

    Nothing happens where there is no compiler or the folder cannot be written: `reason` says why.
    """
    if _State.library is not None:
        return
    try:
        _State.library = _loaded(folder)
    except (OSError, subprocess.SubprocessError) as error:
        _State.reason = str(error).partition("\n")[0]


def _loaded(folder: Path) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("no C compiler")
    path = folder / f"kernels-{_key(compiler)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            part = Path(name) / path.name
            command = [compiler, *_OPTIONS, "-o", str(part), *_sources("*.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode:
                raise OSError(f"{compiler} failed: {done.stderr.strip() or done.returncode}")
            os.replace(part, path)
    loaded = ctypes.CDLL(str(path))
    types = {
        "p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float,
        "S": Shape,
    }  # fmt: skip
    for name, signature in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = [types[letter] for letter in signature]
        function.restype = ctypes.c_int if name in _RETURN_ERRORS else None
    return loaded


def _sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in _FOLDER.glob(pattern))


@functools.cache
def _key(compiler: str) -> str:
    """Return a hash of the sources, the options, the compiler and the CPU."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    sources = (Path(name).read_bytes() for name in _sources("*.[ch]"))
    machine = f"{platform.machine()} {lines[0]}".encode()
    parts = (*sources, repr(_OPTIONS).encode(), version, flags.encode(), machine)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
