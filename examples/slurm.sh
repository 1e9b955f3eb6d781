#!/bin/bash
# A comparison on a Slurm cluster: teachers first, then an array of parts, then the table.
#
#     SBATCH_OPTIONS='--partition=gpu --time=8:00:00' bash examples/slurm.sh OUT PARTS RECIPE [KEY=VALUE]...
#
# OUT is a new folder on a disk that all machines see. Each part gets a GPU and CORES_PER_GPU (8) cores.
#
# Two minutes before its time limit a job is asked to save its state. It is then queued again, as it is if another
# process was lost or kept its folder locked (exit codes 143 and 75), and if its machine is lost, which Slurm sees to. It
# goes on from its last state. A mistake (2) ends all, and so does a part that was killed for its memory: correct it,
# and submit the same again.
set -euo pipefail

# In a job: --job PARTS COMMAND. The signal of Slurm reaches this shell, which passes it on.
if [[ ${1:-} == --job ]]; then
  parts=$2
  shift 2
  if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then set -- "$@" --unit "$SLURM_ARRAY_TASK_ID/$parts"; fi
  interrupted=""
  trap 'interrupted=yes; kill -TERM "${!-}" || true' TERM # before the process begins, so that no signal is lost
  "$@" &
  child=$!
  if [[ $interrupted ]]; then kill -TERM "$child" || true; fi
  interrupted=yes
  while [[ $interrupted ]]; do
    interrupted="" code=0
    wait "$child" || code=$?
  done
  if ((code == 75 || code == 143)) && ((${SLURM_RESTART_COUNT:-0} < 100)); then
    scontrol requeue "$SLURM_JOB_ID" && sleep "${REQUEUE_SECONDS:-60}" # which Slurm cuts short
  fi
  exit "$code"
fi

if (($# < 3)); then
  echo "usage: bash $0 OUT PARTS RECIPE [KEY=VALUE]..." >&2
  exit 2
fi
out=$1 parts=$2
shift 2
run=(deitkit compare "$@" --out "$out")
mkdir -p "$out/units"
read -ra more <<<"${SBATCH_OPTIONS:-}"
options=(--parsable --requeue --gpus=1 "--cpus-per-gpu=${CORES_PER_GPU:-8}" --signal=B:TERM@120 --open-mode=append
  --output="$out/units/%x-%a.log" "${more[@]}")
submit() { # NAME OPTION... -- COMMAND...
  local name=$1 own=()
  shift
  while [[ $1 != -- ]]; do own+=("$1") && shift; done
  sbatch "${options[@]}" "${own[@]}" --job-name="$name" "$0" --job "$parts" "${@:2}"
}

first=$(submit prepare -- "${run[@]}" --unit prepare)
array=$(submit unit --array="1-$parts" --dependency="afterok:$first" --kill-on-invalid-dep=yes -- "${run[@]}")
last=$(submit gather --dependency="afterok:$array" --kill-on-invalid-dep=yes -- "${run[@]}" --resume)
echo "jobs $first, $array, $last: the table will be in $out/units/gather-*.log and $out/report.html"
