#!/bin/bash
# Sets up everything Hairpin needs on Debian 12 or 13: packages, users, the Python environment.
#
# As root, non-interactive, idempotent; quick when nothing is left to do. Nothing that it installs is
# started, and services that were installed before are left as they are.
#
# Environment: PYTHON (an interpreter, 3.11 to 3.13, for a new environment), VENV (where; .venv).

set -euo pipefail

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin${PATH:+:$PATH}
export PATH LC_ALL=C.UTF-8 HOME="${HOME:-/root}"
umask 022
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

VENV=${VENV:-.venv}
STAMP=$VENV/.hairpin-setup
POLICY=/usr/sbin/policy-rc.d
SUITE_FILE=/etc/apt/sources.list.d/hairpin-suite
APT=(apt-get -y -q -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confold)

PACKAGES=(
    # the switch and the network
    openvswitch-switch iproute2 iptables ebtables nftables ethtool tcpdump iputils-ping
    # the engine (from backports where the release has none)
    suricata
    # real clients and servers for the tests and the demonstration
    nginx-light curl redis-server rsyslog rsyslog-gnutls openssl
    # for the library that is preloaded into the engines
    gcc libc6-dev
    # what attackers send frames with, for the tests of evasions
    hping3 nmap thc-ipv6 ipv6toolkit
    # what the benchmark loads its paths with
    iperf3 wrk
    # a clock that jumps, for one process, in the fault campaign
    faketime
    # small images, for the tests of reading them
    cryptsetup-bin erofs-utils sbsigntool mtools dosfstools e2fsprogs gdisk qemu-utils systemd-boot-efi
    # systemd-analyze for the image's units, networkd for what first boot writes
    systemd
    # the ground they stand on
    ca-certificates jq libcap2-bin mount passwd procps util-linux python3 python3-venv
)
# Package and the service it would start at the next boot.
SERVICES=(
    openvswitch-switch:openvswitch-switch suricata:suricata nginx-light:nginx
    redis-server:redis-server rsyslog:rsyslog nftables:nftables ebtables:ebtables
)

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf 'setup: to mend it: %s\n' "$2" >&2
    exit 1
}

# Nobody else sets up meanwhile. On file 9.
wait_for_set_up() {
    flock -n 9 && return
    say "another set-up is running; waiting for its end, a quarter of an hour at most"
    flock -w 900 9 || fail "another set-up is still running" "wait until it has ended"
}

find_codename() {
    # shellcheck disable=SC1091
    (. /etc/os-release && [ "$ID" = debian ] && printf '%s' "${VERSION_CODENAME:-}") || true
}

find_missing_packages() {
    local package installed
    installed=" $(dpkg-query -W -f='${db:Status-Status}:${Package} ' "${PACKAGES[@]}" 2>/dev/null || true)"
    for package in "${PACKAGES[@]}"; do
        [[ $installed == *" installed:$package "* ]] || printf '%s\n' "$package"
    done
}

has_candidate() {
    local policy
    policy=$(apt-cache policy "$1")
    [[ $policy == *Candidate:* && $policy != *'Candidate: (none)'* ]]
}

# The release's own source, as it is configured on this machine, with another suite: same URI, same
# keys, same options. No mirror is known here.
render_backports() {
    local codename=$1 file=$2
    case $file in
    *.sources)
        awk -v release="$codename" '
            function flush_stanza(    i, suites, found) {
                for (i = 1; i <= count; i++)
                    if (lines[i] ~ /^Suites:/) {
                        suites = " " substr(lines[i], 8) " "
                        gsub(/\t/, " ", suites)
                        found = index(suites, " " release " ") > 0
                    }
                if (found && !done) {
                    for (i = 1; i <= count; i++)
                        print (lines[i] ~ /^Suites:/) ? "Suites: " release "-backports" : lines[i]
                    done = 1
                }
                count = 0
            }
            /^[ \t]*$/ { flush_stanza(); next }
            { lines[++count] = $0 }
            END { flush_stanza() }' "$file"
        ;;
    *)
        awk -v release="$codename" '
            /^[ \t]*deb[ \t]/ && !done {
                for (i = 2; i <= NF; i++)
                    if ($i == release) { $i = release "-backports"; print; done = 1; break }
            }' "$file"
        ;;
    esac
}

add_backports() {
    local codename=$1 entry file text target
    if apt-get indextargets --format '$(CODENAME)' 'Created-By: Packages' |
        grep -qx "$codename-backports"; then
        return
    fi
    entry=$(apt-get indextargets --format '$(SOURCESENTRY)' 'Created-By: Packages' \
        'Component: main' "Codename: $codename" | head -n 1)
    file=${entry%:*}
    [ -n "$file" ] || fail "no source of Debian's release $codename is configured" \
        "add one to /etc/apt/sources.list.d"
    text=$(render_backports "$codename" "$file")
    [ -n "$text" ] || fail "can't read the source of $codename in $file" \
        "add the suite $codename-backports to the sources of apt by hand"
    case $file in
    *.sources) target=$SUITE_FILE.sources ;;
    *) target=$SUITE_FILE.list ;;
    esac
    say "adding the suite $codename-backports in $target, from the source in $file"
    printf '%s\n' "$text" >"$target"
    "${APT[@]}" update
}

install_packages() {
    local codename missing=("$@") package pair made_policy=
    codename=$(find_codename)
    case $codename in
    bookworm | trixie) ;;
    *) fail "this is not Debian 12 or 13 and lacks: ${missing[*]}" "install them by hand" ;;
    esac
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 APT_LISTCHANGES_FRONTEND=none
    # One that a killed set-up left is ours too.
    if [ ! -e "$POLICY" ] || grep -q 'the set-up of Hairpin' "$POLICY"; then
        made_policy=1
        trap 'rm -f "$POLICY"' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM HUP
        printf '#!/bin/sh\n# made by the set-up of Hairpin, and removed by it\nexit 101\n' >"$POLICY"
        chmod 755 "$POLICY"
    fi
    say "installing packages: ${missing[*]}"
    "${APT[@]}" update
    local from=()
    for package in "${missing[@]}"; do
        [ "$package" = suricata ] || continue
        if ! has_candidate suricata; then
            add_backports "$codename"
            from=(-t "$codename-backports")
        fi
    done
    local rest=()
    for package in "${missing[@]}"; do
        [ "$package" = suricata ] || rest+=("$package")
    done
    [ ${#rest[@]} -eq 0 ] || "${APT[@]}" install --no-install-recommends "${rest[@]}"
    if [[ " ${missing[*]} " == *' suricata '* ]]; then
        "${APT[@]}" install --no-install-recommends "${from[@]}" suricata
    fi
    if command -v systemctl >/dev/null; then
        for pair in "${SERVICES[@]}"; do
            [[ " ${missing[*]} " == *" ${pair%:*} "* ]] || continue
            systemctl --no-reload --quiet disable "${pair#*:}.service" 2>/dev/null || true
        done
    fi
    if [ -n "$made_policy" ]; then
        rm -f "$POLICY"
        trap - EXIT INT TERM HUP
    fi
}

create_users() {
    local user
    for user in hairpin hairpin-engine; do
        getent passwd "$user" >/dev/null && continue
        say "creating the system user $user"
        useradd --system --user-group --no-create-home --home-dir /nonexistent \
            --shell /usr/sbin/nologin "$user"
    done
}

is_fit() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        candidate=$(command -v "$PYTHON" || true)
        { [ -n "$candidate" ] && is_fit "$candidate"; } ||
            fail "PYTHON=$PYTHON is no Python 3.11 to 3.13 with venv" "name another one, or none"
        printf '%s' "$candidate"
        return
    fi
    # Debian's own first: every user of the machine can read it.
    for candidate in /usr/bin/python3 python3.13 python3.11 python3.12 python3; do
        candidate=$(command -v "$candidate" || true)
        if [ -n "$candidate" ] && is_fit "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "there's no Python 3.11 to 3.13 with venv" "apt-get install python3-venv"
}

# An environment that works is kept, whoever made it, unless PYTHON names another version.
is_venv_fit() {
    [ -x "$VENV/bin/python" ] && is_fit "$VENV/bin/python" &&
        "$VENV/bin/python" -c 'import pip' 2>/dev/null || return 1
    [ -n "${PYTHON:-}" ] || return 0
    local ask='import sys; print(sys.version)'
    [ "$("$VENV/bin/python" -c "$ask")" = "$("$PYTHON" -c "$ask")" ]
}

compute_stamp() {
    local version
    version=$("$VENV/bin/python" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null || echo none)
    { printf '%s\n%s\n' "$version" "$PWD" && cat image-build/setup.sh pyproject.toml requirements*.lock; } |
        sha256sum | cut -d' ' -f1
}

install_python() {
    local python pip
    if ! is_venv_fit; then
        python=$(find_python)
        say "making the Python environment $VENV with $python"
        "$python" -m venv --clear "$VENV"
    fi
    rm -f "$STAMP"
    pip=("$VENV/bin/python" -m pip -qq --disable-pip-version-check --no-input install)
    export PIP_ROOT_USER_ACTION=ignore
    say "installing the locked Python packages"
    "${pip[@]}" --require-hashes -r requirements-build.lock
    # Two have no wheel; they are built with the locked tools rather than with whatever is newest.
    "${pip[@]}" --require-hashes --use-pep517 --no-build-isolation --only-binary=:all: \
        --no-binary=ovs,suricata-update -r requirements-dev.lock
    "${pip[@]}" --no-deps --no-build-isolation --editable .
    compute_stamp >"$STAMP"
}

# Engines load it as a user of their own. Elsewhere first, then renamed: an engine may be starting.
build_library() {
    local native=appliance/inspection/native target=$VENV/lib/hairpin/hairpin_queue.so
    if [ -e "$target" ] && [ -z "$(find "$native" -newer "$target" -name '*.[ch]')" ]; then
        return
    fi
    say "building $target"
    mkdir -p "${target%/*}"
    gcc -std=c11 -O3 -fPIC -shared -fstack-protector-strong -Wall -Wextra -Wconversion -Werror \
        -Wl,-z,relro,-z,now -o "$target.new" "$native"/*.c -ldl
    chmod 755 "$target.new"
    mv -f "$target.new" "$target"
}

main() {
    local missing
    [ "$(id -u)" = 0 ] || fail "set-up needs root" "sudo make setup"
    exec 9>/run/hairpin-setup.lock
    wait_for_set_up

    mapfile -t missing < <(find_missing_packages)
    [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
    create_users
    # The management service and the engines read the program as users of their own.
    chmod -R a+rX appliance steering suricata 2>/dev/null || true
    if ! is_venv_fit || [ "$(cat "$STAMP" 2>/dev/null)" != "$(compute_stamp)" ]; then
        install_python
    fi
    build_library
    say "everything is in place"
}

# Sourced by the tests, it only declares.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
