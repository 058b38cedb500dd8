"""What people install: the source distribution, the wheel built from it, both from a clean copy of
the repository; the errors of a broken installation; and the Makefile's check of prerequisites.

Needs no network: nothing is built in isolation, and no dependency is installed.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastlm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
VERSION = fastlm.__version__
USE_EXTENSION = "import numpy; fastlm.get_batch(numpy.arange(9, dtype='u2'), 2, 4, 'cpu')"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    unset = ("PYTHONPATH", "PYTHONHOME", "CXX", "MAKEFLAGS", "MAKELEVEL")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def succeed(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository as a fresh clone has it: nothing that git ignores."""
    copy = tmp_path_factory.mktemp("checkout") / "fastlm"
    if not (ROOT / ".git").exists():
        ignore = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "runs")
        return Path(shutil.copytree(ROOT, copy, ignore=ignore))
    listing = succeed("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listing.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout) -> Path:
    build = "import scikit_build_core.setuptools.build_meta as b; print(b.build_sdist('dist'))"
    name = succeed(sys.executable, "-c", build, cwd=checkout).splitlines()[-1]
    return checkout / "dist" / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, built out of the source distribution.

    The compiler is told not to optimise, which takes a third of the time: no test here looks at the
    extension's speed, and all others run an optimised one.
    """
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-index")
    compiler = out / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    succeed(*pip_wheel, "--no-deps", "--wheel-dir", out, sdist, cwd=out, CXX=str(compiler))
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def third_party(tmp_path_factory) -> Path:
    """This environment's packages without fastlm, and without its .pth files at work."""
    folder = tmp_path_factory.mktemp("third_party")
    sites = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    sites.add(Path(torch.__file__).parents[1])  # elsewhere in an environment that shares packages
    for site in sites:
        for entry in site.iterdir():
            if "fastlm" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def installed(wheel, third_party, tmp_path_factory) -> tuple[Path, Path]:
    """(interpreter of a new virtual environment with the wheel installed, its site-packages)."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    site = Path(
        succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
        .strip()
    )  # fmt: skip
    pip_install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index")
    succeed(*pip_install, "--target", site, wheel, cwd=home)
    (site / "third_party.pth").write_text(f"{third_party}\n")
    return python, site


@pytest.fixture(scope="module")
def extension_errors(installed, third_party, checkout, tmp_path_factory) -> dict[str, str]:
    """What the first use of the extension says in damaged copies of the installed package.

    Damage -> the message of its ExtensionError, or "works". The import must have worked.
    """
    home = tmp_path_factory.mktemp("damaged")

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(installed[1] / "fastlm", home / name / "fastlm"))

    for binary in damaged("missing").glob("_C.*.so"):
        binary.unlink()
    init = damaged("another version") / "__init__.py"
    init.write_text(init.read_text().replace(f'"{VERSION}"', '"99.0"'))
    for name in ("same sources", "edited source", "new source"):
        damaged(name)
        shutil.copytree(checkout / "csrc", home / name / "csrc")
    with open(home / "edited source" / "csrc" / "isa.h", "a") as file:
        file.write("// changed\n")
    (home / "new source" / "csrc" / "new.h").touch()

    names = sorted(path.name for path in home.iterdir())
    # One process that has imported torch, forked for each of them.
    code = (
        "import os, sys, numpy, torch\n"
        "for home in sys.argv[1:]:\n"
        "  if os.fork():\n"
        "    assert os.wait()[1] == 0\n"
        "    continue\n"
        "  sys.path.insert(0, home)\n"
        "  import fastlm\n"
        "  assert fastlm.__file__ == os.path.join(home, 'fastlm', '__init__.py')\n"
        "  assert fastlm.cosine_lr_schedule(0, 1.0, 0.1, 5, 10) == 0\n"
        f"  try:\n    {USE_EXTENSION}\n"
        "  except fastlm.ExtensionError as error:\n    print(error, flush=True)\n"
        "  else:\n    print('works', flush=True)\n"
        "  os._exit(0)\n"
    )
    # -S: without this environment's site-packages, where another fastlm may be installed.
    command = (sys.executable, "-S", "-c", code, *(home / name for name in names))
    lines = succeed(*command, cwd=home, PYTHONPATH=str(third_party)).splitlines()
    return dict(zip(names, lines, strict=True))


def test_every_minimum_is_tested():
    """The build's minimum versions are the test extra's, and `make test-oldest` installs them all.

    A requirement that its `sed` does not read would be installed in the newest version.
    """
    pyproject = (ROOT / "pyproject.toml").read_text()
    build = re.search(r"^requires = \[(.*)\]$", pyproject, re.MULTILINE)[1]
    extra = re.search(r"^test = \[\n(.*?)^\]$", pyproject, re.MULTILINE | re.DOTALL)[1]
    assert set(re.findall(r'"[^"]+"', build)) <= set(re.findall(r'"[^"]+"', extra))

    script = re.search(r"^\tsed -n '(.*)'", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    constraints = succeed("sed", "-n", script.replace("$$", "$"), "pyproject.toml", cwd=ROOT)
    minimums = re.findall(r'"([a-z0-9-]+)(?:\[[a-z]+\])?>=([0-9.]+)', pyproject)
    assert set(constraints.splitlines()) == {f"{name}=={version}" for name, version in minimums}


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for path in ("LICENSE", "README.md", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        assert path in names
    for source in (ROOT / "csrc").iterdir():
        assert f"csrc/{source.name}" in names


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        info = f"fastlm-{VERSION}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"fastlm", info}
    assert f"{info}/licenses/LICENSE" in names
    assert f"\nVersion: {VERSION}\n" in metadata
    oldest = re.search(r'"(torch>=[\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"\nRequires-Dist: {oldest}\n" in metadata

    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastlm").rglob("*.py")}
    modules |= {f"fastlm/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    binaries = {name for name in names if name.endswith((".so", ".pyd"))}
    assert len(binaries) == 1 and binaries.pop().startswith("fastlm/_C.")
    rest = {name for name in names if name.startswith("fastlm/") and not name.endswith(".so")}
    assert rest == modules | {"fastlm/py.typed", "fastlm/_C.pyi"}


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(tool) is None, reason=f"{tool} is not installed"
    )


@needs("twine")
def test_the_package_index_takes_them(sdist, wheel):
    told = succeed(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=ROOT)
    assert told.count("PASSED") == 2


@needs("cibuildwheel")
@pytest.mark.parametrize(
    "system, machine, tag",
    [
        ("linux", "x86_64", "manylinux_x86_64"),
        ("linux", "aarch64", "manylinux_aarch64"),
        ("macos", "arm64", "macosx_arm64"),
    ],
)
def test_the_wheels_of_a_release(system, machine, tag):
    command = (sys.executable, "-m", "cibuildwheel", "--print-build-identifiers")
    told = succeed(*command, "--platform", system, "--archs", machine, cwd=ROOT)
    assert told.split() == [f"cp31{minor}-{tag}" for minor in range(5)]


def test_what_a_release_tries_in_each_wheel(installed):
    """cibuildwheel's test-command, in the wheel that was built here."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    command, path = settings["test-command"], f"{installed[0].parent}:{os.environ['PATH']}"
    succeed("sh", "-c", command, cwd=Path("/"), PATH=path)
    assert "log(8)" in command  # it can fail
    broken = run("sh", "-c", command.replace("log(8)", "log(9)"), cwd=Path("/"), PATH=path)
    assert broken.returncode == 1 and "AssertionError: tensor(2.07" in broken.stderr


def test_installed_wheel_works_from_anywhere(installed, checkout):
    python, site = installed
    code = (
        "import fastlm, fastlm.kernels, importlib.metadata, sys\n"
        f"{USE_EXTENSION}\n"
        "from fastlm import _C\n"
        f"assert importlib.metadata.version('fastlm') == fastlm.__version__ == {VERSION!r}\n"
        "assert 'pytest' not in sys.modules\n"
        "print(fastlm.__file__, fastlm.kernels.__file__, _C.__file__, sep='\\n')\n"
    )
    outside = succeed(python, "-c", code, cwd=Path("/")).splitlines()
    assert outside[:2] == [
        str(site / "fastlm" / "__init__.py"),
        str(site / "fastlm" / "kernels" / "__init__.py"),
    ]
    # In the repository's root Python finds the sources there, and what was built, in the wheel.
    inside = succeed(python, "-c", code, cwd=checkout).splitlines()
    assert inside[0] == str(checkout / "fastlm" / "__init__.py")
    assert inside[1:] == outside[1:]


def test_the_command_starts_in_the_installed_wheel(installed):
    assert "--batch-size" in succeed(installed[0], "-m", "fastlm.train", "--help", cwd=Path("/"))


def test_missing_extension_is_an_error_at_first_use(extension_errors):
    message = extension_errors["missing"]
    assert "fastlm._C cannot be loaded" in message
    assert "pip install -e ." in message


def test_extension_of_another_version_is_an_error(extension_errors):
    message = extension_errors["another version"]
    assert VERSION in message and "99.0" in message
    assert "pip install -e ." in message


def test_extension_of_other_sources_is_an_error(extension_errors):
    assert extension_errors["same sources"] == "works"
    for change in ("edited source", "new source"):
        message = extension_errors[change]
        assert "older than csrc/" in message and "pip install -e ." in message


# What `make check` calls missing, by a stand-in for python3 that fails where it says.
PREREQUISITES = {
    "python": (None, "not found: install Python 3.10 or later"),
    "version": ("version_info", "is older than 3.10"),
    "venv": ("import venv", "has no venv: install it"),
    "headers": ("Python.h", "headers of"),
    "compiler": ("nothing", "no C++ compiler found: install one"),
}


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("missing", [None, *PREREQUISITES])
def test_make_check_names_what_is_missing(checkout, tmp_path, missing):
    python, path, message = sys.executable, os.environ["PATH"], ""
    if missing:
        fails_at, message = PREREQUISITES[missing]
        python = tmp_path / "python3"
        if fails_at:
            python.write_text(f'#!/bin/sh\ncase "$2" in *"{fails_at}"*) exit 1;; esac\n')
            python.chmod(0o755)
        if missing == "compiler":
            path = str(tmp_path)
    result = run(shutil.which("make"), "check", f"PYTHON={python}", cwd=checkout, PATH=path)
    if not missing:
        assert (result.returncode, result.stdout) == (0, "")
        return
    assert result.returncode != 0
    assert message in result.stdout
    assert result.stdout.startswith("error: ") and len(result.stdout.splitlines()) == 1
    assert not [line for line in result.stderr.splitlines() if not line.startswith("make: ")]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("target", ["train", "test", "bench", "lint"])
def test_every_make_target_checks_first(checkout, target):
    result = run(shutil.which("make"), target, "PYTHON=no-such-python", cwd=checkout)
    assert result.returncode != 0
    assert result.stdout.splitlines() == [
        "error: no-such-python not found: install Python 3.10 or later "
        "(Debian, Ubuntu: apt-get install python3)"
    ]
    assert not (checkout / ".venv").exists()
