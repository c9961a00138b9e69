#!/bin/sh
# The Python of the virtual environment that this file lies in, for `rollout.python` where the ranks use
# another torch. NVIDIA's containers name their torch's folder in LD_LIBRARY_PATH; engines must not load that.
LD_LIBRARY_PATH=$(printf %s "${LD_LIBRARY_PATH:-}" | tr : '\n' | grep -v /dist-packages/ | paste -s -d :)
export LD_LIBRARY_PATH
exec "$(dirname "$0")/bin/python" "$@"
