"""Settings of the whole process."""

import ctypes
import gc
import sys

import torch

from metalearn.errors import UserError

#: As torch finds it, before any run of this process asks for fewer.
_ALL_THREADS = torch.get_num_threads()


def prepare(device: torch.device, threads: int, precision: str) -> None:
    """CPU threads (0: all), the precision of products on a GPU, and an allocator that keeps what it has.

    glibc returns every large block to the kernel and faults its pages in again at the next step; kept, steps
    of large convolutions are faster (ProtoNet 1.5 times, when it was tried).
    Raises: UserError for a precision that the device does not have.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError("engine.precision=tf32: only CUDA devices have it; use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"  # type: ignore[union-attr]
    torch.set_num_threads(threads or _ALL_THREADS)
    if device.type == "cpu" and (glibc := _glibc()) is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        glibc.mallopt(m_mmap_threshold, 1 << 30)
        glibc.mallopt(m_trim_threshold, (1 << 31) - 1)


def release_memory() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc; other ones have no such settings."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
