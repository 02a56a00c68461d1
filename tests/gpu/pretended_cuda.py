"""A pretended CUDA device (see pretended_cuda.cpp), switched on for good by `enable` in a process of its own.

Every branch of the program for CUDA runs on it. It refuses operands on two devices and has little memory if it must.
It counts kernel launches, copies between host and device, and waits of the host. It computes on the CPU, so it says
nothing about speed, nor about kernels whose values differ from the CPU's.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "pretended_cuda"  # ignored by git
SOURCE = HERE / "pretended_cuda.cpp"
TORCH = "2.13.0"
"""The version whose internals the C++ file replaces; others may differ in them."""

PLENTY = 140 << 30


def obstacle() -> str | None:
    """The reason for which there can be no pretended GPU here; None where there can."""
    if torch.__version__.partition("+")[0] != TORCH:
        return f"the pretended GPU is written for torch {TORCH}, and this is {torch.__version__}"
    if torch.version.cuda is not None:
        return "this torch has kernels for CUDA, so none can be pretended; install the CPU build"
    if not sys.platform.startswith("linux"):
        return "the pretended GPU is built on Linux only"
    if _compiler() is None:
        return "there is no C++ compiler (c++ or g++) for the pretended GPU"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed, and the pretended GPU needs them"
    return None


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def build() -> Path:
    """The compiled library; compiled once for a source, a Python and a torch."""
    compiler = _compiler()
    assert compiler is not None
    identity = f"{sys.implementation.cache_tag} {torch.__version__}".encode() + SOURCE.read_bytes()
    library = BUILD / f"pretended_{hashlib.sha256(identity).hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of a test run may both want it
        if not library.exists():
            half = library.with_suffix(".half")
            includes = [f"-I{place}" for place in (*include_paths(), sysconfig.get_path("include"))]
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=pretended"]
            libraries = [f"-L{place}" for place in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch_python"]
            command = [compiler, *flags, *includes, str(SOURCE), *libraries, "-o", str(half)]
            compiled = subprocess.run(command, capture_output=True, text=True, check=False)
            assert compiled.returncode == 0, compiled.stderr[-5000:]
            half.rename(library)
    return library


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretended", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Properties(NamedTuple):
    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    gcnArchName: str = ""  # noqa: N815 - torch's own name


class Machine:
    """The machine as torch sees it; its memory and capability can be changed between tests."""

    def __init__(self) -> None:
        self.native: Any = _load(build())
        self.capability = (9, 0)

    def held(self, device: int = 0) -> int:
        return self.native.held(device)

    def peak(self, device: int = 0) -> int:
        return self.native.most_held(device)

    def reset_peak(self, device: int = 0) -> None:
        self.native.reset_peak(device)

    @contextmanager
    def memory(self, size: int):
        """Inside, a device has `size` bytes."""
        self.native.set_limit(size)
        try:
            yield
        finally:
            self.native.set_limit(PLENTY)

    @contextmanager
    def of_capability(self, major: int, minor: int):
        """Inside, devices have this compute capability."""
        self.capability = (major, minor)
        try:
            yield
        finally:
            self.capability = (9, 0)


machine: Machine | None = None


def enable(devices: int = 2, memory: int = PLENTY) -> Machine:
    """torch.cuda of this process as on a machine with such devices; a second call changes nothing."""
    global machine
    if machine is not None:
        return machine
    machine = Machine()
    native = machine.native
    native.set_devices(devices)
    native.set_limit(memory)
    import torch._dynamo
    import torch._inductor  # both look, at their import, at what this torch was built with

    def properties(device: Any = None) -> _Properties:
        return _Properties("pretended", *machine.capability, native.limit())

    torch.nn.functional.scaled_dot_product_attention = _attention
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_initialized = lambda: True
    cuda.is_available = lambda: True
    cuda.device_count = lambda: native.devices()
    cuda.current_device = native.device
    cuda.set_device = lambda device: native.set_device(_index(device))
    cuda.get_device_capability = lambda device=None: machine.capability
    cuda.get_device_name = lambda device=None: "pretended"
    cuda.get_device_properties = properties
    cuda.synchronize = lambda device=None: native.waited()
    cuda.empty_cache = lambda: None
    cuda.mem_get_info = lambda device=None: (native.limit() - native.held(_index(device)), native.limit())
    cuda.memory_allocated = lambda device=None: native.held(_index(device))
    cuda.max_memory_allocated = lambda device=None: native.most_held(_index(device))
    cuda.reset_peak_memory_stats = lambda device=None: native.reset_peak(_index(device))
    cuda.is_bf16_supported = lambda *_, **__: machine.capability >= (8, 0)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: None
    cuda._is_in_bad_fork = lambda: False
    cuda.is_current_stream_capturing = lambda: False
    return machine


def _index(device: Any) -> int:
    native = machine.native
    if device is None or isinstance(device, int):
        return native.device() if device is None else device
    index = torch.device(device).index
    return native.device() if index is None else index


class _Attention(torch.autograd.Function):
    """torch's attention as one kernel, and three on the way back, whatever the CPU makes of it."""

    @staticmethod
    def forward(ctx, q, k, v, mask, dropout, causal, scale, gqa):
        output = _uncounted(_plain_attention, q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)
        machine.native.launched("sdpa", 1)
        ctx.save_for_backward(q, k, v, mask)
        ctx.settings = dropout, causal, scale, gqa
        return output

    @staticmethod
    def backward(ctx, gradient):
        *inputs, mask = ctx.saved_tensors
        dropout, causal, scale, gqa = ctx.settings

        def gradients():
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in inputs]
                output = _plain_attention(*leaves, mask, dropout, causal, scale=scale, enable_gqa=gqa)
                return torch.autograd.grad(output, leaves, gradient)

        slopes = _uncounted(gradients)
        machine.native.launched("sdpa_backward", 3)
        return *slopes, None, None, None, None, None


def _uncounted(function, *args, **kwargs):
    machine.native.pause(True)
    try:
        return function(*args, **kwargs)
    finally:
        machine.native.pause(False)


_plain_attention = torch.nn.functional.scaled_dot_product_attention
backends: Counter[str] = Counter()
"""The kernels that torch would take for the attention calls so far."""


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if not query.is_cuda:
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    backends[_backend(query, key, attn_mask)] += 1
    return _Attention.apply(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _backend(query, key, mask) -> str:
    """The kernel that torch 2.x takes for such arguments on a CUDA device, after sdp_utils.cpp (without cuDNN)."""
    major = machine.capability[0]
    half, size = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if mask is None and half and major >= 8 and size <= 256 and size % 8 == 0:
        return "flash"
    emulated = query.dtype == torch.bfloat16 and major < 8
    return "math" if emulated or query.dtype == torch.float64 or key.shape[1] != query.shape[1] else "efficient"


class Watch:
    """Counts of what happens inside `with`: launches, copies and waits; and the lines that cause copies and waits.

    blocking: copies from the host that the host waits for
    places: by kind and line of the package
    """

    def __init__(self) -> None:
        self.places: Counter[tuple[str, str]] = Counter()
        self.blocking = 0

    def _report(self, kind: str, size: int, blocking: bool) -> None:
        frames = [f for f in traceback.extract_stack(limit=60) if "/persona_rlhf/" in f.filename]
        line = f"{frames[-1].filename.rpartition('/persona_rlhf/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
        self.places[kind, line] += 1
        self.blocking += kind == "h2d" and blocking

    def __enter__(self) -> Watch:
        native = machine.native
        native.zero()
        native.by_name(True)
        native.on_transfer(self._report)
        return self

    def __exit__(self, *_: object) -> None:
        native = machine.native
        native.on_transfer(None)
        native.by_name(False)
        counts = native.counts()
        self.names = Counter(native.names())
        self.launches, self.h2d, self.d2h = counts["launches"], counts["h2d"], counts["d2h"]
        self.waits = counts["items"] + counts["waits"]
