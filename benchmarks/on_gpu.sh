#!/usr/bin/env bash
# All that only a GPU can tell, in parts that can be run one by one:
#   bash benchmarks/on_gpu.sh tests | memcheck | train | warm | step | rest | study [BLOCK...]
# tests: native kernels and whatever else is skipped without a GPU, several at a time where pytest-xdist is installed; the
# largest, which need most of the memory, one by one. memcheck: the kernels' small shapes under NVIDIA's
# compute-sanitizer. train: 100 steps, plainly, without CUDA graphs, with kept micro-steps and with ZeRO-3. warm: each
# benchmark once, several at a time, so that the following parts find their graphs compiled (minutes of 16 processors).
# step, rest: the benchmarks, most interesting first. study: blocks of configs/study.json (main).
# Further arguments: pytest's; settings such as train.steps=10 for train, which overrule those below.
# Where $OUT names a folder, results files, tables and pictures are copied there after each part, failed or not.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?which part: tests, memcheck, train, warm, step, rest or study}
shift
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
failed=0 # exit code of the last command that failed
large="31 or 32768 or large or model_sizes" # tests that need most of a GPU's memory
together=
! "$python" -c 'import xdist' 2>/dev/null || together="-n $(($(nproc) / 2)) --dist worksteal"

keep() {
  [ -n "${OUT:-}" ] || return 0
  mkdir -p "$OUT"
  "$python" -m benchmarks.report
  tar -czf "$OUT/$part.tar.gz" benchmarks/results docs
}
trap keep EXIT

go() {
  echo "+ $*"
  local start=$SECONDS code=0
  "$@" || code=$?
  [ "$code" -eq 0 ] || failed=$code
  echo "= $((SECONDS - start)) s, exit code $code"
}

train() { # name, settings
  local name=$1 settings=() setting
  shift
  for setting in train.steps=100 train.batch=256 train.precision=bf16 eval.every=0 "$@"; do settings+=(--set "$setting"); done
  go "$python" train.py --config configs/zero2.json --resume never --set "name=on_gpu_$name" "${settings[@]}"
}

case $part in
  tests)
    # shellcheck disable=SC2086
    go "$python" -m pytest -q -p no:cacheprovider $together tests/ops tests/models tests/training/test_train.py \
      tests/training/test_synchronisation.py tests/data/test_loader.py -k "not ($large)" "$@"
    go "$python" -m pytest -q -p no:cacheprovider tests/ops -k "$large" "$@"
    ;;
  memcheck)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 go compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x \
      tests/ops -k "not ($large or capture or graph)" "$@"
    ;;
  train)
    train plain "$@"
    train without_graphs train.cuda_graphs=false "$@"
    train accumulated train.accumulation=4 train.grad_cache=true "$@"
    train zero3 deepspeed.zero_stage=3 train.optimizer=adamw train.lr=4e-4 "$@"  # Muon takes no stage 3
    ;;
  warm)
    # shellcheck disable=SC2086
    go "$python" -m pytest -q -p no:cacheprovider $together benchmarks/ --benchmark-disable \
      -k "not curves and not largest and not growth and not profile" "$@"
    ;;
  step)
    for file in test_train_step.py::test_train_step test_curves.py test_profile.py test_inference.py test_loader.py; do
      go "$python" -m pytest -q "benchmarks/$file" --benchmark-only "$@"
    done
    ;;
  rest)
    for file in test_patch_mixing.py test_grouping_attention.py test_contrastive_loss.py test_mixed_segmentation_loss.py \
      test_decode_segments.py test_attention.py \
      test_train_step.py::test_largest_batch test_train_step.py::test_growth; do
      go "$python" -m pytest -q "benchmarks/$file" --benchmark-only "$@"
    done
    ;;
  study)
    [ $# -gt 0 ] || set -- main
    for block in "$@"; do go "$python" -m mixreorg_fast.cli study configs/study.json --block "$block" --jobs "${JOBS:-3}"; done
    ;;
  *)
    echo "error: no part '$part': tests, memcheck, train, warm, step, rest or study" >&2
    exit 2
    ;;
esac
exit "$failed"
