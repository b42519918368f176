#!/bin/sh
# Hairpin on hv-1, bridge br-int
# Printed by `hairpin host`; needs no Hairpin here. Run as root; it can be run again.
set -eu
umask 077
refuse() { printf 'refused: %s; %s\n' "$1" "$2" >&2; exit 1; }
# look AWK COMMAND...: what it prints, through awk, without quotes. If it fails, so does the script.
look() { by=$1; shift; said=$("$@") || return 1; printf '%s\n' "$said" | awk "$by" | tr -d '"'; }
# drop FILE SIGN: remove it if its first line has the sign; another one is not ours.
drop() { [ ! -f "$1" ] || case "$(head -n 1 "$1")" in *"$2"*) rm -f "$1";; esac; }
got=$(look 1 ovs-vsctl --timeout=15 --bare --columns=name find Bridge name=br-int)
if [ "$got" != br-int ]; then
    refuse 'there is no bridge br-int' 'correct bridge in host.yaml; run this on the host itself'
fi
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
if [ "$got" = '' ]; then
    echo 'bridge br-int is not prepared'
else
    got=$(look '{sub(/^"/, ""); sub(/\/.*/, ""); print}' ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
    if [ "$got" != hv-1 ]; then
        refuse 'bridge br-int was prepared for another host'"'"'s plan' 'use that plan'
    fi
    got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-former-fail-mode)
    if [ "$got" != '' ]; then
        got=$(look '/actions=/ && !/cookie=0x4850[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][ ,]/ && !/cookie=0x686f737400[ ,]/ {print; exit}' ovs-ofctl -O OpenFlow15 --timeout=15 --no-stats dump-flows br-int)
        if [ "$got" != '' ]; then
            refuse 'bridge br-int has flows of others by now, which would be lost with the fail mode' 'keep them, delete them, and add them again afterwards'
        fi
        got=$(look 'match($0, /group_id=[0-9]+/) {id = substr($0, RSTART + 9, RLENGTH - 9) + 0; if (!(id >= 1213202432 && id <= 1213267967)) {print; exit}}' ovs-ofctl -O OpenFlow15 --timeout=15 dump-groups br-int)
        if [ "$got" != '' ]; then
            refuse 'bridge br-int has groups of others by now, which would be lost with the fail mode' 'keep them, delete them, and add them again afterwards'
        fi
        ovs-ofctl -O OpenFlow15 --timeout=15 add-flow br-int cookie=0x686f737400,priority=0,actions=NORMAL > /dev/null
    fi
    got=$(look 1 ovs-vsctl --timeout=15 --bare --columns=_uuid find Controller 'external_ids:hairpin-host="hv-1"')
    for one in $got; do ovs-vsctl --timeout=15 remove Bridge br-int controller "$one" > /dev/null; done
    got=$(look 1 ovs-vsctl --timeout=15 --bare --columns=_uuid find Manager 'external_ids:hairpin-host="hv-1"')
    for one in $got; do ovs-vsctl --timeout=15 remove Open_vSwitch . manager_options "$one" > /dev/null; done
    ovs-ofctl -O OpenFlow15 --timeout=15 del-flows br-int cookie=0x4850000000000000/0xffff000000000000 > /dev/null
    got=$(look 'match($0, /group_id=[0-9]+/) {id = substr($0, RSTART + 9, RLENGTH - 9) + 0; if (id >= 1213202432 && id <= 1213267967) print id}' ovs-ofctl -O OpenFlow15 --timeout=15 dump-groups br-int)
    for one in $got; do ovs-ofctl -O OpenFlow15 --timeout=15 del-groups br-int group_id="$one" > /dev/null; done
    got=$(look 1 ovs-vsctl --timeout=15 --bare --columns=name find Port 'external_ids:hairpin-host="hv-1"')
    for one in $got; do ovs-vsctl --timeout=15 --if-exists del-port br-int "$one" > /dev/null; done
    got=$(look 1 ovs-vsctl --timeout=15 --bare --columns=_uuid find SSL 'external_ids:hairpin-host="hv-1"')
    for one in $got; do ovs-vsctl --timeout=15 del-ssl > /dev/null; done
    got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-former-fail-mode)
    if [ "$got" = '' ]; then
        ovs-vsctl --timeout=15 remove Bridge br-int external_ids hairpin-host hairpin-former-fail-mode > /dev/null
    else
        got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-former-fail-mode)
        if [ "$got" = standalone ]; then
            ovs-vsctl --timeout=15 set Bridge br-int fail_mode=standalone -- remove Bridge br-int external_ids hairpin-host hairpin-former-fail-mode > /dev/null
        else
            ovs-vsctl --timeout=15 clear Bridge br-int fail_mode -- remove Bridge br-int external_ids hairpin-host hairpin-former-fail-mode > /dev/null
        fi
    fi
    echo 'bridge br-int is as it was'
fi
drop /etc/openvswitch/hairpin/ca.pem '[hairpin-host hv-1]'
[ -s /etc/openvswitch/hairpin/ca.pem.new ] || rm -f /etc/openvswitch/hairpin/ca.pem.new
drop /etc/openvswitch/hairpin/ca.pem.new '[hairpin-host hv-1]'
drop /etc/openvswitch/hairpin/host.pem '[hairpin-host hv-1]'
[ -s /etc/openvswitch/hairpin/host.pem.new ] || rm -f /etc/openvswitch/hairpin/host.pem.new
drop /etc/openvswitch/hairpin/host.pem.new '[hairpin-host hv-1]'
drop /etc/openvswitch/hairpin/host.key '[hairpin-host hv-1]'
[ -s /etc/openvswitch/hairpin/host.key.new ] || rm -f /etc/openvswitch/hairpin/host.key.new
drop /etc/openvswitch/hairpin/host.key.new '[hairpin-host hv-1]'
[ ! -d /etc/openvswitch/hairpin ] || rmdir --ignore-fail-on-non-empty /etc/openvswitch/hairpin
drop /var/lib/hairpin-host/hairpin-seed.yaml '[hairpin-host hv-1]'
[ -s /var/lib/hairpin-host/hairpin-seed.yaml.new ] || rm -f /var/lib/hairpin-host/hairpin-seed.yaml.new
drop /var/lib/hairpin-host/hairpin-seed.yaml.new '[hairpin-host hv-1]'
drop /var/lib/hairpin-host/hairpin.xml '[hairpin-host hv-1]'
[ -s /var/lib/hairpin-host/hairpin.xml.new ] || rm -f /var/lib/hairpin-host/hairpin.xml.new
drop /var/lib/hairpin-host/hairpin.xml.new '[hairpin-host hv-1]'
[ ! -d /var/lib/hairpin-host ] || rmdir --ignore-fail-on-non-empty /var/lib/hairpin-host
