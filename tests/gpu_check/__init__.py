"""One check of the package on a GPU: see tests/gpu_check.sh."""
