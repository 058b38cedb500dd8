"""csrc/: its C++ tests with and without sanitizers, and the instruction sets seen from Python.

The C++ tests (tests/csrc/) are built by the CMakeLists.txt that builds the extension, with
sanitizers and, where its compiler and emulator are installed, for aarch64. The extension itself is
tested through Python, in test_gather_batch*.py and test_cross_entropy*.py.
"""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastlm.extension import extension

ROOT = Path(__file__).resolve().parents[2]

# The -fsanitize value: CMake options. CMakeLists.txt leaves OpenMP out of "thread", and so does the
# other one where asked: loops are then those of csrc/parallel.cpp's own threads. The driver is
# compiled with -O0, which takes a third of the time; the kernels with -O1, whatever the build type.
BUILDS = {
    "address,undefined": ["-DFASTLM_SANITIZE=address,undefined", "-DFASTLM_OPENMP=OFF"],
    "thread": ["-DFASTLM_SANITIZE=thread"],
}
# Debian: apt install g++-aarch64-linux-gnu qemu-user
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
BUILDS_FOR_ARM = [
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}",
]


def tool(name: str) -> str:
    """The program `name`, of this environment before the system's."""
    directories = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    path = shutil.which(name, path=directories)
    assert path, f"{name} not found: pip install {name} (it belongs to fastlm's extra `test`)"
    return path


@functools.cache
def supports(sanitizer: str, directory: Path) -> bool:
    """Does the C++ compiler have the runtime library of this sanitizer?"""
    source = directory / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "clang++"
    command = [compiler, f"-fsanitize={sanitizer}", source, "-o", directory / "probe"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds the C++ tests, once for each way; the path of the binary."""

    @functools.cache
    def built(name: str) -> Path:
        directory = tmp_path_factory.mktemp("csrc")
        if not supports(name, directory):
            pytest.skip(f"the C++ compiler has no runtime library for -fsanitize={name}")
        return build_tests(directory, "-DCMAKE_BUILD_TYPE=Debug", *BUILDS[name])

    return built


def build_tests(directory: Path, *options: str) -> Path:
    """Builds the C++ tests in the directory with these CMake options; the path of the binary."""
    ninja = tool("ninja")
    configure = [tool("cmake"), "-S", ROOT, "-B", directory, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DFASTLM_BUILD_TESTS=ON", *options]
    for command in (configure, [ninja, "-C", directory]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return directory / "csrc_test"


def run(binary: Path, *arguments: str) -> subprocess.CompletedProcess:
    # No leak check: it needs ptrace, which containers often forbid, and csrc/ allocates by
    # containers only.
    # ThreadSanitizer refuses threads in a forked child, which the tests start, unless told.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "die_after_fork=0"}
    environment = {**os.environ, **options}
    command = [str(binary), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        # ThreadSanitizer of older compilers, under kernels that randomise more address bits.
        command = ["setarch", "-R", *command]
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300
        )
    return result


@pytest.mark.parametrize("name", BUILDS)
def test_cpp_tests_pass(build, name):
    result = run(build(name))
    check_passed(result)
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr
    assert "OpenMP" not in result.stdout


def check_passed(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    summary = re.fullmatch(r"(\d+) passed, 0 failed", result.stdout.splitlines()[-1])
    assert summary, result.stdout
    assert int(summary[1]) > 5_000  # a driver that tests nothing would pass, too


def test_cpp_tests_pass_on_aarch64(tmp_path):
    # As built for users, -O3 and OpenMP; all but a fork, which this emulator cannot do.
    emulator, compiler = shutil.which(ARM_EMULATOR), shutil.which(ARM_COMPILER)
    if not emulator or not compiler:
        pytest.skip(f"needs {ARM_COMPILER} and {ARM_EMULATOR}")
    binary = build_tests(tmp_path, "-DCMAKE_BUILD_TYPE=Release", *BUILDS_FOR_ARM)
    with binary.open("rb") as file:
        assert file.read(20)[18:] == b"\xb7\x00"  # the machine in its ELF header: AArch64
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", binary]
    environment = {**os.environ, "FASTLM_NO_FORK": "1"}
    check_passed(subprocess.run(command, capture_output=True, text=True, env=environment))


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("address,undefined", "overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("address,undefined", "overread", "AddressSanitizer: heap-buffer-overflow"),
        ("address,undefined", "misaligned", "runtime error: load of misaligned address"),
        ("thread", "race", "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers_stop_a_deliberate_error(build, name, error, message):
    # One element past a buffer, a pointer at an odd address, two writers of one buffer: each in the
    # kernel. The sanitized runs above can fail.
    result = run(build(name), error)
    assert result.returncode != 0
    assert message in result.stderr
    assert "csrc/gather_batch" in result.stderr  # it happened in csrc/, not in the driver


@pytest.fixture
def restored_isa():
    yield
    extension().force_isa(None)


def test_force_isa(restored_isa):
    module = extension()
    features = module.cpu_features()
    best = "avx512" if features["avx512"] else "avx2" if features["avx2"] else "portable"
    best = "amx" if features["amx_bf16"] else "avx512_bf16" if features["fast_bf16"] else best
    assert module.isa() == best
    for name in ["portable", "avx2", "avx512", "avx512_bf16", "amx"]:
        if name == "portable" or features["amx_bf16" if name == "amx" else name]:
            module.force_isa(name)
            assert module.isa() == name
        else:
            before = module.isa()
            with pytest.raises(ValueError, match=f"no {name}, only {best}"):
                module.force_isa(name)
            assert module.isa() == before
    module.force_isa(None)
    assert module.isa() == best


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx512 "])
def test_force_unknown_isa(restored_isa, name):
    module = extension()
    module.force_isa("portable")
    with pytest.raises(
        ValueError, match=re.escape(f"'{name}': portable, avx2, avx512, avx512_bf16 or amx")
    ):
        module.force_isa(name)
    assert module.isa() == "portable"


def test_cpu_features_are_the_kernels():
    # The operating system's own list, which names only what it lets programs use.
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    if not flags:
        pytest.skip("needs Linux on x86-64")
    flags = set(flags[1].split())
    avx2 = {"avx2", "fma", "f16c", "bmi2"} <= flags
    avx512 = avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags
    assert extension().cpu_features() == {
        "avx2": avx2,
        "avx512": avx512,
        "avx512_bf16": avx512 and "avx512_bf16" in flags,
        "fast_bf16": avx512
        and "avx512_bf16" in flags
        and "GenuineIntel" not in cpuinfo.read_text(),
        "amx_bf16": {"amx_tile", "amx_bf16"} <= flags,
        "arm_bf16": False,
    }


def test_openmp_is_torchs():
    # A second OpenMP runtime would bring a second pool of threads.
    if not extension().THREADS_ARE_OPENMPS or not Path("/proc/self/maps").exists():
        pytest.skip("needs OpenMP and /proc")
    mapped = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if ".so" in line
    }
    runtimes = {path for path in mapped if re.search(r"lib(gomp|omp|iomp5)[-.]", path)}
    assert len(runtimes) == 1, runtimes
