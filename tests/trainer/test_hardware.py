"""Devices, dtypes, the compiler, the allocator and the measured ceiling."""

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_server import commands

from fastlm import CompileError, ConfigError, DeviceError, UserError, hardware, measure
from fastlm.hardware import (
    check_compiler,
    device_name,
    has_fast_bfloat16,
    is_out_of_memory,
    select_device,
    select_dtype,
)
from fastlm.measure import matmul_ceiling

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine whose torch finds no GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_nvidia_gpu_present", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_device_error_is_what_callers_catch():
    """CS336's test of get_batch wants a RuntimeError, everybody else a ValueError."""
    assert issubclass(DeviceError, ValueError)
    assert issubclass(DeviceError, RuntimeError)
    assert issubclass(DeviceError, UserError)


@pytest.mark.parametrize(
    "name, message",
    [
        ("gpu", "device='gpu' is unknown: auto, cpu, cuda, cuda:0, mps"),
        ("", "device='' is unknown"),
        ("cuda:x", "device='cuda:x' is unknown"),
        ("meta", "device='meta' is not supported"),
        ("xpu", "device='xpu' is not supported"),
        ("cuda", "device='cuda' is not available: "),
        ("cuda:1", "device='cuda:1' is not available: "),
        ("mps", "device='mps' is not available: it needs macOS"),
    ],
)
def test_devices_that_are_not_there(no_gpu, name, message):
    with pytest.raises(DeviceError) as caught:
        select_device(name)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_devices_that_are_there(no_gpu):
    assert select_device() == select_device("auto") == select_device("cpu") == CPU
    assert select_device(CPU) == CPU


def test_a_gpu_is_the_automatic_choice(two_gpus):
    assert select_device("auto").type == select_device("cuda").type == "cuda"
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match=r"cuda:2.*invalid device ordinal.*has 2 GPU"):
        select_device("cuda:2")


def test_mps_where_there_is_no_cuda(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("auto").type == select_device("mps").type == "mps"


@pytest.mark.parametrize("build", ["CPU-only", "CUDA"])
def test_an_nvidia_gpu_that_torch_cannot_use_stops(no_gpu, monkeypatch, build):
    monkeypatch.setattr(hardware, "_nvidia_gpu_present", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None if build == "CPU-only" else "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError) as caught:
        select_device("auto")
    message = str(caught.value)
    assert "NVIDIA GPU" in message and "--device cpu" in message
    if build == "CPU-only":
        assert "CPU-only build" in message and "install a CUDA build of torch" in message
    else:
        assert "nvidia-smi" in message and "12.8" in message
    assert select_device("cpu") == CPU


def test_the_probe_looks_for_the_driver(monkeypatch):
    asked = []
    monkeypatch.setattr(Path, "exists", lambda self: asked.append(str(self)) or True)
    assert hardware._nvidia_gpu_present()
    assert asked == ["/proc/driver/nvidia/version"]


def test_select_dtype(monkeypatch):
    assert select_dtype("float32", CPU) is torch.float32
    assert select_dtype("bfloat16", CPU) is torch.bfloat16
    assert select_dtype("float16", CPU) is torch.float16
    for fast in (True, False):
        monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda device, fast=fast: fast)
        assert select_dtype("auto", CPU) is (torch.bfloat16 if fast else torch.float32)
    with pytest.raises(ConfigError, match="dtype='fp8': it must be auto, float32"):
        select_dtype("fp8", CPU)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads Linux's /proc/cpuinfo")
def test_fast_bfloat16_is_what_the_processor_says():
    words = Path("/proc/cpuinfo").read_text().split()
    expected = "amx_bf16" in words or "bf16" in words
    if "GenuineIntel" not in words:
        expected = expected or "avx512_bf16" in words
    assert has_fast_bfloat16(CPU) == expected


@pytest.mark.parametrize(
    "features, expected",
    [
        ({"avx512_bf16", "fast_bf16"}, True),
        ({"avx512_bf16"}, False),  # Intel's, slower than float32
        ({"avx512_bf16", "amx_bf16"}, True),
        ({"arm_bf16"}, True),
        (set(), False),
    ],
)
def test_fast_bfloat16_by_processor(monkeypatch, features, expected):
    names = ("avx512_bf16", "fast_bf16", "amx_bf16", "arm_bf16")
    has = {name: name in features for name in names}
    monkeypatch.setattr(hardware, "extension", lambda: SimpleNamespace(cpu_features=lambda: has))
    assert has_fast_bfloat16(CPU) is expected


def test_no_compiler_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError) as caught:
        check_compiler(CPU)
    message = str(caught.value)
    assert "C++ compiler" in message and "apt-get install g++" in message
    assert "drop --compile" in message and "\n" not in message
    assert check_compiler(torch.device("mps")) is None  # needs none

    compiler = tmp_path / "clang++"
    compiler.touch(0o755)
    assert check_compiler(CPU) is None
    monkeypatch.setenv("CXX", "my-c++")
    with pytest.raises(CompileError, match=r"my-c\+\+"):
        check_compiler(CPU)
    compiler.rename(tmp_path / "my-c++")
    assert check_compiler(CPU) is None


def test_no_python_headers_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "g++").touch(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    with pytest.raises(CompileError, match=r"Python\.h is missing.*python3-dev.*drop --compile"):
        check_compiler(CPU)


def tell(program: str, *argv: str, **options) -> list[str]:
    """The words that a function of command_programs prints in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:  # for the files that some of them write
        call = f"command_programs:{program}"
        result = commands().run([*argv], Path(directory), call=call, **options)
    assert result.returncode == 0, result.output
    return result.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_keep_freed_memory_keeps_it():
    """Page faults tell: 5 * 64 MiB are 81,920 pages of 4 KiB, faulted anew or not at all."""
    counts = {}
    for how in ("default", "keep"):
        # Large pages would hide the faults of the default.
        *told, count = tell("count_page_faults", how, env={"THP_MEM_ALLOC_ENABLE": "0"})
        assert told == (["True", "True"] if how == "keep" else [])  # told twice
        counts[how] = int(count)
    if counts["default"] < 1000:
        pytest.skip("this machine's kernel or allocator does not fault pages one by one")
    assert counts["keep"] < counts["default"] / 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's madvise")
def test_huge_pages_move_the_heap_and_keep_what_is_in_it():
    """64 MiB of numbers are on the heap by then; where huge pages are forbidden, none move."""
    asked, equal, grows = tell("move_heap")
    assert equal == grows == "True"
    assert int(asked) % (2 << 20) == 0
    assert int(asked) == 0 or int(asked) >= 60 << 20


def test_importing_changes_no_allocator_and_touches_no_device():
    script = """
import ctypes
calls = []
real = ctypes.CDLL
ctypes.CDLL = lambda *a, **k: calls.append(a) or real(*a, **k)
import torch
calls.clear()
import fastlm, fastlm.train, fastlm.generate, fastlm.run.cli
assert not calls, calls
assert not torch.cuda.is_initialized()
import sys
late = {"tyro", "tokenizers", "matplotlib", "triton", "fastlm._C"} & set(sys.modules)
assert not late, late
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_ceiling_is_the_best_of_at_least_five_shapes(monkeypatch):
    calls = []  # (shape, FLOP/s)
    real = torch.matmul

    def timed(a, b, out):
        start = time.perf_counter()
        real(a, b, out=out)
        shape = (*a.shape, b.shape[1])
        calls.append((shape, 2 * math.prod(shape) / (time.perf_counter() - start)))

    monkeypatch.setattr(torch, "matmul", timed)
    ceiling = matmul_ceiling(CPU, torch.float32, seconds=0.01)
    assert len({shape for shape, _ in calls}) >= 5
    # Timed from inside, each call is a little faster.
    best = max(rate for _, rate in calls)
    assert 0.5 * best < ceiling <= best


@pytest.mark.parametrize("rate, shapes", [(1e8, 1), (3e9, 3)])
def test_the_ceiling_of_a_slow_dtype_is_measured_in_seconds(monkeypatch, rate, shapes):
    """Shapes of which one call would take seconds are left out: a CPU's float16 took minutes."""
    clock, seen = [0.0], set()

    def slow(a, b, out=None):
        shape = (*a.shape, b.shape[1])
        seen.add(shape)
        clock[0] += 2 * math.prod(shape) / rate

    monkeypatch.setattr(torch, "matmul", slow)
    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert matmul_ceiling(CPU, torch.float16) == pytest.approx(rate)
    assert len(seen) == shapes and clock[0] < 15


def test_the_ceiling_of_a_dtype_that_is_slow_in_large_matrices(monkeypatch):
    """One call finds it out; it took seven shapes of half a minute a call."""
    clock = [0.0]

    def slow(a, b, out=None):
        flops = 2 * math.prod((*a.shape, b.shape[1]))
        clock[0] += flops / (1e11 if flops < 1e8 else 1e8)

    monkeypatch.setattr(torch, "matmul", slow)
    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    assert matmul_ceiling(CPU, torch.float16) == pytest.approx(1e11)
    assert clock[0] < 25


def test_peak_memory_counts_what_is_allocated_and_no_mapped_file():
    before, mapped, after, freed = map(int, tell("tell_peak_memory"))
    assert before > 10 << 20 and mapped - before < 20 << 20
    assert 190 << 20 < after - mapped < 260 << 20
    assert freed >= after


def test_out_of_memory_is_recognised():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError())


def test_device_names():
    name = device_name(CPU)
    assert name.endswith(f", {torch.get_num_threads()} threads") and len(name) > 12


def test_a_hypervisors_name_of_an_amd_cpu_tells_its_family(monkeypatch):
    fields = {"model name": "AMD EPYC", "cpu family": "26", "model": "2"}
    monkeypatch.setattr("fastlm.hardware._cpu_info", fields.get)
    assert device_name(CPU).startswith("AMD EPYC (family 26, model 2), ")
    fields["model name"] = "AMD EPYC 9655 96-Core Processor"
    assert device_name(CPU).startswith("AMD EPYC 9655 96-Core Processor, ")


def test_huge_pages_under_the_heap_change_no_content():
    script = """
import re, torch
from fastlm.hardware import back_heap_with_huge_pages, keep_freed_memory
assert keep_freed_memory()
values = torch.arange(8 << 20)  # 64 MiB on the heap
asked = back_heap_with_huge_pages()
assert torch.equal(values, torch.arange(8 << 20))
rollup = open("/proc/self/smaps_rollup").read()
print(asked >> 20, int(re.search(r"AnonHugePages: +([0-9]+) kB", rollup)[1]) >> 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    asked, huge = map(int, done.stdout.split())
    assert asked >= 64
    if asked and huge == 0:
        pytest.skip("this kernel gives no huge pages")
    assert huge >= 64
