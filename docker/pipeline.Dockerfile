# The pipeline: torch with CUDA from wheels, DVC and cae-pipe. It works on the repository that is mounted at /work, as the user who
# owns it. From the repository's root, `make images`, or
#   docker build -f docker/pipeline.Dockerfile -t cae-pipeline .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" cae-pipeline            dvc repro
#   docker run ... cae-pipeline cae-pipe doctor                                                                 any command
# A base needs apt and Python 3.11 to 3.13; it brings no CUDA, for the wheels do. A Debian or Ubuntu does as well:
#   --build-arg BASE=ubuntu:24.04
# This default has not been pulled yet: the image was built and tested on a Debian 12.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

# hadolint ignore=DL3006
FROM ${BASE} AS environment
# Debian and Ubuntu keep only the newest version of a package, so a pinned one cannot be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates dumb-init git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    # For this folder only; with other users (Docker Desktop, user namespaces) Git would refuse to read it.
    && git config --system --add safe.directory /work \
    # Whoever the caller is, there is a home to write to.
    && mkdir --mode=1777 /home/cae
# cpu: after `make lock-cpu`, with --build-arg PIP_EXTRA_INDEX_URL=... of an index that has torch for the CPU.
ARG VARIANT=cuda
# Without passwords, which the image's history would show.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY docker/pipeline-${VARIANT}.lock /tmp/pipeline.lock
# Without pip in it: what an image runs needs no installer.
RUN python3 -m venv /opt/installer \
    && python3 -m venv --without-pip /opt/venv \
    && /opt/installer/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes -r /tmp/pipeline.lock \
    && rm -r /opt/installer /tmp/pipeline.lock

FROM environment AS inventory
COPY docker/sbom.lock docker/inventory.sh /tmp/
RUN sh /tmp/inventory.sh

FROM environment
COPY --from=inventory /opt/inventory/ /opt/
COPY docker/pipeline-entrypoint.sh /usr/local/bin/in-repository
# The same place as the mounted repository, whose own code therefore runs where there is one.
WORKDIR /work
COPY LICENSE README.md pyproject.toml params.yaml dvc.yaml ./
COPY params/ params/
COPY cae/ cae/
COPY pipeline/ pipeline/
COPY serving/ serving/
RUN python3 -m venv /opt/installer \
    && /opt/installer/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --no-deps --no-build-isolation --editable . \
    && rm -r /opt/installer

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    HOME=/home/cae \
    # PyTorch's compiler asks for a name, and the number of the caller has none.
    USER=cae \
    # In the repository, for downloads and the hashes that DVC remembers should outlive the container.
    HF_HOME=/work/data/downloads/huggingface \
    DVC_SITE_CACHE_DIR=/work/.dvc/tmp/site-cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cae-pipe pipeline" \
      org.opencontainers.image.description="Pretrains, probes and exports Context Autoencoders with DVC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
# SIGTERM would end dvc at once, and the trainer with the container. SIGINT dvc leaves to the stage, which saves; dumb-init gives it to
# the whole process group.
STOPSIGNAL SIGINT
ENTRYPOINT ["dumb-init", "--rewrite", "15:2", "--", "in-repository"]
CMD ["dvc", "repro"]
