#!/bin/bash
# The tools that build the image: a tree of Debian 13 made by mmdebstrap, and a shell function that runs a command in it.
#
# Sourced by build.sh. What builds is the same on every machine, whatever Debian it runs; the tree is made anew when
# the list of its packages changes, and brought up to date (`make image TOOLS=new`) by making it anew.

RELEASE=trixie
TOOLS_PACKAGES=(
    # the builder and what it calls
    mkosi systemd-repart systemd-ukify systemd-boot systemd-boot-tools systemd-container udev
    apt bubblewrap cpio cryptsetup-bin dosfstools e2fsprogs erofs-utils kmod mtools sbsigntool zstd xz-utils
    # signatures
    openssl python3-cryptography python3-pefile
    # what the Python environment is fetched with, and the disk formats
    python3-pip python3-venv ca-certificates qemu-utils
    debian-archive-keyring jq tar util-linux
)
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# The base URI of a suite's archive, from the sources of apt on this machine: no mirror is known here.
find_archive() {
    local suite=$1 codename uri
    # shellcheck disable=SC1091
    codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
    uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' \
        "Codename: $codename${suite#"$RELEASE"}" | head -n 1)
    [ -n "$uri" ] || fail "no source of Debian's $codename${suite#"$RELEASE"} is configured" \
        "add one to /etc/apt/sources.list.d"
    printf '%s' "${uri%/}"
}

# Sources for the release the image is made of, as one-line entries.
render_sources() {
    local archive security suite
    archive=$(find_archive "$RELEASE") || exit 1
    security=$(find_archive "$RELEASE-security") || exit 1
    for suite in "$RELEASE" "$RELEASE-updates" "$@"; do
        printf 'deb [signed-by=%s] %s %s main\n' "$KEYRING" "$archive" "$suite"
    done
    printf 'deb [signed-by=%s] %s %s main\n' "$KEYRING" "$security" "$RELEASE-security"
}

make_tools() {
    local stamp
    stamp=$({ printf '%s\n' "${TOOLS_PACKAGES[@]}" && render_sources; } | sha256sum | cut -d' ' -f1)
    [ "${TOOLS_ANEW:-}" != new ] || rm -f "$TOOLS.stamp"
    [ "$(cat "$TOOLS.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say "making the tools tree $TOOLS (Debian 13, about two minutes)"
    rm -rf "$TOOLS" "$TOOLS.stamp"
    mkdir -p "${TOOLS%/*}"
    local packages
    packages=$(IFS=, && printf '%s' "${TOOLS_PACKAGES[*]}")
    render_sources >"$TOOLS.list"
    mmdebstrap --quiet --mode=root --variant=apt --aptopt='Apt::Install-Recommends "false"' \
        --include="$packages" "$RELEASE" "$TOOLS" "$TOOLS.list" ||
        fail "the tools tree can't be made" "see what mmdebstrap said above"
    printf '%s\n' "$stamp" >"$TOOLS.stamp"
}

# Run a command in the tools tree, which becomes its root: image-build/ is there under its own path, the network and
# the devices are this machine's, mounts end with it. Arguments: paths to be seen too, `--`, the command.
run_in_tools() {
    local binds=()
    while [ "$1" != -- ]; do
        binds+=("$1")
        shift
    done
    shift
    # shellcheck disable=SC2016
    unshare --mount --propagation private /bin/bash -euc '
        tools=$1 count=$2
        shift 2
        mount --bind "$tools" "$tools"
        for kind in proc sys dev run; do mkdir -p "$tools/$kind"; done
        mount --rbind /proc "$tools/proc"
        mount --rbind /sys "$tools/sys"
        mount --rbind /dev "$tools/dev"
        mount -t tmpfs -o mode=755 tmpfs "$tools/run"
        mount -t tmpfs -o mode=1777 tmpfs "$tools/tmp"
        for file in /etc/resolv.conf /etc/hosts; do
            [ ! -e "$file" ] || { touch "$tools$file" && mount --bind "$file" "$tools$file"; }
        done
        while [ "$count" -gt 0 ]; do
            if [ "$1" -ef "$tools$1" ]; then
                : # seen already, and files can be renamed from there to here
            elif [ -d "$1" ]; then mkdir -p "$tools$1"; else mkdir -p "$tools${1%/*}" && touch "$tools$1"; fi
            [ "$1" -ef "$tools$1" ] || mount --bind "$1" "$tools$1"
            shift
            count=$((count - 1))
        done
        mkdir -p "$tools/run/old"
        cd "$tools"
        pivot_root . run/old
        umount --lazy /run/old
        cd /
        exec "$@"' tools "$TOOLS" "${#binds[@]}" "${binds[@]}" "$@"
}
