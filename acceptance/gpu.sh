#!/usr/bin/env bash
# The first hour on a GPU: does everything work there, and how fast is it? Needs no network.
#
#   bash acceptance/gpu.sh --out runs/acceptance --all            every stage, one after another
#   bash acceptance/gpu.sh --out runs/acceptance --stage step     one stage: 9 minutes at most; again, to go on
#   bash acceptance/gpu.sh --rehearse --all                       on a CPU, with small sizes
#
# BUNDLE=DIR: what acceptance/bundle.sh made (default: bundle/). PYTHON=...: a Python that has torch
# (default: .venv's, else python3). --help lists the options; docs/gpu.md says what comes back.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export BUNDLE=${BUNDLE:-bundle} OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

if ! "$python" -c 'import ffcv, fastargs' 2>/dev/null && compgen -G "$BUNDLE/wheels/*.whl" >/dev/null; then
    site=${BUNDLE%/}_site # beside the bundle, which may be carried from machine to machine
    "$python" -m pip install --quiet --no-index --no-deps --no-cache-dir --upgrade --target "$site" "$BUNDLE"/wheels/*.whl
    site=$(cd "$site" && pwd)
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m ffcv_imnet.native.build --check 2>/dev/null || "$python" -m ffcv_imnet.native.build 2>/dev/null ||
    cp "$BUNDLE"/native/*.so* ffcv_imnet/native/ 2>/dev/null || true # the stage environment says if none works
exec "$python" -m acceptance "$@"
