#!/usr/bin/env bash
# What `make setup` runs: finds Python, installs what is missing, ends in a `.venv` that works.
#
#   bash setup.sh                    the newest usable python3
#   PYTHON=/path/to/python bash setup.sh
#
# Safe to run at any time: it returns at once when nothing is missing, and goes on where an
# interrupted run stopped. `.venv/.complete` holds the checksum of the lock it was made from and is
# written last, so a half-made environment is never taken for a whole one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv=.venv
lock=requirements.lock
stamp=$venv/.complete
log=$(mktemp)
disk_needed_gb=10 # 6 in .venv, the rest while pip unpacks its downloads
heartbeat=
trap '[ -z "$heartbeat" ] || kill "$heartbeat" 2>/dev/null || true; rm -f "$log"' EXIT

say() { echo "set-up: $*"; }
die() { echo "set-up: error: $*" >&2; exit 1; }

# quietly WHAT COMMAND...: the command's output is shown only if it fails; a line now and then says
# that it is alive. The command itself runs in the foreground, so that Ctrl-C reaches it.
quietly() {
    local what=$1 started=$SECONDS status=0
    shift
    say "$what ..."
    (while sleep 15 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        echo "set-up:   $((SECONDS - started)) s, now: $(tail -n 1 "$log" | tr -s ' \t\r' ' ' | cut -c 1-80)"
    done) &
    heartbeat=$!
    "$@" >"$log" 2>&1 </dev/null || status=$?
    kill "$heartbeat" 2>/dev/null || true
    wait "$heartbeat" 2>/dev/null || true
    heartbeat=
    if [ $status -ne 0 ]; then
        cat "$log" >&2
        [ $status -lt 128 ] || exit $status # a signal: the user stopped it
        die "$what failed (status $status); its full output stands above"
    fi
    say "$what: done in $((SECONDS - started)) s"
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; } # the lock
minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# ---- nothing missing? ---------------------------------------------------------------------------

# Every pin installed at its version, and ffcv's library loads (it breaks when OpenCV's packages are
# removed or upgraded). About half a second; importing torch as well would take several.
whole() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(sha256sum <"$lock")" ] && usable_venv &&
        "$venv/bin/python" - "$lock" >/dev/null 2>&1 <<'PYTHON'
import ctypes, importlib.metadata as metadata, pathlib, sys
pins = [line.split("==") for line in open(sys.argv[1]) if "==" in line and line[0] != "#"]
assert all(metadata.version(name) == version.strip() for name, version in pins)
library = next(pathlib.Path(metadata.distribution("ffcv").locate_file("ffcv")).glob("_libffcv*.so"))
ctypes.CDLL(str(library))
PYTHON
}

# FFCV could do without the crop decoder, so a failure is said, tried again at the next call, and neither ends
# the set-up nor makes it install anything anew. In a Docker image the sources come later than this.
crop_decoder() {
    [ -d ffcv_imnet ] || return 0
    "$venv/bin/python" -m ffcv_imnet.native.build --check 2>/dev/null ||
        "$venv/bin/python" -m ffcv_imnet.native.build ||
        say "the crop decoder was not compiled: loading will be slower"
}

# Scripts from anywhere may `import ffcv_imnet` then, as those of examples/ do.
importable() {
    local packages
    packages=$(compgen -G "$venv/lib/python*/site-packages")
    [ "$(cat "$packages/ffcv_imnet.pth" 2>/dev/null)" = "$(pwd -P)" ] || pwd -P >"$packages/ffcv_imnet.pth"
}

# Its Python runs, is new enough, has pip, was made at this path (scripts such as torchrun carry the
# path) and is the version that PYTHON asks for.
usable_venv() {
    fits "$venv/bin/python" || return 1
    grep -qsF "$(pwd -P)/$venv" "$venv/bin/activate" || return 1
    compgen -G "$venv/lib/python*/site-packages/pip" >/dev/null || return 1
    [ -z "${PYTHON:-}" ] || [ "$(minor_of "$PYTHON")" = "$(minor_of "$venv/bin/python")" ]
}

# A container's own versions are not the lock's, whose packages go into an environment of their own.
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT

# ---- Python -------------------------------------------------------------------------------------

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11 to 3.13 that runs"
        command -v "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if fits "$name"; then
            command -v "$name"
            return
        fi
    done
    local version= # the distribution's own, unless a numbered one is offered or its own is not of these
    for name in 3.13 3.12 3.11; do
        if apt-cache show "python$name" >/dev/null 2>&1; then version=$name; break; fi
    done
    if [ -z "$version" ] && python3 -c 'import sys; sys.exit(sys.version_info < (3, 14))' 2>/dev/null; then
        die "python3 is $(minor_of python3) and the lock is for Python 3.11 to 3.13: conda env create -f environment.yml, or
name one: make setup PYTHON=/path/to/python"
    fi
    version=${version:-3}
    die "no Python 3.11 to 3.13 found; install one and run this again, for instance:
  sudo apt-get update && sudo apt-get install -y python$version python$version-dev python$version-venv
or name one: make setup PYTHON=/path/to/python"
}

# ---- system packages ----------------------------------------------------------------------------

loads() { "$python" -c "import ctypes; ctypes.CDLL('$1')" >/dev/null 2>&1; }

# Debian's names of what is missing, found by what is really needed rather than by asking dpkg: a
# compiler or an OpenCV from elsewhere serves as well.
missing_packages() {
    command -v "${CXX:-c++}" >/dev/null && command -v "${CC:-cc}" >/dev/null || echo build-essential
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    pkg-config --exists libjpeg 2>/dev/null || echo libjpeg-dev
    loads libGL.so.1 || echo libgl1 # opencv-python's own need
    loads libgthread-2.0.so.0 || echo libglib2.0-0
    local apt_python=python3
    [ "$(readlink -f "$python")" = "$(readlink -f /usr/bin/python3)" ] ||
        apt_python=python$(minor_of "$python")
    "$python" -c 'import os, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
        echo "$apt_python-dev"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$apt_python-venv"
}

install_system_packages() {
    local missing as_root=()
    missing=$(missing_packages | tr '\n' ' ')
    missing=${missing% }
    [ -n "$missing" ] || return 0
    local by_hand="sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing"
    command -v apt-get >/dev/null || die "these are missing (Debian's names), install them and run this again: $missing"
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || die "system packages are missing; run this line, then this again:
  $by_hand"
        as_root=(sudo -n)
    fi
    say "missing system packages: $missing"
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300)
    quietly "apt-get update" "${apt[@]}" update
    # shellcheck disable=SC2086 # a list of words on purpose
    quietly "apt-get install" "${apt[@]}" install -y --no-install-recommends $missing
    missing=$(missing_packages | tr '\n' ' ')
    [ -z "$missing" ] || die "apt-get installed its packages, but these are still not usable by $python: $missing"
}

# ---- the environment ----------------------------------------------------------------------------

make_venv() {
    usable_venv && return
    [ ! -e "$venv" ] || say "$venv is broken, unfinished or made for another Python or path: making it anew"
    local free_gb
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    [ $free_gb -ge $disk_needed_gb ] || die "$free_gb GB free here, $disk_needed_gb GB needed"
    quietly "making $venv with $python ($(minor_of "$python"))" "$python" -m venv --clear "$venv"
}

install_python_packages() {
    local pip=("$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off)
    # ffcv is built from source: with the pinned setuptools rather than whatever is newest that day.
    quietly "pip install setuptools" "${pip[@]}" "$(grep '^setuptools==' "$lock")"
    quietly "pip install -r $lock (a few GB, some minutes)" \
        "${pip[@]}" --no-build-isolation --use-pep517 -r "$lock"
    quietly "trying the imports" "$venv/bin/python" -c \
        'import torch, torchvision, cv2, numba, matplotlib, ffcv, ffcv.libffcv'
}

if whole; then
    importable
    crop_decoder
    say "nothing missing ($("$venv/bin/python" -V), $venv)"
    exit 0
fi
python=$(find_python)
rm -f "$stamp"
install_system_packages
make_venv
install_python_packages
importable
crop_decoder
sha256sum <"$lock" >"$stamp.partial"
mv "$stamp.partial" "$stamp"
say "complete: $("$venv/bin/python" -V), $venv"
