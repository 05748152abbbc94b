# GPUs: on NVIDIA's PyTorch image, for its drivers' libraries and compiler; Python packages are the lock's.
#   make image
#   docker run --gpus all --ipc=host --rm -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" ffcv-imnet \
#       python train_imagenet.py --config rn_configs/rn18_16ep.yaml --resume auto
# More of it, eight GPUs included, in docs/gpu.md.
# Not built by this project yet (no docker here); linted by hadolint.
FROM nvcr.io/nvidia/pytorch:26.05-py3
ARG DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The versions are the distribution's of the day: Debian and Ubuntu keep no old ones to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential pkg-config libopencv-dev \
        libturbojpeg0-dev libjpeg-dev libgl1 libglib2.0-0t64 python3-dev python3-venv make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# NVIDIA's image holds pip to its own builds; the lock's are wanted, in a .venv of their own.
ENV PIP_CONSTRAINT="" OMP_WAIT_POLICY=PASSIVE PATH="/app/.venv/bin:$PATH"
COPY setup.sh requirements.lock ./
RUN bash setup.sh && .venv/bin/python -m pip cache purge
COPY . .
# set-up ran before the sources were there, so that an edit of them does not repeat it
RUN .venv/bin/python -m ffcv_imnet.native.build
# No ENTRYPOINT: NVIDIA's own checks the driver and lends newer CUDA libraries to an older one, then runs the command.
CMD ["python", "train_imagenet.py", "--help"]
