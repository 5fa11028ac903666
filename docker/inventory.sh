#!/bin/sh
# Writes what /opt/venv holds to /opt/inventory: a CycloneDX SBOM and the licences. Runs in a build stage that is thrown away.
set -eu
python3 -m venv /opt/tools
/opt/tools/bin/pip install --no-cache-dir --disable-pip-version-check --quiet --require-hashes -r /tmp/tools.lock
mkdir /opt/inventory
/opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON --output-file /opt/inventory/sbom.cdx.json /opt/venv
/opt/tools/bin/pip-licenses --python /opt/venv/bin/python --with-system --from mixed --format plain-vertical --with-license-file --no-license-path --output-file /opt/inventory/licenses.txt
