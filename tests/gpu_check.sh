#!/usr/bin/env bash
# Checks this package on a GPU, with one command:  tests/gpu_check.sh [--dry] [--only NAME,NAME] OUT_DIR
#
# Made for one GPU and 16 cores, and ends after 8 minutes: the step that runs then is killed, and those that are left are
# skipped. Each step has a limit of its own too, and prints one line: name, result, seconds, and its last line of output.
# A step that fails does not stop the others; the most important ones come first. OUT_DIR gets log.txt (all output) and
# results.json (an entry for each step, with figures), both after each step. Exit status: 0 if all steps passed, else 1,
# with the names of the others; 2 for wrong arguments.
#
# --dry runs the same steps on the CPU with a tiny network, two at a time, in less than a minute.
# --only runs some of the steps. GPU_CHECK_SECONDS limits the whole (default: 480; with --dry 1200). SIGTERM ends it early.
#
# Needs torch, torchvision, timm, safetensors, tqdm, pyyaml, scikit-learn, pytest and hypothesis, and no network. PYTHON
# names the interpreter (default: python3). What is missing in it can be put beside this checkout's files, on any
# machine; the folder is used if it is there:
#   pip install --target .gpu-site --no-deps omegaconf antlr4-python3-runtime==4.9.3
set -u
export GPU_CHECK_FROM=$PWD
cd "$(dirname "$0")/.." || exit 2
site=$PWD
[ -d .gpu-site ] && site=$PWD:$PWD/.gpu-site
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
# The command itself ends in time; `timeout` is for an import that hangs.
exec timeout -k 10 $((${GPU_CHECK_SECONDS:-1200} + 30)) "${PYTHON:-$(command -v python3 || command -v python)}" -m tests.gpu_check "$@"
