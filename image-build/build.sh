#!/bin/bash
# Builds the image of the service VM into image-build/out: raw disk, qcow2, manifest, SBOM, SHA256SUMS.
#
# As root, without loop devices. Environment: KEY, CERT (PEM: sign with these; else keys of this machine's own, made
# once in image-build/keys), VERSION (of the image; else the program's), OUT (the directory), TOOLS=new (newest tools),
# FAST=1 (while working on it: the packages of the last such build, so not for a release).
#
# What is given is looked at before anything is made. In OUT all is made in a directory of its own and renamed at the
# end, so that a build which ends early leaves there what was there before.

set -euo pipefail
TOOLS_ANEW=${TOOLS:-}
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
ROOT=$(dirname "$HERE")
# shellcheck source=image-build/setup.sh disable=SC1091
. "$HERE/setup.sh"
CACHE=${CACHE:-$HERE/cache}
TOOLS=$CACHE/tools
OUT=$(realpath -m "${OUT:-$HERE/out}")
MAKING=$OUT/.hairpin-image
# shellcheck source=image-build/tools.sh disable=SC1091
. "$HERE/tools.sh"
# shellcheck source=image-build/engine.conf disable=SC1091
. "$HERE/engine.conf"

SEED=6f1d3c58-0f0e-4c2b-9d57-3c1f5f0a7b1e # of whatever else would be random in the image

say() { printf 'image: %s\n' "$*"; }
fail() {
    printf 'image: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf 'image: to mend it: %s\n' "$2" >&2
    exit 1
}
SOURCES=(appliance steering suricata pyproject.toml README.md LICENSE requirements.lock requirements-build.lock)

find_commit() {
    local commit dirty
    commit=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null) || { printf unknown && return; }
    dirty=$(git -C "$ROOT" status --porcelain 2>/dev/null)
    printf '%s%s' "$commit" "${dirty:+-changed}"
}

# Every time in the image is at most this one.
find_epoch() {
    if [ -n "${SOURCE_DATE_EPOCH:-}" ]; then
        printf '%s' "$SOURCE_DATE_EPOCH"
    else
        git -C "$ROOT" log -1 --format=%ct 2>/dev/null ||
            fail "there's no commit to take the image's time from" "set SOURCE_DATE_EPOCH"
    fi
}

check_options() {
    [[ $VERSION =~ ^[0-9][0-9A-Za-z.~^-]{0,19}$ ]] || fail "VERSION=$VERSION is no version" "as in 0.1.0"
    case ${FAST:-0} in
    0) FAST= ;;
    1) say "FAST=1: with the packages of the last such build, which may lack fixes since: not for a release" ;;
    *) fail "FAST=$FAST is neither 0 nor 1" "FAST=1 make image" ;;
    esac
    case $TOOLS_ANEW in
    '' | new) ;;
    *) fail "TOOLS=$TOOLS_ANEW is not known" "TOOLS=new makes the tools tree anew" ;;
    esac
}

# The environment of setup.sh, whose directory this runs in: needed last, to sign the manifest.
check_program() {
    [ -x "$VENV/bin/hairpin" ] || fail "there is no $VENV/bin/hairpin, which signs the manifest" "make setup"
}

# OUT is mounted over the same path of the tools tree, which must not lose what it runs on.
check_out() {
    case $OUT/ in
    // | /usr/ | /usr/*bin/ | /usr/lib*/ | /usr/share/ | /etc/ | /var/ | /var/lib/ | /bin/ | /sbin/ | /lib*/ | /dev/ | /proc/* | /sys/* | /run/)
        fail "OUT=$OUT is no place for images" "name a directory of its own, as in OUT=/srv/images" ;;
    esac
    mkdir -p "$OUT" 2>/dev/null && [ -d "$OUT" ] || fail "OUT=$OUT is no directory, and none can be made there" \
        "name a directory, as in OUT=/srv/images"
    rm -rf "$MAKING" 2>/dev/null || true
    mkdir -m 0755 "$MAKING" 2>/dev/null || fail "nothing can be written to OUT=$OUT" "name a directory that can be"
}

# A release's: RSA, since firmware takes no others; the certificate is its own; nobody else may read it.
check_keys() {
    local mend="make image KEY=/path/key.pem CERT=/path/certificate.pem" key certificate
    [ -f "${KEY:-}" ] && [ -r "$KEY" ] && [ -f "${CERT:-}" ] && [ -r "$CERT" ] ||
        fail "KEY and CERT name no two readable files" "$mend"
    [ -z "$(find -L "$KEY" -maxdepth 0 -perm /0027)" ] ||
        fail "KEY=$KEY can be read or changed by others (mode $(stat -L -c %a "$KEY"))" "chmod 600 $KEY"
    # An empty password, so that nobody is asked for one.
    key=$(openssl rsa -in "$KEY" -passin pass: -pubout 2>/dev/null) ||
        fail "KEY=$KEY is no RSA key in PEM without a password, which is what firmware takes" "$mend"
    certificate=$(openssl x509 -in "$CERT" -noout -pubkey 2>/dev/null) ||
        fail "CERT=$CERT is no certificate in PEM" "$mend"
    [ "$key" = "$certificate" ] || fail "KEY=$KEY is not the key of CERT=$CERT" "name those that belong together"
}

make_keys() {
    if [ -n "${KEY:-}${CERT:-}" ]; then
        check_keys
        KEY=$(readlink -f "$KEY") CERT=$(readlink -f "$CERT")
        return
    fi
    KEY=$HERE/keys/image.key CERT=$HERE/keys/image.crt
    if [ -s "$KEY" ] && [ -s "$CERT" ]; then
        check_keys
        return
    fi
    # A key that images were signed with is not replaced because its certificate is missing.
    [ ! -e "$KEY" ] && [ ! -e "$CERT" ] || fail "of $KEY and $CERT there is only one, or one is empty" \
        "put back the other, or remove ${KEY%/*} to have new ones: images of the old key take no updates of the new one"
    say "making keys for development images in ${KEY%/*}: whoever has them can sign images"
    # Both or none, also when this is ended meanwhile.
    rm -rf "${KEY%/*}.new"
    install -d -m 0700 "${KEY%/*}.new"
    (
        umask 077
        openssl req -x509 -newkey rsa:3072 -noenc -sha256 -days 3650 -subj '/CN=Hairpin development image/' \
            -addext 'basicConstraints=critical,CA:FALSE' -addext 'extendedKeyUsage=codeSigning' \
            -keyout "${KEY%/*}.new/image.key" -out "${KEY%/*}.new/image.crt" 2>/dev/null
    ) || fail "no keys could be made" "see openssl(1)"
    mv -T "${KEY%/*}.new" "${KEY%/*}"
}

# Wheels for the image's Python, by the locks' hashes, with the machine's own configuration of pip.
fetch_wheels() {
    local stamp paths=() path
    stamp=$(cat "$ROOT/requirements.lock" "$ROOT/requirements-build.lock" "$TOOLS.stamp" | sha256sum | cut -d' ' -f1)
    [ "$(cat "$CACHE/wheels.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say "fetching the locked Python packages"
    rm -rf "$CACHE/wheels" "$CACHE/wheels.stamp"
    mkdir -p "$CACHE/wheels" "$CACHE/locks"
    cp "$ROOT"/requirements{,-build}.lock "$CACHE/locks/"
    for path in /etc/pip.conf /etc/xdg/pip "$HOME/.config/pip" /etc/ssl/certs /usr/local/share/ca-certificates; do
        [ ! -e "$path" ] || paths+=("$path")
    done
    run_in_tools "$CACHE" "${paths[@]}" -- /bin/bash -euc '
        cd "$1"
        pip=(python3 -m pip -q --disable-pip-version-check --no-input download --no-deps --require-hashes -d wheels)
        # Build tools first: what has no wheel is taken apart by them.
        "${pip[@]}" --only-binary=:all: -r locks/requirements-build.lock
        "${pip[@]}" --only-binary=:all: --no-binary=ovs,suricata-update -r locks/requirements.lock' \
        bash "$CACHE" || fail "the Python packages can't be fetched" "see what pip said above"
    printf '%s\n' "$stamp" >"$CACHE/wheels.stamp"
}

# What is built into the image, without times, owners and byte code of this tree.
stage_source() {
    rm -rf "$CACHE/stage"
    mkdir -p "$CACHE/stage/source" "$CACHE/sandbox/etc/apt/sources.list.d"
    tar -C "$ROOT" --exclude=__pycache__ --exclude='*.egg-info' --mode='u+rwX,go+rX,go-w' \
        --owner=0 --group=0 --mtime="@$EPOCH" -cf - "${SOURCES[@]}" | tar -C "$CACHE/stage/source" -xpf -
    cp -al "$CACHE/wheels" "$CACHE/stage/wheels"
    # What updates and rules bundles of this image are signed with.
    install -m 0644 "$CERT" "$CACHE/stage/image.crt"
    # A file of this name is used as it is; mkosi's own would name mirrors, and a suite that mirrors refuse.
    render_sources "$ENGINE_SUITE" | sed -E 's/^deb \[signed-by=([^]]*)\] (\S+) (\S+) main$/Types: deb\nURIs: \2\nSuites: \3\nComponents: main\nSigned-By: \1\n/' \
        >"$CACHE/sandbox/etc/apt/sources.list.d/mkosi.sources"
}

build() {
    local work=$CACHE/work
    rm -rf "$work"
    mkdir -p "$work" "$CACHE/packages" "$CACHE/images"
    run_in_tools "$HERE" "$CACHE" "$OUT" "$KEY" "$CERT" -- \
        env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root TMPDIR=/tmp \
        SOURCE_DATE_EPOCH="$EPOCH" \
        mkosi --directory "$HERE" --force --seed "$SEED" --image-version "$VERSION" \
        --output-directory "$MAKING" --workspace-directory "$work" --package-cache-dir "$CACHE/packages" \
        ${FAST:+--incremental=yes --cache-directory="$CACHE/images"} \
        --sandbox-tree "$CACHE/sandbox" --build-sources "$CACHE/stage:" \
        --package "suricata/$ENGINE_SUITE" \
        --environment "SYSTEMD_REPART_MKFS_OPTIONS_EXT4=-Ehash_seed=$SEED" \
        --environment "ENGINE_FLOOR=$ENGINE_FLOOR" --environment "IMAGE_COMMIT=$COMMIT" \
        --source-date-epoch "$EPOCH" \
        --secure-boot-key "$KEY" --secure-boot-certificate "$CERT" \
        --verity-key "$KEY" --verity-certificate "$CERT" \
        build || fail "mkosi failed" "see what it said above"
}

# Beside the disk: the same as qcow2, a bill of materials (CycloneDX), checksums.
write_outputs() {
    local name=hairpin_$VERSION
    run_in_tools "$HERE" "$OUT" -- /bin/bash -euc '
        cd "$1"
        name=$2
        qemu-img convert -m 1 -c -f raw -O qcow2 -o compression_type=zstd "$name.raw" "$name.qcow2"
        jq -S --null-input --slurpfile debian "$name.manifest" --slurpfile python python.json \
            --slurpfile gone gone.json \
            --arg name "$name" --arg version "$3" --arg commit "$4" --argjson epoch "$5" -f "$6" >"$name.cdx.json"
        rm -f python.json gone.json "$name" "$name.vmlinuz" "$name.initrd"' \
        bash "$MAKING" "$name" "$VERSION" "$COMMIT" "$EPOCH" "$HERE/sbom.jq" ||
        fail "the outputs can't be written" "see what was said above; is the disk full?"
    say "signing the manifest of every byte"
    "$VENV/bin/hairpin" image sign "$MAKING/$name.raw" --key "$KEY" --certificate "$CERT" ||
        fail "the image can't be signed" "see what was said above"
    (cd "$MAKING" && sha256sum "$name".{raw,qcow2,efi,manifest,raw.manifest,cdx.json} >SHA256SUMS)
    publish_outputs "$name"
}

# The checksums last: until then those that are there do not fit, or there are none.
publish_outputs() {
    local ending
    chmod 0644 "$MAKING/$1".{raw,qcow2,efi,manifest,raw.manifest,cdx.json} "$MAKING/SHA256SUMS"
    for ending in raw qcow2 efi manifest raw.manifest cdx.json; do
        mv -fT "$MAKING/$1.$ending" "$OUT/$1.$ending"
    done
    mv -fT "$MAKING/SHA256SUMS" "$OUT/SHA256SUMS"
}

leave() {
    local status=$?
    trap - EXIT INT TERM HUP
    rm -rf "$MAKING"
    [ "$status" -lt 128 ] || say "ended early: $OUT is as it was; make image begins anew" >&2
    exit "$status"
}

main_build() {
    [ "$(id -u)" = 0 ] || fail "an image is built by root" "sudo make image"
    VERSION=${VERSION:-$(sed -n 's/^version = "\(.*\)"$/\1/p' "$ROOT/pyproject.toml")}
    check_options
    check_program
    exec 8>"/run/hairpin-image.lock"
    if ! flock -n 8; then
        say "another image is being built; waiting for its end, half an hour at most"
        flock -w 1800 8 || fail "another image is still being built" "wait until it has ended"
    fi
    trap leave EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    check_out
    make_keys
    COMMIT=$(find_commit) EPOCH=$(find_epoch)
    mkdir -p "$CACHE"
    make_tools
    fetch_wheels
    stage_source
    say "building hairpin $VERSION from $COMMIT"
    build
    write_outputs
    say "done: $OUT"
}

# Sourced by the tests, it only declares.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main_build "$@"
    exit
fi
