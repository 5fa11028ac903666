#!/bin/sh
# Runs a command in the repository that is mounted at /work, if its files will belong to the repository's owner.
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
