# Everything of requirements.lock with the CUDA runtime, run as a user who is not root.
#
#   docker build -t twist .
#   docker run --rm --gpus all --shm-size 16g -v DATASETS:/data -v "$PWD":/work twist doctor
#
# What runs write lies in the folder that is mounted at /work, and belongs to user 1000.

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# A compiler for what torch.compile makes; OpenCV's two libraries; make and git for the installation.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libgl1 libglib2.0-0t64 make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner=1000 --group=1000 /opt/twist /work

COPY --chown=1000:1000 . /opt/twist
USER 1000:1000
ENV HOME=/home/ubuntu
RUN make -C /opt/twist install && rm -rf /home/ubuntu/.cache/pip /home/ubuntu/.cache/uv

ENV PATH=/opt/twist/.venv/bin:$PATH DETECTRON2_DATASETS=/data
WORKDIR /work
ENTRYPOINT ["twist"]
CMD ["--help"]
