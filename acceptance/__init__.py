"""The first hour on a GPU, in one command: `bash acceptance/gpu.sh`. docs/gpu.md says how it is used."""
