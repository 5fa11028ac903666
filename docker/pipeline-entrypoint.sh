#!/bin/sh
# Runs a command in the repository that is mounted at /work, as its owner. Another user than root may, too, where the folder is open to
# everybody: so it looks where the engine translates owners (Docker Desktop), and there files end up as the caller's.
set -eu
uid=$(id -u)
owner=$(stat --format %u .)
if mountpoint --quiet /work && [ "$uid" != "$owner" ] && { [ "$uid" = 0 ] || [ ! -w . ]; }; then
    owners=$(stat --format %u:%g .)
    echo "error: the repository at /work belongs to user $owners, and this container runs as $(id -u):$(id -g)." \
        "Run it with --user $owners, or for docker compose with CAE_UID=${owners%:*} CAE_GID=${owners#*:} (a line each in .env)" >&2
    exit 2
fi
exec "$@"
