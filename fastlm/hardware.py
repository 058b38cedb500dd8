"""What the machine has and can do: device, dtype, allocator, compiler, cores."""

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from fastlm.errors import CompileError, ConfigError, DeviceError
from fastlm.extension import extension

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def select_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`: auto, cpu, cuda, cuda:i or mps.

    "auto" is CUDA (or ROCm), else MPS, else the CPU. Raises DeviceError for a name that is unknown
    or a device that is not there, and for "auto" on a machine whose NVIDIA GPU torch cannot use:
    training on its CPU is never what was meant.
    """
    if str(name) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if _nvidia_gpu_present():
            raise DeviceError(
                f"this machine has an NVIDIA GPU, but {_why_no_cuda()}; --device cpu trains on the "
                f"CPU all the same"
            )
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"device={str(name)!r} is unknown: auto, cpu, cuda, cuda:0, mps"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device={str(name)!r} is not available: {_why_no_cuda()}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"device={str(name)!r} is not available: CUDA error: invalid device ordinal, this "
                f"machine has {torch.cuda.device_count()} GPU(s), cuda:0 is the first"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("device='mps' is not available: it needs macOS on Apple silicon")
    elif device.type != "cpu":
        raise DeviceError(f"device={str(name)!r} is not supported: auto, cpu, cuda, cuda:0, mps")
    return device


def _nvidia_gpu_present() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "Torch not compiled with CUDA enabled: this torch is a CPU-only build "
            f"({torch.__version__}); install a CUDA build of torch"
        )
    return (
        f"torch {torch.__version__} finds no usable GPU (CUDA {torch.version.cuda}): check that "
        f"`nvidia-smi` works, that the driver is recent enough and CUDA_VISIBLE_DEVICES is right"
    )


def device_name(device: torch.device) -> str:
    """The device's name for people: "NVIDIA H200" or "Intel(R) Xeon(R) Processor, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    if name.startswith("AMD") and not any(c.isdigit() for c in name):  # as hypervisors call it
        name += f" (family {_cpu_info('cpu family')}, model {_cpu_info('model')})"
    if device.type == "mps":
        return f"{name} GPU"
    return f"{name}, {torch.get_num_threads()} threads"


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, in use or not. 0: a device that shares the machine's."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def _cpu_info(field: str) -> str:
    """A field of Linux's /proc/cpuinfo for the first core; "" if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == field), "")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Does the hardware multiply bf16 matrices faster than fp32?

    Told by what it is, not by a measurement: the same machine must choose the same dtype every
    time. Intel's AVX-512-BF16 without AMX does not count: its bf16 matmuls reach 0.6 of the fp32
    rate, AMD's 2 (bench/LOG.md, 2026-11-26).
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # it asks the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features = extension().cpu_features()
        return features["fast_bf16"] or features["amx_bf16"] or features["arm_bf16"]
    return False


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """The matmul dtype called `name`; "auto": bfloat16 if it is faster there, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r}: it must be auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def matmul_precision() -> str:
    """torch's for fp32 matmuls: "highest", "high" or "medium". Of one that was set for a backend
    (torch.backends.cuda.matmul.fp32_precision) torch refuses to tell: "cuda tf32, cpu none"."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        return f"cuda {cuda.fp32_precision}, cpu {cpu.fp32_precision}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matmuls inside compute in `dtype`; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed memory and use it again; returns whether it does.

    For training on a CPU: call it once, before the first large tensor. By default a large tensor is
    mapped when it is made and given back when it is freed, so each one's pages are zeroed and
    faulted in anew: a tenth of a training step, and half the time of a fast kernel that writes into
    a new tensor. This sets M_MMAP_MAX = 0 (no mappings of their own), M_TRIM_THRESHOLD = 2 GiB - 1
    and M_TOP_PAD = 64 MiB (the heap keeps its end).

    It costs memory, for the rest of the process: what is freed stays with the process, other
    programs cannot have it, and free pieces between living tensors may be too small for the next
    large one, so that the process may hold more than it ever used at once. It does nothing and
    returns False with another malloc that answers no mallopt (macOS, musl). Under jemalloc
    or tcmalloc, if preloaded, the call has no effect. Calling it again changes nothing; importing
    fastlm does not call it, the trainer does on a CPU.
    """
    if sys.platform != "linux":
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another libc, musl for one
        return False
    largest = 2**31 - 1
    return bool(
        mallopt(m_mmap_max, 0)
        and mallopt(m_trim_threshold, largest)
        and mallopt(m_top_pad, 64 << 20)
    )


def back_heap_with_huge_pages() -> int:
    """Moves the heap, as far as it has grown, to 2 MiB pages now; returns the bytes asked for.

    Fewer page-table walks: for large tensors in memory that keep_freed_memory() keeps. glibc can do
    it by itself (glibc.malloc.hugetlb=1), but only from the environment before the process starts.
    If the kernel cannot (before Linux 6.1, or huge pages forbidden), nothing changes.
    """
    if sys.platform != "linux":
        return 0
    huge_page, madv_hugepage, madv_collapse = 2 << 20, 14, 25  # <asm-generic/mman-common.h>
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    asked = 0
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        if not line.endswith("[heap]"):
            continue
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        begin, end = -(-begin // huge_page) * huge_page, end // huge_page * huge_page
        if end > begin:
            address, length = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
            if madvise(address, length, madv_hugepage) == 0:
                madvise(address, length, madv_collapse)
                asked += end - begin
    return asked


def _compilers() -> list[str]:
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would take."""
    return next((name for name in _compilers() if shutil.which(name)), None)


def check_compiler(device: torch.device) -> None:
    """Raises CompileError, saying what to install, if torch.compile cannot work on `device`."""
    if device.type == "mps":
        return
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise CompileError(
                f"--compile needs Triton on a GPU and it cannot be imported ({error}); install it "
                f"(pip install triton), or drop --compile"
            ) from error
    if cxx_compiler() is None:
        raise CompileError(
            f"--compile needs a C++ compiler and none was found ({', '.join(_compilers())}); "
            f"install one (Debian, Ubuntu: apt-get install g++), or drop --compile"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise CompileError(
            f"--compile needs Python's headers and {header} is missing; install them (Debian, "
            f"Ubuntu: apt-get install python3-dev), or drop --compile"
        )


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Is it a device's or the CPU allocator's report that memory ran out?"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def use_all_cores(local_size: int) -> None:
    """Shares the cores this process may use among the machine's ranks.

    torchrun sets OMP_NUM_THREADS=1 where it was not set. The environment that torchrun itself was
    started with tells; where that cannot be read (Linux alone has it), the variable is believed.
    """
    if "OMP_NUM_THREADS" in os.environ:
        try:
            parent = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        except OSError:
            return
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if not by_torchrun or any(line.startswith(b"OMP_NUM_THREADS=") for line in parent):
            return
    torch.set_num_threads(max(1, len(_cores()) // local_size))


def _cores() -> set[str]:
    """The physical cores that this process may use, each named by its hardware threads."""
    if not hasattr(os, "sched_getaffinity"):
        return {str(number) for number in range(os.cpu_count() or 1)}
    found = set()
    for number in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        found.add(siblings.read_text() if siblings.exists() else str(number))
    return found
