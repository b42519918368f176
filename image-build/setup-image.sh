#!/bin/bash
# Sets up what only the image needs, beside setup.sh: mmdebstrap, by which the tools come, QEMU 10 and UEFI firmware, xorriso.
#
# As root, non-interactive, idempotent; quick when nothing is left to do.

# shellcheck source=image-build/setup.sh disable=SC1091
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/setup.sh"

PACKAGES=(mmdebstrap debian-archive-keyring qemu-system-x86 qemu-utils ovmf openssl util-linux dosfstools mtools xorriso)
# Debian 12's QEMU 7.2 panics Debian 13's kernel where it emulates (wrong flags after cmpxchg16b).
QEMU=(qemu-system-x86 qemu-utils)
QEMU_FLOOR=1:10.0
SERVICES=()

find_old_qemu() {
    local package version
    for package in "${QEMU[@]}"; do
        version=$(dpkg-query -W -f='${db:Status-Status} ${Version}' "$package" 2>/dev/null || true)
        [[ $version == 'installed '* ]] && dpkg --compare-versions "${version#* }" ge "$QEMU_FLOOR" ||
            printf '%s\n' "$package"
    done
}

main() {
    local codename missing old
    [ "$(id -u)" = 0 ] || fail "set-up needs root" "sudo make image"
    exec 9>/run/hairpin-setup.lock
    wait_for_set_up
    mapfile -t old < <(find_old_qemu)
    mapfile -t missing < <(find_missing_packages)
    if [ ${#old[@]} -gt 0 ]; then
        codename=$(find_codename)
        "${APT[@]}" update
        [ "$codename" != bookworm ] || add_backports "$codename"
        say "installing QEMU ${QEMU_FLOOR#*:} or newer"
        DEBIAN_FRONTEND=noninteractive "${APT[@]}" install --no-install-recommends \
            ${codename:+$([ "$codename" != bookworm ] || printf -- '-t %s-backports' "$codename")} "${QEMU[@]}"
        mapfile -t missing < <(find_missing_packages)
    fi
    [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
    mapfile -t old < <(find_old_qemu)
    [ ${#old[@]} -eq 0 ] || fail "QEMU is older than ${QEMU_FLOOR#*:}" "install QEMU 10 or newer"
    say "what the image needs is in place"
}

main "$@"
