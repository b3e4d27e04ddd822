#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under nine minutes: build, test, time. Results go to $OUT, or gpu-out.
#
# Uses the python3 it finds, with torch and triton, and installs nothing. Peers that are not there are left out; wheels in
# a folder named wheels are unpacked for them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-out}
mkdir -p "$out"
python=${PYTHON:-python3}

"$python" setup.py -q build --build-lib build/gpu 2> "$out/build.log" || { tail "$out/build.log"; exit 1; }
for wheel in wheels/*.whl; do
  [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" build/gpu
done
export PYTHONPATH="$PWD/build/gpu:$PWD" PYTHONSAFEPATH=1
ls build/gpu/loft_fast/_cuda.so

if [ "${1:-}" = --rehearse ]; then  # without a GPU: every case once, tiny and interpreted
  export TRITON_INTERPRET=1 LOFT_FAST_BACKEND=triton
  tests="not run"
else
  timeout 200 "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_kernels.py \
    tests/test_symmetric_matmul.py tests/test_topk_projector.py tests/test_moments_update_project.py \
    tests/test_project.py tests/test_moments_update.py -k "not spills and not long_sums and not native and not torch.float64" \
    > "$out/tests.log" 2>&1 && tests=passed || tests=failed
  tail -15 "$out/tests.log"
fi

"$python" -m bench.gpu --out "$out" --tests "$tests" --budget 240 "$@"
