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
got=$(look 1 ovs-vsctl --timeout=15 get Bridge br-int datapath_type)
if [ "$got" = netdev ]; then
    refuse 'bridge br-int has the userspace datapath, which never takes a VM'"'"'s tap again once the VM has ended' 'set `taps: kept` in host.yaml'
fi
got=$(look '/^\[\]$/ || /OpenFlow15/ {print "enough"}' ovs-vsctl --timeout=15 get Bridge br-int protocols)
if [ "$got" != enough ]; then
    refuse 'bridge br-int does not allow OpenFlow 1.5' 'ovs-vsctl add Bridge br-int protocols OpenFlow10,OpenFlow14,OpenFlow15'
fi
got=$(look '$2 == "br-int" {split($4, a, "/"); if (a[1] == "192.0.2.10") print}' ip -o addr show)
if [ "$got" != '' ]; then
    refuse '192.0.2.10 is an address of bridge br-int itself: after a restart of the host nothing passes there until the appliance is connected, and it could not connect' 'give the host an address on another network, and name it in host.yaml'
fi
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
if [ "$got" != hv-1/501308641d14 ]; then
    got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
    if [ "$got" != '' ]; then
        refuse 'bridge br-int is prepared already, by another plan or with other keys' 'name the folder of then by --keys; or `hairpin host restore` with the plan of then, and prepare it anew'
    fi
    got=$(look 1 ovs-vsctl --timeout=15 --bare --columns=private_key list SSL)
    if [ "$got" != '' ]; then
        refuse 'the switch has certificates already (`ovs-vsctl get-ssl`)' 'to use them, set `tls: existing` in host.yaml; they are left as they are'
    fi
    got=$(look '$1 == "hp-prev-a" || $1 == "hp-prev-b" || $1 == "hp-prev-c" || $1 == "hp-det-a" || $1 == "hp-det-b" || $1 == "hp-canary" {print; exit}' ovs-vsctl --timeout=15 --bare --columns=name list Interface)
    if [ "$got" != '' ]; then
        refuse 'there is a port of the name of a leg already' '`ovs-vsctl show`; remove or rename it'
    fi
    got=$(look '{sub(/[:@].*/, "", $2)} $2 == "hp-prev-a" || $2 == "hp-prev-b" || $2 == "hp-prev-c" || $2 == "hp-det-a" || $2 == "hp-det-b" || $2 == "hp-canary" {print $2; exit}' ip -o link show)
    if [ "$got" != '' ]; then
        refuse 'there is a network device of the name of a leg already' '`ip link`; remove or rename it'
    fi
    got=$(look '$1 == 65000 || $1 == 65001 || $1 == 65002 || $1 == 65004 || $1 == 65005 || $1 == 65008 {print; exit}' ovs-vsctl --timeout=15 --bare --columns=ofport,ofport_request list Interface)
    if [ "$got" != '' ]; then
        refuse 'a port has one of the numbers from 65000 on already' 'set firstOfport in host.yaml to another one, from 32768 on'
    fi
    got=$(look '$4 ~ /:6640$/ || $4 ~ /:6653$/ {print; exit}' ss -Hltn)
    if [ "$got" != '' ]; then
        refuse 'somebody listens at port 6640 or 6653 already' 'set ovsdbPort and openflowPort in host.yaml to others'
    fi
fi
[ -d /etc/openvswitch/hairpin ] || { (umask 022; mkdir -p /etc/openvswitch/hairpin); chown --reference=/etc/openvswitch/conf.db /etc/openvswitch/hairpin; }
rm -f /etc/openvswitch/hairpin/ca.pem.new
(set -C; cat > /etc/openvswitch/hairpin/ca.pem.new) <<'END-OF-HAIRPIN-FILE'
# [hairpin-host hv-1]
(CA certificate)
END-OF-HAIRPIN-FILE
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
[ ! -e /etc/openvswitch/hairpin/ca.pem ] || cmp -s /etc/openvswitch/hairpin/ca.pem.new /etc/openvswitch/hairpin/ca.pem || [ "$got" = hv-1/501308641d14 ] || { rm -f /etc/openvswitch/hairpin/ca.pem.new; refuse '/etc/openvswitch/hairpin/ca.pem is there already, with other contents' 'move it away, or run `hairpin host restore` if it is of an earlier plan'; }
chown -h --reference=/etc/openvswitch/conf.db /etc/openvswitch/hairpin/ca.pem.new
chmod 0644 /etc/openvswitch/hairpin/ca.pem.new
mv /etc/openvswitch/hairpin/ca.pem.new /etc/openvswitch/hairpin/ca.pem
rm -f /etc/openvswitch/hairpin/host.pem.new
(set -C; cat > /etc/openvswitch/hairpin/host.pem.new) <<'END-OF-HAIRPIN-FILE'
# [hairpin-host hv-1]
(host certificate)
END-OF-HAIRPIN-FILE
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
[ ! -e /etc/openvswitch/hairpin/host.pem ] || cmp -s /etc/openvswitch/hairpin/host.pem.new /etc/openvswitch/hairpin/host.pem || [ "$got" = hv-1/501308641d14 ] || { rm -f /etc/openvswitch/hairpin/host.pem.new; refuse '/etc/openvswitch/hairpin/host.pem is there already, with other contents' 'move it away, or run `hairpin host restore` if it is of an earlier plan'; }
chown -h --reference=/etc/openvswitch/conf.db /etc/openvswitch/hairpin/host.pem.new
chmod 0644 /etc/openvswitch/hairpin/host.pem.new
mv /etc/openvswitch/hairpin/host.pem.new /etc/openvswitch/hairpin/host.pem
rm -f /etc/openvswitch/hairpin/host.key.new
(set -C; cat > /etc/openvswitch/hairpin/host.key.new) <<'END-OF-HAIRPIN-FILE'
# [hairpin-host hv-1]
(host key)
END-OF-HAIRPIN-FILE
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
[ ! -e /etc/openvswitch/hairpin/host.key ] || cmp -s /etc/openvswitch/hairpin/host.key.new /etc/openvswitch/hairpin/host.key || [ "$got" = hv-1/501308641d14 ] || { rm -f /etc/openvswitch/hairpin/host.key.new; refuse '/etc/openvswitch/hairpin/host.key is there already, with other contents' 'move it away, or run `hairpin host restore` if it is of an earlier plan'; }
chown -h --reference=/etc/openvswitch/conf.db /etc/openvswitch/hairpin/host.key.new
chmod 0600 /etc/openvswitch/hairpin/host.key.new
mv /etc/openvswitch/hairpin/host.key.new /etc/openvswitch/hairpin/host.key
[ -d /var/lib/hairpin-host ] || { (umask 022; mkdir -p /var/lib/hairpin-host); }
rm -f /var/lib/hairpin-host/hairpin-seed.yaml.new
(set -C; cat > /var/lib/hairpin-host/hairpin-seed.yaml.new) <<'END-OF-HAIRPIN-FILE'
# [hairpin-host hv-1]
hairpin:
  name: hv-1
  management:
    mac: 02:dd:29:9d:d9:25
    address: 192.0.2.20/24
    gateway: 192.0.2.1
    dns:
    - 192.0.2.53
  api:
    token: an-api-token-of-more-than-32-characters
    certificate: |
      (API certificate)
    key: |
      (API key)
  lanes:
  - profile: prevent
    vlan: 3901
    legA:
      interface: hp-prev-a
      mac: 02:49:41:4f:da:96
    legB:
      interface: hp-prev-b
      mac: 02:33:45:ac:01:4d
    legC:
      interface: hp-prev-c
      mac: 02:4d:ee:79:d6:fe
  - profile: detect
    vlan: 3902
    legA:
      interface: hp-det-a
      mac: 02:8a:cd:7d:74:6a
    legB:
      interface: hp-det-b
      mac: 02:85:70:cf:d6:45
  canary:
    interface: hp-canary
    mac: 02:ef:32:53:bc:0b
  switch:
    bridge: br-int
    ovsdb: ssl:192.0.2.10:6640
    openflow: ssl:192.0.2.10:6653
    ca: |
      (CA certificate)
    certificate: |
      (our certificate)
    key: |
      (our key)
END-OF-HAIRPIN-FILE
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
[ ! -e /var/lib/hairpin-host/hairpin-seed.yaml ] || cmp -s /var/lib/hairpin-host/hairpin-seed.yaml.new /var/lib/hairpin-host/hairpin-seed.yaml || [ "$got" = hv-1/501308641d14 ] || { rm -f /var/lib/hairpin-host/hairpin-seed.yaml.new; refuse '/var/lib/hairpin-host/hairpin-seed.yaml is there already, with other contents' 'move it away, or run `hairpin host restore` if it is of an earlier plan'; }
chgrp libvirt-qemu /var/lib/hairpin-host/hairpin-seed.yaml.new
chmod 0640 /var/lib/hairpin-host/hairpin-seed.yaml.new
mv /var/lib/hairpin-host/hairpin-seed.yaml.new /var/lib/hairpin-host/hairpin-seed.yaml
rm -f /var/lib/hairpin-host/hairpin.xml.new
(set -C; cat > /var/lib/hairpin-host/hairpin.xml.new) <<'END-OF-HAIRPIN-FILE'
<!-- [hairpin-host hv-1] -->
<domain type="kvm">
  <name>hairpin</name>
  <uuid>e162b2c8-1dfc-5879-8c9c-e3327667dbb6</uuid>
  <memory unit="MiB">4096</memory>
  <vcpu>2</vcpu>
  <sysinfo type="fwcfg">
    <entry name="opt/io.systemd.credentials/hairpin.seed" file="/var/lib/hairpin-host/hairpin-seed.yaml" />
  </sysinfo>
  <os firmware="efi">
    <type arch="x86_64" machine="q35">hvm</type>
    <firmware>
      <feature enabled="yes" name="secure-boot" />
      <feature enabled="no" name="enrolled-keys" />
    </firmware>
  </os>
  <features>
    <acpi />
  </features>
  <cpu mode="host-passthrough" />
  <on_crash>restart</on_crash>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" />
      <source file="/var/lib/libvirt/images/hairpin.qcow2" />
      <target dev="vda" bus="virtio" />
    </disk>
    <interface type="bridge">
      <mac address="02:dd:29:9d:d9:25" />
      <source bridge="br-mgmt" />
      <model type="virtio" />
    </interface>
    <interface type="ethernet">
      <mac address="02:49:41:4f:da:96" />
      <target dev="hp-prev-a" />
      <model type="virtio" />
      <mtu size="1504" />
    </interface>
    <interface type="ethernet">
      <mac address="02:33:45:ac:01:4d" />
      <target dev="hp-prev-b" />
      <model type="virtio" />
      <mtu size="1504" />
    </interface>
    <interface type="ethernet">
      <mac address="02:4d:ee:79:d6:fe" />
      <target dev="hp-prev-c" />
      <model type="virtio" />
      <mtu size="1504" />
    </interface>
    <interface type="ethernet">
      <mac address="02:8a:cd:7d:74:6a" />
      <target dev="hp-det-a" />
      <model type="virtio" />
      <mtu size="1504" />
    </interface>
    <interface type="ethernet">
      <mac address="02:85:70:cf:d6:45" />
      <target dev="hp-det-b" />
      <model type="virtio" />
      <mtu size="1504" />
    </interface>
    <interface type="ethernet">
      <mac address="02:ef:32:53:bc:0b" />
      <target dev="hp-canary" />
      <model type="virtio" />
      <mtu size="1504" />
    </interface>
    <serial type="pty">
      <target port="0" />
    </serial>
    <console type="pty">
      <target type="serial" port="0" />
    </console>
    <rng model="virtio">
      <backend model="random">/dev/urandom</backend>
    </rng>
  </devices>
</domain>
END-OF-HAIRPIN-FILE
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
[ ! -e /var/lib/hairpin-host/hairpin.xml ] || cmp -s /var/lib/hairpin-host/hairpin.xml.new /var/lib/hairpin-host/hairpin.xml || [ "$got" = hv-1/501308641d14 ] || { rm -f /var/lib/hairpin-host/hairpin.xml.new; refuse '/var/lib/hairpin-host/hairpin.xml is there already, with other contents' 'move it away, or run `hairpin host restore` if it is of an earlier plan'; }
chmod 0600 /var/lib/hairpin-host/hairpin.xml.new
mv /var/lib/hairpin-host/hairpin.xml.new /var/lib/hairpin-host/hairpin.xml
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-host)
if [ "$got" = hv-1/501308641d14 ]; then
    echo 'the switch is prepared already'
else
    echo 'the ports come to life with the VM; that Open vSwitch can'"'"'t open them yet is right'
    got=$(look 1 ovs-vsctl --timeout=15 get-fail-mode br-int)
    if [ "$got" = secure ]; then
        ovs-vsctl --timeout=15 add-port br-int hp-prev-a tag=3901 -- set Port hp-prev-a protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-a ofport_request=65000 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:cb:dd:ac:9b:0a"' 'bfd:bfd_remote_dst_mac="02:cb:dd:ac:9b:0a"' -- add-port br-int hp-prev-b tag=3901 -- set Port hp-prev-b protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-b ofport_request=65001 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:cb:dd:ac:9b:0a"' 'bfd:bfd_remote_dst_mac="02:cb:dd:ac:9b:0a"' -- add-port br-int hp-prev-c tag=3901 -- set Port hp-prev-c protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-c ofport_request=65002 mtu_request=1504 -- add-port br-int hp-det-a tag=3902 -- set Port hp-det-a protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-det-a ofport_request=65004 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:c0:37:99:99:99"' 'bfd:bfd_remote_dst_mac="02:c0:37:99:99:99"' -- add-port br-int hp-det-b tag=3902 -- set Port hp-det-b protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-det-b ofport_request=65005 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:c0:37:99:99:99"' 'bfd:bfd_remote_dst_mac="02:c0:37:99:99:99"' -- add-port br-int hp-canary tag=3901 -- set Port hp-canary 'external_ids:hairpin-host="hv-1"' -- set Interface hp-canary ofport_request=65008 mtu_request=1504 -- --id=@ssl create SSL 'ca_cert="/etc/openvswitch/hairpin/ca.pem"' 'certificate="/etc/openvswitch/hairpin/host.pem"' 'private_key="/etc/openvswitch/hairpin/host.key"' 'external_ids:hairpin-host="hv-1"' -- set Open_vSwitch . ssl=@ssl -- --id=@manager create Manager 'target="pssl:6640:192.0.2.10"' 'external_ids:hairpin-host="hv-1"' -- add Open_vSwitch . manager_options @manager -- --id=@controller create Controller 'target="pssl:6653:192.0.2.10"' connection_mode=out-of-band 'external_ids:hairpin-host="hv-1"' -- add Bridge br-int controller @controller -- set Bridge br-int 'external_ids:hairpin-host="hv-1/501308641d14"' > /dev/null
    else
        got=$(look '/actions=/ && $0 !~ /^ *priority=0 actions=NORMAL *$/ {print; exit}' ovs-ofctl -O OpenFlow15 --timeout=15 --no-stats dump-flows br-int)
        if [ "$got" != '' ]; then
            refuse 'bridge br-int is not in fail mode secure, and has flows of its own: a change of the mode would lose them' '`ovs-vsctl set-fail-mode br-int secure`, add your flows again, then prepare'
        fi
        got=$(look '/group_id=/ {print; exit}' ovs-ofctl -O OpenFlow15 --timeout=15 dump-groups br-int)
        if [ "$got" != '' ]; then
            refuse 'bridge br-int is not in fail mode secure, and has flows of its own: a change of the mode would lose them' '`ovs-vsctl set-fail-mode br-int secure`, add your flows again, then prepare'
        fi
        got=$(look 1 ovs-vsctl --timeout=15 get-fail-mode br-int)
        if [ "$got" = standalone ]; then
            ovs-vsctl --timeout=15 add-port br-int hp-prev-a tag=3901 -- set Port hp-prev-a protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-a ofport_request=65000 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:cb:dd:ac:9b:0a"' 'bfd:bfd_remote_dst_mac="02:cb:dd:ac:9b:0a"' -- add-port br-int hp-prev-b tag=3901 -- set Port hp-prev-b protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-b ofport_request=65001 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:cb:dd:ac:9b:0a"' 'bfd:bfd_remote_dst_mac="02:cb:dd:ac:9b:0a"' -- add-port br-int hp-prev-c tag=3901 -- set Port hp-prev-c protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-c ofport_request=65002 mtu_request=1504 -- add-port br-int hp-det-a tag=3902 -- set Port hp-det-a protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-det-a ofport_request=65004 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:c0:37:99:99:99"' 'bfd:bfd_remote_dst_mac="02:c0:37:99:99:99"' -- add-port br-int hp-det-b tag=3902 -- set Port hp-det-b protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-det-b ofport_request=65005 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:c0:37:99:99:99"' 'bfd:bfd_remote_dst_mac="02:c0:37:99:99:99"' -- add-port br-int hp-canary tag=3901 -- set Port hp-canary 'external_ids:hairpin-host="hv-1"' -- set Interface hp-canary ofport_request=65008 mtu_request=1504 -- --id=@ssl create SSL 'ca_cert="/etc/openvswitch/hairpin/ca.pem"' 'certificate="/etc/openvswitch/hairpin/host.pem"' 'private_key="/etc/openvswitch/hairpin/host.key"' 'external_ids:hairpin-host="hv-1"' -- set Open_vSwitch . ssl=@ssl -- --id=@manager create Manager 'target="pssl:6640:192.0.2.10"' 'external_ids:hairpin-host="hv-1"' -- add Open_vSwitch . manager_options @manager -- --id=@controller create Controller 'target="pssl:6653:192.0.2.10"' connection_mode=out-of-band 'external_ids:hairpin-host="hv-1"' -- add Bridge br-int controller @controller -- set Bridge br-int 'external_ids:hairpin-host="hv-1/501308641d14"' -- set Bridge br-int fail_mode=secure external_ids:hairpin-former-fail-mode=standalone > /dev/null
            ovs-ofctl -O OpenFlow15 --timeout=15 add-flow br-int cookie=0x686f737400,priority=0,actions=NORMAL > /dev/null
        else
            ovs-vsctl --timeout=15 add-port br-int hp-prev-a tag=3901 -- set Port hp-prev-a protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-a ofport_request=65000 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:cb:dd:ac:9b:0a"' 'bfd:bfd_remote_dst_mac="02:cb:dd:ac:9b:0a"' -- add-port br-int hp-prev-b tag=3901 -- set Port hp-prev-b protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-b ofport_request=65001 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:cb:dd:ac:9b:0a"' 'bfd:bfd_remote_dst_mac="02:cb:dd:ac:9b:0a"' -- add-port br-int hp-prev-c tag=3901 -- set Port hp-prev-c protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-prev-c ofport_request=65002 mtu_request=1504 -- add-port br-int hp-det-a tag=3902 -- set Port hp-det-a protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-det-a ofport_request=65004 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:c0:37:99:99:99"' 'bfd:bfd_remote_dst_mac="02:c0:37:99:99:99"' -- add-port br-int hp-det-b tag=3902 -- set Port hp-det-b protected=true 'external_ids:hairpin-host="hv-1"' -- set Interface hp-det-b ofport_request=65005 mtu_request=1504 bfd:enable=true bfd:min_rx=50 bfd:min_tx=50 'bfd:bfd_local_dst_mac="02:c0:37:99:99:99"' 'bfd:bfd_remote_dst_mac="02:c0:37:99:99:99"' -- add-port br-int hp-canary tag=3901 -- set Port hp-canary 'external_ids:hairpin-host="hv-1"' -- set Interface hp-canary ofport_request=65008 mtu_request=1504 -- --id=@ssl create SSL 'ca_cert="/etc/openvswitch/hairpin/ca.pem"' 'certificate="/etc/openvswitch/hairpin/host.pem"' 'private_key="/etc/openvswitch/hairpin/host.key"' 'external_ids:hairpin-host="hv-1"' -- set Open_vSwitch . ssl=@ssl -- --id=@manager create Manager 'target="pssl:6640:192.0.2.10"' 'external_ids:hairpin-host="hv-1"' -- add Open_vSwitch . manager_options @manager -- --id=@controller create Controller 'target="pssl:6653:192.0.2.10"' connection_mode=out-of-band 'external_ids:hairpin-host="hv-1"' -- add Bridge br-int controller @controller -- set Bridge br-int 'external_ids:hairpin-host="hv-1/501308641d14"' -- set Bridge br-int fail_mode=secure external_ids:hairpin-former-fail-mode=unset > /dev/null
            ovs-ofctl -O OpenFlow15 --timeout=15 add-flow br-int cookie=0x686f737400,priority=0,actions=NORMAL > /dev/null
        fi
    fi
fi
got=$(look 1 ovs-vsctl --timeout=15 --if-exists get Bridge br-int external_ids:hairpin-former-fail-mode)
if [ "$got" != '' ]; then
    ovs-ofctl -O OpenFlow15 --timeout=15 add-flow br-int cookie=0x686f737400,priority=0,actions=NORMAL > /dev/null
fi
tries=0 got=$(look '$4 ~ /:6640$/ {print; exit}' ss -Hltn)
until [ -n "$got" ]; do
    tries=$((tries + 1))
    [ $tries -lt 50 ] || refuse 'nobody listens at port 6640, although the switch was told to' 'see the log of Open vSwitch; is the address in host.yaml one of this host'"'"'s? Then run this again'
    sleep 0.2
    got=$(look '$4 ~ /:6640$/ {print; exit}' ss -Hltn)
done
tries=0 got=$(look '$4 ~ /:6653$/ {print; exit}' ss -Hltn)
until [ -n "$got" ]; do
    tries=$((tries + 1))
    [ $tries -lt 50 ] || refuse 'nobody listens at port 6653, although the switch was told to' 'see the log of Open vSwitch; is the address in host.yaml one of this host'"'"'s? Then run this again'
    sleep 0.2
    got=$(look '$4 ~ /:6653$/ {print; exit}' ss -Hltn)
done
echo 'next: virsh define /var/lib/hairpin-host/hairpin.xml && virsh start hairpin'
echo 'prepared: OVSDB at pssl:6640:192.0.2.10, OpenFlow at pssl:6653:192.0.2.10'
