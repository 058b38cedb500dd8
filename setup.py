"""The packages and the CMake source directory; everything else stands in pyproject.toml.

The packages are listed by hand: `find_packages()` would install `tests` and `bench` at the top
level, and a top-level import package `kernels` would overwrite Hugging Face's.
"""

from setuptools import setup

_PARTS = ("", ".data", ".integrations", ".ops", ".parallel", ".run", ".kernels")

setup(
    cmake_source_dir=".",
    packages=[f"fastlm{part}" for part in _PARTS],
    package_dir={"fastlm.kernels": "kernels"},
)
