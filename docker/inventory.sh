#!/bin/sh
# Lists what /opt/venv holds in /opt/inventory: a CycloneDX SBOM, the same for the same packages, and the texts of the licences. It runs
# in a stage of the build that is thrown away, so that the image does without these tools.
set -eu
python3 -m venv /opt/tools
/opt/tools/bin/pip install --quiet --no-cache-dir --disable-pip-version-check --require-hashes -r /tmp/sbom.lock
mkdir /opt/inventory
cd /opt/inventory
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-file sbom.cdx.json /opt/venv/bin/python
/opt/tools/bin/pip-licenses --python /opt/venv/bin/python --with-system --with-license-file --with-notice-file --no-license-path \
    --format plain-vertical --output-file licenses.txt
