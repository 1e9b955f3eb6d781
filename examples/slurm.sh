#!/bin/bash
# A comparison on a Slurm cluster: teachers first, then an array of parts, then the table.
#
#     bash examples/slurm.sh OUT PARTS RECIPE [KEY=VALUE]...
#
# OUT is a new folder on a disk that all machines see. Each part gets a GPU; options for the cluster (partition, account,
# time) come from SBATCH_* variables. A part that is lost or killed is queued again and goes on from its last state.
set -euo pipefail
if (($# < 3)); then
  echo "usage: bash $0 OUT PARTS RECIPE [KEY=VALUE]..." >&2
  exit 2
fi
out=$1 parts=$2
shift 2
run=(deitkit compare "$@" --out "$out")
mkdir -p "$out/units"
options=(--parsable --requeue --gpus=1 --open-mode=append --output="$out/units/%x-%a.log")
submit() { sbatch "${options[@]}" "${@:2}" --job-name="$1" --wrap="$command"; }

command=$(printf '%q ' "${run[@]}" --unit prepare)
first=$(submit prepare)
command="$(printf '%q ' "${run[@]}" --unit)\$SLURM_ARRAY_TASK_ID/$parts"
array=$(submit unit --array="1-$parts" --dependency="afterok:$first" --kill-on-invalid-dep=yes)
command=$(printf '%q ' "${run[@]}" --resume)
last=$(submit gather --dependency="afterok:$array" --kill-on-invalid-dep=yes)
echo "jobs $first, $array, $last: the table will be in $out/units/gather-*.log and $out/report.html"
