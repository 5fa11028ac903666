#!/bin/sh
# Debian's container engine for the tests, on a machine that has none: unpacked below a folder, nothing is installed. Needs root.
#   engine.sh unpack FOLDER   dockerd, Compose and debootstrap to FOLDER/root
#   engine.sh base FOLDER     a small Debian with Python, as a tar file on stdout, for `docker import`
set -eu
folder=$2

compose_of_a_newer_debian() {
    # Debian 12 has only the first Compose, which knows neither the files' `!reset` nor the call `docker compose`.
    lists=$folder/trixie
    mkdir -p "$lists/partial" "$folder/archives/partial"
    awk 'BEGIN { RS = "" } NR == 1' /etc/apt/sources.list.d/debian.sources | sed 's/^Suites:.*/Suites: trixie/' >"$folder/trixie.sources"
    set -- -o "Dir::Etc::sourcelist=$folder/trixie.sources" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$lists" \
        -o "Dir::Cache::archives=$folder/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=
    apt-get --quiet --quiet "$@" update
    apt-get --quiet --quiet "$@" download docker-compose
}

case $1 in
unpack)
    mkdir -p "$folder/packages" "$folder/root" "$folder/config/cli-plugins"
    cd "$folder/packages"
    apt-get --quiet --quiet update
    # docker-cli is a package of its own only in newer releases.
    apt-get --quiet --quiet download docker.io containerd runc tini debootstrap
    apt-get --quiet --quiet download docker-cli 2>/dev/null || true
    compose_of_a_newer_debian
    for package in *.deb; do
        dpkg-deb --extract "$package" "$folder/root"
    done
    ln -sf "$folder/root/usr/libexec/docker/cli-plugins/docker-compose" "$folder/config/cli-plugins/docker-compose"
    touch "$folder/unpacked"
    ;;
base)
    system=$folder/base
    rm -rf "$system"
    DEBOOTSTRAP_DIR="$folder/root/usr/share/debootstrap" "$folder/root/usr/sbin/debootstrap" --variant=minbase \
        --include=ca-certificates,python3,python3-venv bookworm "$system" >"$folder/debootstrap.log"
    rm -rf "$system"/var/cache/apt/archives/*.deb "$system"/var/lib/apt/lists/*
    # Builds reach what this machine reaches, behind a company's proxy too.
    cp /etc/ssl/certs/ca-certificates.crt "$system/etc/ssl/certs/"
    tar --create --directory "$system" .
    rm -rf "$system"
    ;;
esac
