#!/usr/bin/env bash
# The first hour on a GPU: does everything work there, and how fast is it? Needs no network.
#
#   bash acceptance/gpu.sh --out runs/acceptance --all            every stage, what tells most first
#   bash acceptance/gpu.sh --out runs/acceptance --all --minutes 9    as much of it as 9 minutes hold; again, to go on
#   bash acceptance/gpu.sh --out runs/acceptance --stage step     one stage: 9 minutes at most; again, to go on
#   bash acceptance/gpu.sh --rehearse --all                       on a CPU, with small sizes
#
# BUNDLE=DIR: what acceptance/bundle.sh made (default: bundle/). PYTHON=...: a Python that has torch
# (default: .venv's, else the first of this machine's). --help lists the options; docs/gpu.md says what comes back.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export BUNDLE=${BUNDLE:-bundle} OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
die() { echo "error: $*" >&2; exit 2; }

# numba, Triton and matplotlib keep what they compile at home, and torch asks whose home it is: a container may have
# neither. The place is the same in each call.
if [ ! -w "${HOME:-/nowhere}" ]; then
    export HOME=${TMPDIR:-/tmp}/acceptance_home_$(id -u)
    mkdir -p "$HOME"
fi
export USER=${USER:-nobody}

python=${PYTHON:-}
names=(.venv/bin/python python3 python python3.13 python3.12 python3.11 /opt/conda/bin/python)
for name in "${names[@]}"; do
    [ -z "$python" ] || break
    "$name" -c 'import importlib.util as util, sys
sys.exit(sys.version_info < (3, 11) or util.find_spec("torch") is None)' 2>/dev/null && python=$name
done
[ -n "$python" ] || die "no Python 3.11 or newer here has torch (${names[*]}): name one with PYTHON=..."

wheels=("$BUNDLE"/wheels/*.whl)
if [ -e "${wheels[0]}" ] && ! "$python" -c 'import ffcv, fastargs' 2>/dev/null; then
    tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    compgen -G "$BUNDLE/wheels/ffcv-*-$tag-*.whl" >/dev/null ||
        die "$BUNDLE/wheels are not for $python, which is $tag: make the bundle with --python of that version, or name another with PYTHON=..."
    site=${BUNDLE%/}_site # beside the bundle, which may be carried from machine to machine
    mkdir -p "$site" 2>/dev/null && [ -w "$site" ] || site=$HOME/bundle_site
    for wheel in "${wheels[@]}"; do # pip may be missing, and would do no more
        "$python" -m zipfile -e "$wheel" "$site"
    done
    site=$(cd "$site" && pwd)
    if [ -d "$BUNDLE/x11" ] && ! "$python" -c 'import ctypes; ctypes.CDLL("libX11.so.6")' 2>/dev/null; then
        export LD_LIBRARY_PATH="$(cd "$BUNDLE/x11" && pwd)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m acceptance.packages
decoder="$python -m ffcv_imnet.native.build"
if ! $decoder --check 2>/dev/null && ! $decoder 2>/dev/null; then # the stage environment says if none works
    place=$("$python" -c 'from ffcv_imnet.native.build import library_path; print(library_path().parent)')
    mkdir -p "$place" && cp "$BUNDLE"/native/*.so* "$place/" 2>/dev/null || true
fi
exec "$python" -m acceptance "$@"
