#!/usr/bin/env bash
# All that only a GPU can tell, in parts that can be run one by one:
#   bash benchmarks/on_gpu.sh tests | memcheck | train | step | rest | study [BLOCK...]
# tests: native kernels and whatever else is skipped without a GPU. memcheck: the kernels' small shapes under NVIDIA's
# compute-sanitizer. train: 100 steps, plainly, in CUDA graphs and with kept micro-steps. step, rest: the benchmarks,
# most interesting first. study: blocks of configs/study.json (main).
# Further arguments: pytest's; settings such as train.steps=10 for train, which overrule those below.
# Where $OUT names a folder, results files, tables and pictures are copied there after each part, failed or not.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?which part: tests, memcheck, train, step, rest or study}
shift
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
failed=0 # exit code of the last command that failed

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
  tests) go "$python" -m pytest -q -p no:cacheprovider tests/ops tests/models "$@" ;;
  memcheck)
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 go compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x \
      tests/ops -k "not 31 and not 32768 and not large and not model_sizes and not capture and not graph" "$@"
    ;;
  train)
    train plain "$@"
    train graphs train.cuda_graphs=true "$@"
    train accumulated train.accumulation=4 train.grad_cache=true "$@"
    train zero3 deepspeed.zero_stage=3 "$@"
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
    echo "error: no part '$part': tests, memcheck, train, step, rest or study" >&2
    exit 2
    ;;
esac
exit "$failed"
