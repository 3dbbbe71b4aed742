# Signals to this shell go to the run. A job whose run was stopped, or was killed for the first time since its last
# checkpoint, is requeued. slurm/*.sbatch have the same lines, because sbatch copies only the script itself.
trap 'stopped=yes; if [ -n "${run:-}" ]; then pass_on; fi' TERM USR2
export DISTIL_TL_OUTCOME=$PWD/slurm-$SLURM_JOB_ID.outcome # where the run says how it ends

# Starts a command with both signals blocked, until training has handlers for them. Before coreutils 8.31, with Python.
BLOCK_SIGNALS=(sh -c 'block="--block-signal=TERM --block-signal=USR2"
env $block true 2> /dev/null && exec env $block "$@"
code="import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})"
code="$code; os.execvp(sys.argv[1], sys.argv[1:])"
for python in "$1" python3; do "$python" -S -c "" 2> /dev/null && exec "$python" -S -c "$code" "$@"; done
exec "$@"' sh)

pass_on() { # as USR2, because at TERM srun would kill the run; again and again, because srun may not be ready yet
  while kill -0 $run 2> /dev/null; do
    if [ "$(cat /proc/$run/comm 2> /dev/null)" = srun ]; then kill -USR2 $run; fi
    sleep 2
  done &
}

watch_run() { # srun ...
  local status=3 outcome
  # That an earlier start was preempted must not requeue this one. That it was killed counts.
  if [ "$(tail -n 1 "$DISTIL_TL_OUTCOME" 2> /dev/null)" = preempted ]; then echo started >> "$DISTIL_TL_OUTCOME"; fi
  if [ -n "${stopped:-}" ]; then
    echo preempted >> "$DISTIL_TL_OUTCOME"
  else
    "${BLOCK_SIGNALS[@]}" "$@" &
    run=$!
    if [ -n "${stopped:-}" ]; then pass_on; fi
    while wait $run || true; kill -0 $run 2> /dev/null; do :; done # a signal ends `wait`
    status=0
    wait $run || status=$?
  fi
  outcome=$(tail -n 1 "$DISTIL_TL_OUTCOME" 2> /dev/null || true)
  if [ $status = 0 ] || [ "$outcome" = failed ] || [ "$outcome" = refused ]; then
    rm -f "$DISTIL_TL_OUTCOME"
  elif [ "$outcome" = preempted ]; then
    requeue_job
  elif [ $status -ge 128 ] || [ $status = 3 ]; then
    echo "launch: a process of the run was killed (exit status $status)" >&2
    if [ "$outcome" = killed ]; then
      echo "launch: that is the second time without a checkpoint in between, so the job is not requeued" >&2
      rm -f "$DISTIL_TL_OUTCOME"
    else
      echo killed >> "$DISTIL_TL_OUTCOME"
      requeue_job
    fi
  fi
  return $status
}

requeue_job() { # unless it is no longer running, as it was cancelled or is requeued already
  local job=$SLURM_JOB_ID state pause
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  for pause in 1 2 4 8 10 10 10 10 10 10 10 0; do # while Slurm does not answer
    if state=$(squeue --noheader --states=all --jobs="$job" --Format=State,RestartCnt); then
      if [ "$(echo $state)" != "RUNNING ${SLURM_RESTART_COUNT:-0}" ]; then return 0; fi
      if scontrol requeue "$job"; then echo "launch: job $job is requeued" >&2; return 0; fi
    fi
    sleep $pause
  done
}
