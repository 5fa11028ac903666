# The server alone: no torch, no DVC, no compilers. Build from the repository's root:
#   docker build -f docker/serving.Dockerfile -t cae-serving .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/models/bundle:/bundle:ro" cae-serving
# Name a digest for a build that must not change: --build-arg BASE=python:3.13-slim-bookworm@sha256:...
ARG BASE=python:3.13-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# Dependencies before the source, so that a change of code does not install them again.
COPY docker/serving-cpu.lock /tmp/serving.lock
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r /tmp/serving.lock \
    && rm /tmp/serving.lock

WORKDIR /app
COPY serving/ serving/

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
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
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['CAE_SERVING_PORT'] + '/health/ready', timeout=4)"]
ENTRYPOINT ["python", "-m", "serving"]
