"""Compile: a kernel's source into a cubin, once: NVRTC, called by ourselves, and a cache on disk.

In: the name of a .cu file, its macros, an architecture.  Out: a cubin, and what ptxas said of its kernels, in the log.
No driver and no device is needed. CuPy's own compilation is not used: it flushes subnormal numbers to zero.

The cache is CCONV_CACHE_DIR, or cconv below XDG_CACHE_HOME or ~/.cache; where it cannot be written, every process
compiles for itself. A cubin's name is the digest of all that it depends on; a digest of the content stands behind it in
the file, so that a damaged one is compiled again. Threads that want the same one wait for the first; processes may both
compile it, and the last replaces the first's file by an equal one in one step.
"""

import ctypes
import hashlib
import importlib.util
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from uuid import uuid4

from ..errors import BackendUnavailable
from ..weights import ProcessLock

#: Contraction of a*b + c is on, as it is on the CPU; subnormal numbers stay, divisions and roots are rounded correctly.
OPTIONS = ("-std=c++17", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--ptxas-options=-v")
HEADER = "cc.cuh"
DIGEST_BYTES = hashlib.sha256().digest_size


class CompileError(BackendUnavailable):
    """NVRTC refused a source of ours; the text is its log."""


def source(name: str) -> str:
    """The text of a file of kernels/."""
    return (resources.files(__package__) / "kernels" / name).read_text(encoding="utf-8")


class Nvrtc:
    """The NVRTC library of this environment: the one that CuPy's package needs, a wheel's, or the system's."""

    def __init__(self):
        self._library = _load()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, function: str, *arguments) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"{function}: {self._library.nvrtcGetErrorString(code).decode()}")

    def _bytes(self, size_of: str, get: str, program) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def compile(self, whole: str, name: str, headers: Mapping[str, str], options: tuple[str, ...]) -> tuple[bytes, str]:
        """The cubin and the log; CompileError with the log if there is none."""
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*(h.encode() for h in headers))
        texts = (ctypes.c_char_p * len(headers))(*(h.encode() for h in headers.values()))
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), whole.encode(), name.encode(), len(headers), texts, names
        )
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), given)
            except CompileError as error:
                log = self._bytes("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).rstrip(b"\0").decode()
                raise CompileError(f"{name} {' '.join(options)}: {error}\n{log}") from None
            log = self._bytes("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).rstrip(b"\0").decode()
            return self._bytes("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))


def _candidates():
    """Where an NVRTC of CUDA 13 or later may lie: in a wheel, then wherever the loader looks."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        yield from sorted(map(str, Path(place).glob("cu*/lib/libnvrtc.so.*")), reverse=True)
    for major in (14, 13):
        yield f"libnvrtc.so.{major}"
    for root in filter(None, (os.environ.get("CUDA_PATH"), "/usr/local/cuda")):
        yield from sorted(map(str, Path(root, "lib64").glob("libnvrtc.so.*")), reverse=True)


def _load() -> ctypes.CDLL:
    for path in _candidates():
        try:
            # NVRTC looks for its built-ins by name, where the loader would not find those that lie beside it.
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise BackendUnavailable(
        "gpu: expected the NVRTC library of CUDA 13 (pip install nvidia-cuda-nvrtc), found none that can be loaded"
    )


_once = ProcessLock()
_nvrtc: Nvrtc | None = None


def nvrtc() -> Nvrtc:
    """This environment's NVRTC, loaded on first use; BackendUnavailable if there is none."""
    global _nvrtc
    with _once:
        _nvrtc = _nvrtc or Nvrtc()
    return _nvrtc


def text(name: str, macros: Mapping[str, object]) -> str:
    """A source behind its macros. They are lines of it and no options: those would reach NVRTC's own headers too."""
    defined = "".join(f"#define {macro} {value}\n" for macro, value in sorted(macros.items()))
    return f'{defined}#line 1 "{name}"\n{source(name)}'


def options(arch: str) -> tuple[str, ...]:
    return (f"-arch={arch}", *OPTIONS)


def cache_folder() -> Path | None:
    """Where cubins are kept, made if it is not there; None where there is no such place."""
    given = os.environ.get("CCONV_CACHE_DIR")
    try:
        folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cconv")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only disk; nobody's home
        return None
    return folder


def read(path: Path) -> bytes | None:
    """What `write` has written there; None if that is not there, or not whole."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(path: Path, content: bytes) -> None:
    """The whole file or none of it, for whoever reads while it is written; OSError if it cannot be."""
    draft = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        with draft.open("xb") as file:
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class _Flights:
    """A lock for each name: whoever comes while another works on the same one waits for it."""

    def __init__(self):
        self._mutex = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def __call__(self, name: str) -> threading.Lock:
        with self._mutex:
            return self._locks.setdefault(name, threading.Lock())


_flights = _Flights()


def cubin(name: str, macros: Mapping[str, object], arch: str) -> bytes:
    """The compiled kernels of a file, from the cache or compiled now.

    Parameters
    ----------
    name : the file, "conv.cu"
    macros : what the source is compiled with, in its own words
    arch : "sm_90", or another architecture that NVRTC knows

    Raises
    ------
    BackendUnavailable
        There is no NVRTC.
    CompileError
        NVRTC refused the source.
    """
    whole, header, given = text(name, macros), source(HEADER), options(arch)
    compiler = nvrtc()
    digest = hashlib.sha256("\0".join((whole, header, *given, compiler.version)).encode()).hexdigest()
    called = f"{Path(name).stem}-{arch}-{digest[:32]}.cubin"
    with _flights(called):
        folder = cache_folder()
        content = read(folder / called) if folder else None
        if content is None:
            content, _ = compiler.compile(whole, name, {HEADER: header}, given)
            if folder:
                with suppress(OSError):  # a full or read-only disk: the next process compiles too
                    write(folder / called, content)
    return content
