#!/usr/bin/env bash
# What only an NVIDIA GPU can tell, each part in one command of at most nine minutes:
#
#     bench/gpu.sh PART OUT_DIR        PART: setup correctness kernels trainer presets
#
# OUT_DIR/gpu-NAME-DATE-PART.json has what was found, from the first step on; move it to
# bench/results, and `make report` shows it. What did not end in time is said there. bench/gpu_steps.py has
# the steps of each part.
#
# The machine needs torch, triton, numpy, pytest, pytest-benchmark, pytest-xdist, cmake, ninja,
# pybind11, a C++ compiler and, for the sanitizer, CUDA's tools; no package index and no network.
# What it lacks comes from .gpu/wheels, .gpu/corpus and .gpu/nanoGPT, which git ignores: take them
# along; `make gpu-wheels NANOGPT=DIR` fetches them where there is an index. (QuACK is measured where
# it is installed.) A _C that was built for that interpreter before, fastlm/_C.*.so, saves 50 s: where
# one is built, OUT_DIR has a copy of it to take along the next time.
#
#     PYTHON=python3.12       the interpreter that has torch
#     COMMIT=abc1234          what is measured, where there is no .git
#     ROWS='guard|block'      of the part's steps those that match, when one call was too short
#     MINUTES=9               of a part
#     DATA=DIR                a prepared directory, in place of .gpu/corpus
#     DEVICE=cpu              a rehearsal: every line, tiny shapes, the interpreter; no figures
#
# Where a machine is lent for minutes, the goals' figures first, in one command (`;`, not `&&`: a part
# that was cut off exits with 1). On an H100 with 16 cores nanoGPT's row takes 35 to 60 s, fastlm's
# 65 s, half of it compilation; "in turns" 35 s and 15 to 35 s for each switch, the ones that matter
# most first, until the minutes end; a case of the losses 15 s; the Triton cases and tests/gpu half a
# minute each.
#     MINUTES=5.5 ROWS="preset's step$|in turns" bench/gpu.sh trainer OUT
#     MINUTES=2 ROWS="bf16 and not|default|124" bench/gpu.sh kernels OUT
#     MINUTES=3 bench/gpu.sh correctness OUT
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
part=${1:-}
out=${2:-}
case $part in
    setup | correctness | kernels | trainer | presets) ;;
    *) echo "usage: bench/gpu.sh setup|correctness|kernels|trainer|presets OUT_DIR" >&2; exit 2 ;;
esac
if [ -z "$out" ]; then
    echo "usage: bench/gpu.sh $part OUT_DIR: the second argument, a folder for the results, is missing" >&2
    exit 2
fi
mkdir -p "$out" .gpu
started=$SECONDS

# Wheels that were taken along, unpacked where no other program sees them.
export PYTHONPATH=$root:$root/.gpu/site${PYTHONPATH:+:$PYTHONPATH}
if compgen -G '.gpu/wheels/*.whl' > /dev/null && [ .gpu/wheels -nt .gpu/site ]; then
    rm -rf .gpu/site
    "$python" -m pip install -q --no-index --no-deps --no-compile --target .gpu/site .gpu/wheels/*.whl
    touch .gpu/site
fi
# An installation has kernels/ inside of fastlm; here a link stands for it.
if ! "$python" -c 'import fastlm.kernels' 2> /dev/null; then
    ln -sfn ../kernels fastlm/kernels
fi
# fastlm._C, unless it is there and of these sources.
if ! "$python" -c 'from fastlm.extension import extension; extension()' 2> .gpu/extension.log; then
    if command -v ninja > /dev/null; then
        export CMAKE_GENERATOR=Ninja
    fi
    cmake -S . -B .gpu/build -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > .gpu/build.log
    cmake --build .gpu/build --parallel >> .gpu/build.log
    cmake --install .gpu/build --prefix . >> .gpu/build.log
    cp fastlm/_C.*.so "$out"
    "$python" -c 'from fastlm.extension import extension; extension()'
fi
echo "[gpu] setup: $((SECONDS - started)) s"

if [ -d .gpu/nanoGPT ]; then
    export NANOGPT=${NANOGPT:-$root/.gpu/nanoGPT}
fi
# What Inductor and Triton compile is kept beside the sources: a second call finds it.
export TORCHINDUCTOR_CACHE_DIR=$root/.gpu/inductor TRITON_CACHE_DIR=$root/.gpu/triton
export PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin
exec "$python" bench/gpu_steps.py "$part" "$out" --started "$((SECONDS - started))"
