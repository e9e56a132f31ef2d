"""The shared library behind the kernels: found, loaded and told which instruction set to use.

Installing Sordino builds it if there is a C++ compiler. Without it, or where ``SORDINO_KERNELS=off`` says so, everything
runs on torch alone, with the same results and slower. ``SORDINO_KERNELS=portable|avx2|avx512|amx`` forces an instruction set;
it is meant for tests and for the hunt for errors.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sordino.errors import InputError

LEVELS = ("portable", "avx2", "avx512", "amx")  # in the order of sordino_choose in dispatch.cpp
VARIABLE = "SORDINO_KERNELS"
_NAME = "sordino_kernels.so"

_P, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "sordino_choose": (_I32,),
    "sordino_openmp": (_P,),
    "sordino_product": (_P, _P, _I32, _I64, _P, _I32),
    "sordino_rounded_product": (_P, _P, _I32, _I64, _I32, _F32, _P, _P, _I32),
    "sordino_encode": (_P, _I32, _I64, _I64, _I32, _F32, _P, _P, _I32),
    "sordino_rescale": (_P, _P, _I64, _I64, _I64, _P, _I32, _P, _I32, _I32),
    "sordino_values": (_P, _I64, _I64, _I32, _P, _I32),
    "sordino_centred": (_P, _I64, _I64, _P, _I32),
    "sordino_many": (_P, _P, _I64, _P, _I32, _P, _I32, _I32),
    "sordino_norm": (_P, _P, _P, _P, _P, _I32, _I64, _I64, _I32),
    "sordino_place": (_P, _P, _P, _P, _I32, _P, _I32, _I64, _I64, _I64, _I64, _I32),
    "sordino_glu": (_P, _P, _P, _I32, _I64, _I32),
    "sordino_turn": (_P, _P, _P, _I32, _I64, _I32),
    "sordino_store": (_P, _P, _P, _P, _I32, _I64, _I64, _I64, _I64, _P, _I64, _I64, _I32),
    "sordino_load": (_P, _P, _I64, _I64, _I64, _I64, _I64, _I32, _P, _I32),
    "sordino_grid": (_P, _P, _P, _P, _I32, _I64, _I64, _I32, _P, _I32),
    "sordino_grid_back": (_P, _I32, _P, _P, _P, _I64, _I64, _P, _P, _I32),
    "sordino_keep_near": (_P, _P, _I32, _F32, _I64, _I64, _I32),
    "sordino_norm_back": (_P, _P, _P, _I32, _I64, _I64, _P, _P, _I64, _I32),
    "sordino_glu_back": (_P, _P, _P, _I32, _I64, _P, _P, _I32),
    "sordino_round": (_P, _P, _P, _P, _I32, _I32, _I64, _I64, _P, _I32),
    "sordino_round_back": (_P, _P, _P, _P, _P, _I32, _I32, _I64, _I64, _P, _P, _I32),
    "sordino_weigh": (_P, _I64, _I64, _I64, _I64, _F32, _P, _I32),
    "sordino_weigh_back": (_P, _P, _P, _I64, _I64, _I64, _I64, _F32, _P, _I32),
    "sordino_decode": (_P, _P, _I32, _P, _P, _P, _P, _I32, _P, _I64, _I32),
    "sordino_suits_prompt": (_P, _I32),
    "sordino_prompt": (_P, _P, _I32, _P, _P, _P, _P, _I32, _P, _I64, _I64, _P, _I32),
    "sordino_attend": (_P, _P, _P, _P, _I64, _I64, _P, _I32),
}


class Weight(ctypes.Structure):
    """A packed weight as the kernels see it: ``Linear`` of kernels.h. Addresses are plain numbers, so that it can be copied."""

    _fields_ = (
        ("codes", ctypes.c_uint64),
        ("scale", ctypes.c_uint64),
        ("zero", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("additive", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    """As in block.h; addresses are plain numbers here and below."""

    _fields_ = (("gain", ctypes.c_uint64), ("bias", ctypes.c_uint64), ("eps", ctypes.c_double))


class Rounding(ctypes.Structure):
    """How a linear's input is rounded, as in block.h."""

    _fields_ = (
        ("scale", ctypes.c_uint64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("fixed", ctypes.c_int32),
        ("uneven", ctypes.c_int32),
    )


class Turn(ctypes.Structure):
    """A rotation, as in block.h."""

    _fields_ = (("left", ctypes.c_uint64), ("order", ctypes.c_int64), ("power", ctypes.c_int64))


class Format(ctypes.Structure):
    """How a cache stores keys or values, as in block.h."""

    _fields_ = (
        ("share", ctypes.c_uint64),
        ("bits", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("fixed", ctypes.c_int32),
        ("share_type", ctypes.c_int32),
    )


class Block(ctypes.Structure):
    """A decoder layer, as in block.h; linears in the order q, k, v, o, gate, up, down."""

    _fields_ = (
        ("linear", Weight * 7),
        ("rounding", Rounding * 7),
        ("norm", Norm * 4),
        ("keys", Turn),
        ("down", Turn),
        ("key", Format),
        ("value", Format),
        ("prefix_key", ctypes.c_uint64),
        ("prefix_value", ctypes.c_uint64),
        ("key_mean", ctypes.c_uint64),
        ("prefix", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class Held(ctypes.Structure):
    """Where a layer's cache is, as in block.h."""

    _fields_ = (
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("length", ctypes.c_int64),
        ("room", ctypes.c_int64),
    )


_LOCK = threading.RLock()


class _State:
    """What is in use; ``library`` is None for torch alone."""

    library: ctypes.CDLL | None = None
    name: str = ""
    products = 0.0  # see products_seconds


@lru_cache
def _load() -> ctypes.CDLL | None:
    """The library, from beside this file or, in an editable install, from where it was built to."""
    from sordino.runtime import kernels

    for folder in kernels.__path__:
        file = Path(folder) / _NAME
        if file.is_file():
            try:
                library = ctypes.CDLL(str(file))
            except OSError:  # built for another machine
                return None
            if not all(hasattr(library, name) for name in _SIGNATURES):  # built from other sources
                return None
            for name, arguments in _SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, ctypes.c_int
            library.sordino_openmp(_openmp())
            return library
    return None


def _openmp() -> int | None:
    """Address of ``GOMP_parallel`` of the OpenMP runtime that torch has loaded for all to see, if it has."""
    if sys.platform == "win32" or "OpenMP" not in torch.__config__.parallel_info():
        return None
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value


def available() -> list[str]:
    """Instruction sets that this build and this machine have, slowest first; empty without a library."""
    library = _load()
    if library is None:
        return []
    found = [name for i, name in enumerate(LEVELS) if library.sordino_choose(i) == 0]
    if _State.name in LEVELS:
        library.sordino_choose(LEVELS.index(_State.name))
    return found


def choose(wanted: str | None) -> str:
    """Use an instruction set from now on, or "off", or (None) the best one; returns what is used.

    Raises:
        InputError: if it is not one, or this build or machine does not have it.
    """
    if wanted is not None and wanted not in ("off", *LEVELS):
        raise InputError(f"{VARIABLE}={wanted}: one of off, {', '.join(LEVELS)}")
    with _LOCK:
        return _choose(wanted)


def _choose(wanted: str | None) -> str:
    have = available()
    if wanted not in (None, "off", *have):
        raise InputError(f"{VARIABLE}={wanted}: this build or machine has {', '.join(have) or 'no kernels'}")
    name = have[-1] if wanted is None and have else wanted or "off"
    library = None if name == "off" else _load()
    if library is not None:
        library.sordino_choose(LEVELS.index(name))
    _State.library, _State.name = library, name
    return name


def active() -> ctypes.CDLL | None:
    """The library in use, or None for torch alone; the first call reads the environment."""
    if not _State.name:  # threads that come meanwhile wait for the first one's choice
        choose(os.environ.get(VARIABLE) or None)
    return _State.library


def products_seconds(more: float = 0.0) -> float:
    """Seconds that prompts in one call have spent in products of linears, with so many more from now on."""
    _State.products += more
    return _State.products


def present() -> ctypes.CDLL:
    """The library in use, for callers that know there is one."""
    found = active()
    assert found is not None
    return found


def attends_in_bf16(size: int) -> bool:
    """Whether attention of heads of some size is made of products of bf16 (attend_half.h)."""
    return _State.name in ("avx512", "amx") and size % 64 == 0


def status() -> str:
    """Which path linears take on the CPU, in words."""
    if active() is not None:
        return f"native, {_State.name}"
    if os.environ.get(VARIABLE) == "off" or _load() is not None:
        return "torch: the kernels are switched off"
    return "torch, slow: no native kernels; install a C++ compiler and reinstall Sordino (pip install --force-reinstall)"


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds that the body spends in each function of the library, by its name; empty without one."""
    spent: dict[str, float] = {}
    real = active()

    class Timed:
        def __getattr__(self, name: str) -> Any:
            function = getattr(real, name)

            def call(*args: Any) -> Any:
                started = time.perf_counter()
                out = function(*args)
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
                return out

            setattr(self, name, call)
            return call

    stand_in: Any = Timed()
    _State.library = None if real is None else stand_in
    try:
        yield spent
    finally:
        _State.library = real


@contextmanager
def using(name: str | None) -> Iterator[str]:
    """Use an instruction set for the body, then what was used before; see :func:`choose`."""
    active()
    before = _State.name
    try:
        yield choose(name)
    finally:
        choose(before)
