#!/usr/bin/env bash
# The tests, on a CPU, from nothing: makes .venv when it is missing.
#   bash tests/run.sh [pytest arguments]                              e.g. tests/reward -x, or -m slow
#   bash tests/run.sh --megatron-core VERSION [pytest arguments]      the policy tests, against that megatron-core
# TEST_PYTHON=python uses the environment of that python instead of .venv (on a GPU machine: -m gpu).
# The second form keeps the wheel unpacked in .cache/ and puts it before .venv's own megatron-core. Newer versions are published
# for Python 3.12 only; their Python code runs on 3.11, and the policy needs nothing of their compiled part.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD python=${TEST_PYTHON:-$PWD/.venv/bin/python}
policy_tests=(tests/test_megatron_version.py tests/policy tests/invariance tests/parity tests/test_checkpoint.py)

version="" arguments=() paths_given=false
while [ $# -gt 0 ]; do
  case $1 in
    --megatron-core) version=${2:-}; shift ;;
    --megatron-core=*) version=${1#*=} ;;
    *)
      arguments+=("$1")
      case $1 in -*) ;; *) [ -e "${1%%::*}" ] && paths_given=true ;; esac
      shift; continue ;;
  esac
  [[ $version =~ ^[0-9]+(\.[0-9]+)+[a-z0-9.]*$ ]] || { echo "error: --megatron-core needs a version such as 0.19.2, got '$version'" >&2; exit 2; }
  [ $# -gt 0 ] && shift
done

[ -n "${TEST_PYTHON:-}" ] || bash tools/setup_cpu.sh
export OMP_NUM_THREADS=1

if [ -n "$version" ]; then
  folder=$root/.cache/megatron-core-$version
  if [ ! -d "$folder" ]; then
    mkdir -p "$root/.cache"
    work=$(mktemp -d "$root/.cache/.megatron-core.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "[tests] fetching megatron-core $version" >&2
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps --python-version 3.12 --only-binary=:all: \
      --dest "$work" "megatron-core==$version" 2> "$work/pip.log" || {
        echo "error: pip could not fetch a wheel of megatron-core $version; it said: $(tail -n 1 "$work/pip.log")" >&2
        exit 1
      }
    "$python" -m zipfile -e "$work"/megatron_core-*.whl "$work/unpacked"
    mv -T "$work/unpacked" "$folder" 2>/dev/null || [ -d "$folder" ]  # another run of this script may have been faster
    rm -rf "$work"
    trap - EXIT
  fi
  export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" MEGATRON_CORE_UNDER_TEST=$version
  found=$("$python" -W ignore -c 'import megatron.core; print(megatron.core.__version__)')
  # 0.18 and later add "+<commit>" of whatever git checkout they are imported in
  [ "${found%%+*}" = "$version" ] || { echo "error: asked for megatron-core $version, Python imports $found" >&2; exit 1; }
  echo "[tests] megatron-core $found from ${folder#"$root"/}" >&2
  if ! $paths_given; then
    for path in "${policy_tests[@]}"; do
      [ -f "$path" ] || [ -n "$(find "$path" -name 'test_*.py' 2>/dev/null)" ] && arguments+=("$path")
    done
  fi
fi
exec "$python" -m pytest "${arguments[@]}"
