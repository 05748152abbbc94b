#!/usr/bin/env bash
# A folder of at most 56 MiB that a GPU machine without network needs beside this repository: wheels for its
# Python, the compiled decoder, .beton files of your images. Takes minutes; needs what `make setup` installs.
#
#   bash acceptance/bundle.sh --python python3.12 --imagenette data/imagenette --photos my_images
#
# --python: an interpreter of the GPU machine's version, with venv and its headers. --help lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/python -m acceptance.bundle "$@"
