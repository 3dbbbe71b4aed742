"""A pipe that ends this process with status 1 when a byte arrives, also while Python code can't run.

A main thread that is blocked in C++ code, for example in a kernel launch behind a collective that never ends, may hold
Python's lock. Then no Python thread or signal handler of this process runs, and only another process could end it: with
a signal, which would not be status 1. So glibc's asynchronous input reads the pipe, in a thread that needs no Python,
and calls `_exit(1)`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

STATUS = 1
_SIGEV_THREAD = 2


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _Request(ctypes.Structure):
    """glibc's struct aiocb on 64-bit Linux, which has 168 bytes."""

    _fields_ = (
        ("fildes", ctypes.c_int),
        ("opcode", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("sigevent", _SigEvent),
        ("internal", ctypes.c_byte * 72),
    )


class _Armed:
    """The pipe of this process, and the memory that glibc refers to."""

    process = 0
    write_end = -1
    kept: tuple[Any, ...] = ()


def arm() -> int | None:
    """The write end of the pipe: a byte written to it, by any process, ends this process with status 1.

    This process keeps the write end open, so that the end of another process that holds it does nothing. A second call
    returns the same. None where the system has no such function; then only SIGKILL ends the process.
    """
    if _Armed.process == os.getpid():
        return _Armed.write_end
    if not sys.platform.startswith("linux") or sys.maxsize <= 2**32 or not _is_glibc():
        return None
    try:
        read, exit_ = _function("aio_read"), _function("_exit")
    except AttributeError:
        return None
    read_end, write_end = os.pipe()
    buffer, request = ctypes.create_string_buffer(1), _Request()
    request.fildes, request.buffer, request.nbytes = read_end, ctypes.addressof(buffer), 1
    request.sigevent.notify, request.sigevent.value = _SIGEV_THREAD, STATUS
    request.sigevent.function = ctypes.cast(exit_, ctypes.c_void_p).value
    if read(ctypes.byref(request)) != 0:
        os.close(read_end)
        os.close(write_end)
        return None
    _Armed.process, _Armed.write_end, _Armed.kept = os.getpid(), write_end, (request, buffer, exit_)
    return write_end


def _is_glibc() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, OSError, ValueError):
        return False


def _function(name: str) -> Any:
    """A function of the C library; before glibc 2.34 asynchronous input was in librt."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except AttributeError:
        try:
            return getattr(ctypes.CDLL("librt.so.1"), name)
        except OSError:
            raise AttributeError(name) from None
