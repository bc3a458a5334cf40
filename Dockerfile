# An image for machines with NVIDIA GPUs: everything that `make env` installs, for training, segmenting and the web page.
#
#   docker build -t mixreorg_fast --build-arg COMMIT=$(git rev-parse --short HEAD) .
#   docker run --rm --gpus all mixreorg_fast                                    # mixreorg info
#   docker run --rm --gpus all --ipc host -v $PWD:/app mixreorg_fast mixreorg train zero2
#
# Drivers 525 to 579: --build-arg CUDA=12 --build-arg IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04

# PyTorch's wheels bring cuBLAS, cuDNN and NCCL, so the image with the CUDA runtime alone suffices.
ARG IMAGE=nvidia/cuda:13.0.0-base-ubuntu24.04
FROM ${IMAGE}

# gcc, g++ and Python.h: Triton and torch.compile compile when they first run.
RUN apt-get update -q \
    && apt-get install -y -q --no-install-recommends make gcc g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mixreorg_fast
COPY . .
# No driver is visible while an image is built, so the build says what `make` would find out: a GPU, and its CUDA.
ARG CUDA=13
RUN make env GPU=,gpu CUDA=${CUDA} PIP_NO_CACHE_DIR=1

ARG COMMIT=unknown
ENV PATH=/opt/mixreorg_fast/.venv/bin:${PATH} MIXREORG_COMMIT=${COMMIT}
# Data, runs and results of relative paths lie in the folder that is mounted here.
WORKDIR /app
CMD ["mixreorg", "info"]
