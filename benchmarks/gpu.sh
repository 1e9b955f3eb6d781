#!/usr/bin/env bash
# What a GPU has to show, in pieces of under ten minutes; each writes its figures into a folder.
#
#   benchmarks/gpu.sh check   OUT   the tests that need a GPU
#   benchmarks/gpu.sh speed   OUT   training, augmentation and cohorts: images/s and shares of the limit
#   benchmarks/gpu.sh infer   OUT   the paper's models, each compiled first
#   benchmarks/gpu.sh peers   OUT   beside timm and plain loops
#   benchmarks/gpu.sh cifar10 OUT   the recipe cifar10, timed from nothing to its report (SEEDS=N: with so many seeds; needs
#                                   CIFAR-10 in $DEITKIT_DATA; goes on where it was stopped)
#   benchmarks/gpu.sh all     OUT
#
# SMALL=1 runs the same commands at sizes that a CPU does in a minute, to try the script; its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
piece=${1:?name a piece: check, speed, infer, peers, cifar10 or all}
out=${2:?name a folder for the figures}
mkdir -p "$out"
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"  # with or without an installation
deitkit() { "$PYTHON" -m deitkit "$@"; }
# A file of figures is there once they are.
figures() { deitkit "${@:2}" > "$out/$1.part" && mv "$out/$1.part" "$out/$1"; }

if [ -n "${SMALL:-}" ]; then
  few=(--repeats 1 --steps 1) tiny=16 large=2 px=64 table=1 many=16
  turns=(--rounds 1 --steps 1 --warm-up 1 --batch-size 8 --patch-px 8 --workers 0)
  short=(data=digits model=micro model.patch_px=2 model.drop_path=0 train.epochs=1 train.batch_size=32 train.warmup_epochs=0
    teacher.name=cifar/resnet20 teacher.train.epochs=1 teacher.train.batch_size=32 teacher.train.warmup_epochs=0 teacher.min_top1=null
    teacher.allow_weak=true)
else
  few=(--repeats 5 --steps 20) tiny=1024 large=256 px=224 table=64 many=256
  turns=(--rounds 5 --steps 20 --warm-up 10 --batch-size 1024 --patch-px 4)
  short=()
fi

check() {
  # The shape checks of the test suite do not go through torch.compile.
  "$PYTHON" -m pytest tests/training/test_gpu.py tests/data/test_augment.py -q -o addopts= -W default -p no:cacheprovider
}

speed() {
  local views=(augment.randaugment=2,9 augment.erase=0.25) paper='methods=[none,soft,hard,token-hard]'
  figures train-deit_tiny-32px.json bench train --synthetic "${few[@]}" --json data.image_px=32 model.patch_px=4 \
    "train.batch_size=$tiny" method=token-hard teacher=timm/resnet18 "${views[@]}"
  for size in deit_small deit_base; do
    figures "train-$size-${px}px.json" bench train --synthetic "${few[@]}" --json "data.image_px=$px" "model=$size" \
      "train.batch_size=$large" method=token-hard teacher=timm/regnety_160 "${views[@]}"
  done
  for teacher in small/resnet18 small/wide_resnet101_2; do
    figures "cohort-${teacher#small/}.json" bench cohort --synthetic "${few[@]}" --json data.image_px=32 model.patch_px=4 \
      "train.batch_size=$many" "$paper" "teacher=$teacher" "${views[@]}"
  done
  figures data-32px.json bench data --synthetic "${few[@]}" --json data.image_px=32 "train.batch_size=$tiny" "${views[@]}"
  "$PYTHON" benchmarks/show.py "$out"
}

infer() {
  figures infer-paper.json bench infer --table paper "${few[@]}" --json "train.batch_size=$table"
  "$PYTHON" benchmarks/show.py "$out"
}

peers() { "$PYTHON" benchmarks/peers.py --synthetic "${turns[@]}" --json "$out/peers.json"; }

cifar10() {
  local started=$SECONDS resume=()
  if [ -e "$out/cifar10" ]; then resume=(--resume); fi
  deitkit compare cifar10 "${short[@]}" --seeds "${SEEDS:-1}" --out "$out/cifar10" "${resume[@]}"
  echo "cifar10: from nothing to the report in $((SECONDS - started)) s" | tee "$out/cifar10-seconds.txt"
}

case $piece in
  check | speed | infer | peers | cifar10) "$piece" ;;
  all)  # one by one: in a list with && a command that fails inside them would not end the script
    check
    speed
    infer
    peers
    cifar10
    ;;
  *) echo "'$piece' is no piece: check, speed, infer, peers, cifar10 or all" >&2 && exit 2 ;;
esac
