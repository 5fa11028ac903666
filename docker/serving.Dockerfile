# The server alone: no torch, no DVC, no compilers. From the repository's root, `make images`, or
#   docker build -f docker/serving.Dockerfile -t cae-serving .                                  CPU
#   docker build -f docker/serving.Dockerfile --build-arg VARIANT=cuda -t cae-serving:cuda .    GPU, with CUDA and cuDNN
#   ... --build-arg BUNDLE=models/bundle -t my-encoder .                                        with the bundle in it
# Name a digest for a base that must not change: --build-arg BASE=python:3.13-slim-bookworm@sha256:... This default has not been pulled
# yet: the images were built and tested on a Debian 12.
ARG BASE=python:3.13-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS environment
ARG VARIANT=cpu
# A mirror of PyPI; without a password, which the image's history would show.
ARG PIP_INDEX_URL
COPY docker/serving-${VARIANT}.lock /tmp/serving.lock
# Without pip in it: what an image runs needs no installer.
RUN python3 -m venv /opt/installer \
    && python3 -m venv --without-pip /opt/venv \
    && /opt/installer/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes -r /tmp/serving.lock \
    && rm -r /opt/installer /tmp/serving.lock

FROM environment AS inventory
COPY docker/sbom.lock docker/inventory.sh /tmp/
RUN sh /tmp/inventory.sh

FROM environment
COPY --from=inventory /opt/inventory/ /opt/
WORKDIR /app
COPY serving/ serving/
ARG BUNDLE=docker/bundle
COPY ${BUNDLE}/ /bundle/

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CAE_SERVING_BUNDLE=/bundle \
    CAE_SERVING_HOST=0.0.0.0 \
    CAE_SERVING_PORT=8000

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cae-pipe serving" \
      org.opencontainers.image.description="Patch features and reconstructions of a Context Autoencoder over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# A number, so that Kubernetes can see without a user database that it is not root.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['CAE_SERVING_PORT'] + '/health/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "serving"]
