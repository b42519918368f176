"""From a host's spec to what is done on it, and how that is taken back. Pure.

All that is made carries the host's name in its ``external_ids``, and what was changed its former value in the
bridge's: the switch's own database is the record, so any machine can take it back. All of it is one transaction.
The ports are made for good, before the VM's taps are there: libvirt's `<virtualport type='openvswitch'>` would
delete a port with its tag, BFD and protection whenever the VM ends, so the VM's interfaces are of type `ethernet`.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.hosting.ops import (
    Await,
    Drop,
    Each,
    Folder,
    HostPlan,
    Look,
    Op,
    Put,
    Refuse,
    Run,
    Say,
    When,
    join,
)
from appliance.hosting.pki import Pki
from appliance.hosting.spec import (
    TAG_BYTES,
    HostSpec,
    LegPort,
    build_digest,
    domain_path,
    render_listener,
    seed_path,
)
from steering.pipeline import COOKIE_MASK, COOKIE_PREFIX, GROUP_MASK, GROUP_PREFIX

MARK = "hairpin-host"
FORMER = "hairpin-former-fail-mode"
BASE_COOKIE = 0x68_6F73_7400  # "host": not one of Hairpin's own, so it leaves the flow alone
BASE_FLOW = f"cookie={BASE_COOKIE:#x},priority=0,actions=NORMAL"
VSCTL = ("ovs-vsctl", "--timeout=15")
OFCTL = ("ovs-ofctl", "-O", "OpenFlow15", "--timeout=15")
LISTEN_SECONDS = 10
FILES = ("ca.pem", "host.pem", "host.key")

# Lines of `dump-flows --no-stats` that are neither Hairpin's own nor the plain one that it added.
_FOREIGN = (
    f"/actions=/ && !/cookie=0x{COOKIE_PREFIX:x}{'[0-9a-f]' * 12}[ ,]/ && !/cookie={BASE_COOKIE:#x}[ ,]/ "
    "{print; exit}"
)
_NOT_PLAIN = "/actions=/ && $0 !~ /^ *priority=0 actions=NORMAL *$/ {print; exit}"
_EACH_GROUP = "match($0, /group_id=[0-9]+/) {id = substr($0, RSTART + 9, RLENGTH - 9) + 0; "
_IS_OURS = f"id >= {GROUP_PREFIX} && id <= {GROUP_PREFIX | ~GROUP_MASK & 0xFFFF_FFFF}"
_OUR_GROUPS = f"{_EACH_GROUP}if ({_IS_OURS}) print id}}"
_FOREIGN_GROUPS = f"{_EACH_GROUP}if (!({_IS_OURS})) {{print; exit}}}}"


def build_restore_plan(spec: HostSpec) -> HostPlan:
    """Only what takes it back, which needs no keys."""
    return HostPlan(_build_title(spec), (), _build_restore(spec, _look_mark(spec)))


def _build_title(spec: HostSpec) -> str:
    return f"Hairpin on {spec.name}, bridge {spec.bridge}"


def _build_sign(spec: HostSpec) -> str:
    """In the first line of each file, so that none of others is taken for one of ours."""
    return f"[{MARK} {spec.name}]"


def _look_mark(spec: HostSpec) -> Look:
    return Look((*VSCTL, "--if-exists", "get", "Bridge", spec.bridge, f"external_ids:{MARK}"))


def build_plan(
    spec: HostSpec, ports: Sequence[LegPort], pki: Pki | None, domain: str, seed: str
) -> HostPlan:
    """``pki`` None: the switch has certificates already (`tls: existing`).

    ``domain`` and ``seed`` are put where libvirt is then told of them.
    """
    mark = _look_mark(spec)
    ours = f"{spec.name}/{build_digest(spec, pki.ca.certificate if pki else '')}"
    files = _build_files(spec, pki, mark, ours)
    return HostPlan(
        _build_title(spec),
        (
            *_build_checks(spec),
            When(mark, ours, otherwise=(
                When(mark, "", otherwise=(
                    Refuse(
                        f"bridge {spec.bridge} is prepared already, by another plan or with other keys",
                        "name the folder of then by --keys; or `hairpin host restore` with the plan of then, and "
                        "prepare it anew",
                    ),
                )),
                *_build_demands(spec, ports, pki),
            )),
            *files,
            *_build_vm_files(spec, mark, ours, domain, seed),
            When(mark, ours, then=(Say("the switch is prepared already"),), otherwise=(
                Say("the ports come to life with the VM; that Open vSwitch can't open them yet is right"),
                *_build_change(spec, ports, pki, ours),
            )),
            *_build_taps(spec, ports),
            # Also after a restart of the switch, which loses it.
            When(_look_former(spec), "", otherwise=(_add_base(spec),)),
            _await_listening(spec.ovsdb_port),
            _await_listening(spec.openflow_port),
            Say(f"next: virsh define {domain_path(spec)} && virsh start {spec.vm.name}"),
            Say(f"prepared: OVSDB at {render_listener(spec, spec.ovsdb_port)}, "
                f"OpenFlow at {render_listener(spec, spec.openflow_port)}"),
        ),
        _build_restore(spec, mark),
    )  # fmt: skip


def _refuse_unless(look: Look, equals: str, reason: str, mend: str) -> Op:
    return When(look, equals, otherwise=(Refuse(reason, mend),))


def _refuse_if_any(look: Look, reason: str, mend: str) -> Op:
    return _refuse_unless(look, "", reason, mend)


def _check_bridge(bridge: str) -> Op:
    return _refuse_unless(
        Look((*VSCTL, "--bare", "--columns=name", "find", "Bridge", f"name={bridge}")),
        bridge,
        f"there is no bridge {bridge}",
        "correct bridge in host.yaml; run this on the host itself",
    )


def _build_checks(spec: HostSpec) -> tuple[Op, ...]:
    bridge = spec.bridge
    return (
        _check_bridge(bridge),
        *(
            ()
            if spec.taps == "kept"
            else (
                When(
                    Look((*VSCTL, "get", "Bridge", bridge, "datapath_type")),
                    "netdev",
                    then=(
                        Refuse(
                            f"bridge {bridge} has the userspace datapath, which never takes a VM's tap again once "
                            "the VM has ended",
                            "set `taps: kept` in host.yaml",
                        ),
                    ),
                ),
            )
        ),
        _refuse_unless(
            Look(
                (*VSCTL, "get", "Bridge", bridge, "protocols"),
                '/^\\[\\]$/ || /OpenFlow15/ {print "enough"}',
            ),
            "enough",
            f"bridge {bridge} does not allow OpenFlow 1.5",
            f"ovs-vsctl add Bridge {bridge} protocols OpenFlow10,OpenFlow14,OpenFlow15",
        ),
        _refuse_if_any(
            Look(
                ("ip", "-o", "addr", "show"),
                f'$2 == "{bridge}" {{split($4, a, "/"); if (a[1] == "{spec.address}") print}}',
            ),
            f"{spec.address} is an address of bridge {bridge} itself: after a restart of the host nothing "
            "passes there until the appliance is connected, and it could not connect",
            "give the host an address on another network, and name it in host.yaml",
        ),
    )


def _build_demands(spec: HostSpec, ports: Sequence[LegPort], pki: Pki | None) -> tuple[Op, ...]:
    """What a plan that was never carried out must find free."""
    names = " || ".join(f'$1 == "{port.interface}"' for port in ports)
    numbers = " || ".join(f"$1 == {port.ofport}" for port in ports)
    listen = " || ".join(f"$4 ~ /:{port}$/" for port in (spec.ovsdb_port, spec.openflow_port))
    rows = Look((*VSCTL, "--bare", "--columns=private_key", "list", "SSL"))
    tls: Op
    if pki is not None:
        tls = _refuse_if_any(
            rows,
            "the switch has certificates already (`ovs-vsctl get-ssl`)",
            "to use them, set `tls: existing` in host.yaml; they are left as they are",
        )
    else:
        tls = When(rows, "", then=(
            Refuse("the switch has no certificates", "set `tls: issue` in host.yaml"),
        ))  # fmt: skip
    return (
        tls,
        _refuse_if_any(
            Look(
                (*VSCTL, "--bare", "--columns=name", "list", "Interface"),
                f"{names} {{print; exit}}",
            ),
            "there is a port of the name of a leg already",
            "`ovs-vsctl show`; remove or rename it",
        ),
        _refuse_if_any(
            _look_devices(names.replace("$1", "$2")),
            "there is a network device of the name of a leg already",
            "`ip link`; remove or rename it",
        ),
        _refuse_if_any(
            Look(
                (*VSCTL, "--bare", "--columns=ofport,ofport_request", "list", "Interface"),
                f"{numbers} {{print; exit}}",
            ),
            f"a port has one of the numbers from {spec.first_ofport} on already",
            "set firstOfport in host.yaml to another one, from 32768 on",
        ),
        _refuse_if_any(
            Look(("ss", "-Hltn"), f"{listen} {{print; exit}}"),
            f"somebody listens at port {spec.ovsdb_port} or {spec.openflow_port} already",
            "set ovsdbPort and openflowPort in host.yaml to others",
        ),
    )


def _build_files(spec: HostSpec, pki: Pki | None, mark: Look, ours: str) -> tuple[Op, ...]:
    if pki is None:
        return ()
    issued = (pki.ca.certificate, pki.host.certificate, pki.host.key)
    texts = (f"# {_build_sign(spec)}\n{text}" for text in issued)  # OpenSSL reads from BEGIN on
    return (
        Folder(spec.directory, spec.ovs_database),
        *(
            Put(
                f"{spec.directory}/{name}",
                0o600 if name.endswith(".key") else 0o644,
                text,
                like=spec.ovs_database,
                ours=mark,
                equals=ours,
            )
            for name, text in zip(FILES, texts, strict=True)
        ),
    )


def _build_change(
    spec: HostSpec, ports: Sequence[LegPort], pki: Pki | None, ours: str
) -> tuple[Op, ...]:
    """With the fail mode the switch loses all flows and groups, so only a plain bridge is changed."""
    fail = Look((*VSCTL, "get-fail-mode", spec.bridge))
    flows = Look((*OFCTL, "--no-stats", "dump-flows", spec.bridge), _NOT_PLAIN)
    groups = Look((*OFCTL, "dump-groups", spec.bridge), "/group_id=/ {print; exit}")
    reason = (
        f"bridge {spec.bridge} is not in fail mode secure, and has flows of its own: a change of the mode "
        "would lose them"
    )
    mend = f"`ovs-vsctl set-fail-mode {spec.bridge} secure`, add your flows again, then prepare"

    def change(former: str) -> tuple[Op, ...]:
        run = Run((*VSCTL, *join(_build_transaction(spec, ports, pki, ours, former))))
        return (run, _add_base(spec)) if former else (run,)

    return (
        When(fail, "secure", then=change(""), otherwise=(
            _refuse_if_any(flows, reason, mend),
            _refuse_if_any(groups, reason, mend),
            When(fail, "standalone", then=change("standalone"), otherwise=change("unset")),
        )),
    )  # fmt: skip


def _build_transaction(
    spec: HostSpec, ports: Sequence[LegPort], pki: Pki | None, ours: str, former: str
) -> list[tuple[str, ...]]:
    name = f'external_ids:{MARK}="{spec.name}"'
    parts = [part for port in ports for part in _build_port(spec, port, name)]
    if pki is not None:
        paths = [f'"{spec.directory}/{one}"' for one in FILES]
        parts += [
            (
                "--id=@ssl", "create", "SSL", f"ca_cert={paths[0]}", f"certificate={paths[1]}",
                f"private_key={paths[2]}", name,
            ),
            ("set", "Open_vSwitch", ".", "ssl=@ssl"),
        ]  # fmt: skip
    parts += [
        (
            "--id=@manager", "create", "Manager",
            f'target="{render_listener(spec, spec.ovsdb_port)}"', name,
        ),
        ("add", "Open_vSwitch", ".", "manager_options", "@manager"),
        (
            "--id=@controller", "create", "Controller",
            f'target="{render_listener(spec, spec.openflow_port)}"', "connection_mode=out-of-band", name,
        ),
        ("add", "Bridge", spec.bridge, "controller", "@controller"),
        ("set", "Bridge", spec.bridge, f'external_ids:{MARK}="{ours}"'),
    ]  # fmt: skip
    if former:
        parts.append(
            ("set", "Bridge", spec.bridge, "fail_mode=secure", f"external_ids:{FORMER}={former}")
        )
    return parts


def _build_port(spec: HostSpec, port: LegPort, name: str) -> list[tuple[str, ...]]:
    """Why the tag, the protection and BFD: docs/lab.md. The canary's port must not be protected."""
    settings = ["set", "Interface", port.interface, f"ofport_request={port.ofport}"]
    settings.append(f"mtu_request={spec.vm_mtu + TAG_BYTES}")
    if port.bfd_mac:
        settings += ["bfd:enable=true", f"bfd:min_rx={spec.bfd_milliseconds}"]
        settings.append(f"bfd:min_tx={spec.bfd_milliseconds}")
        settings += [f'bfd:bfd_{end}_dst_mac="{port.bfd_mac}"' for end in ("local", "remote")]
    protected = () if port.profile is None else ("protected=true",)
    return [
        ("add-port", spec.bridge, port.interface, f"tag={port.vlan}"),
        ("set", "Port", port.interface, *protected, name),
        tuple(settings),
    ]


def _look_former(spec: HostSpec) -> Look:
    return Look((*VSCTL, "--if-exists", "get", "Bridge", spec.bridge, f"external_ids:{FORMER}"))


def _add_base(spec: HostSpec) -> Op:
    """The bridge goes on switching as it did, whatever becomes of Hairpin."""
    return Run((*OFCTL, "add-flow", spec.bridge, BASE_FLOW))


def _await_listening(port: int) -> Op:
    return Await(
        Look(("ss", "-Hltn"), f"$4 ~ /:{port}$/ {{print; exit}}"),
        LISTEN_SECONDS,
        f"nobody listens at port {port}, although the switch was told to",
        "see the log of Open vSwitch; is the address in host.yaml one of this host's? Then run this again",
    )


def _build_taps(spec: HostSpec, ports: Sequence[LegPort]) -> tuple[Op, ...]:
    """What a restart of the host loses, so this is looked at each time."""
    if spec.taps != "kept":
        return ()
    return tuple(
        op
        for port in ports
        for op in (
            When(_look_device(port.interface), "", then=(
                Run(("ip", "tuntap", "add", "dev", port.interface, "mode", "tap", "vnet_hdr")),
            )),
            Run((
                "ip", "link", "set", "dev", port.interface, "mtu", str(spec.vm_mtu + TAG_BYTES), "up",
            )),
        )
    )  # fmt: skip


def _look_device(name: str) -> Look:
    return _look_devices(f'$2 == "{name}"')


def _look_devices(condition: str) -> Look:
    """Not by /sys, which may be another network namespace's."""
    return Look(
        ("ip", "-o", "link", "show"), f'{{sub(/[:@].*/, "", $2)}} {condition} {{print $2; exit}}'
    )


def _build_vm_files(
    spec: HostSpec, mark: Look, ours: str, domain: str, seed: str
) -> tuple[Op, ...]:
    def put(path: str, text: str, group: str = "") -> Op:
        return Put(path, 0o640 if group else 0o600, text, group=group, ours=mark, equals=ours)

    return (
        Folder(spec.vm_directory),
        put(seed_path(spec), f"# {_build_sign(spec)}\n{seed}", spec.vm.qemu_group),
        put(domain_path(spec), f"<!-- {_build_sign(spec)} -->\n{domain}"),
    )


def _build_restore(spec: HostSpec, mark: Look) -> tuple[Op, ...]:
    bridge = spec.bridge
    former = _look_former(spec)
    sign = _build_sign(spec)
    owner = Look(mark.argv, '{sub(/^"/, ""); sub(/\\/.*/, ""); print}')

    def find(table: str, column: str = "_uuid") -> Look:
        where = f'external_ids:{MARK}="{spec.name}"'
        return Look((*VSCTL, "--bare", f"--columns={column}", "find", table, where))

    def forget(*change: str) -> tuple[Op, ...]:
        parts = [("set", "Bridge", bridge, *change)] if change else []
        parts.append(("remove", "Bridge", bridge, "external_ids", MARK, FORMER))
        return (Run((*VSCTL, *join(parts))),)

    unset: tuple[Op, ...] = (
        Run((*VSCTL, *join([
            ("clear", "Bridge", bridge, "fail_mode"),
            ("remove", "Bridge", bridge, "external_ids", MARK, FORMER),
        ]))),
    )  # fmt: skip
    back: tuple[Op, ...] = (
        # With the fail mode, which is put back at the end, the switch loses all flows.
        When(former, "", otherwise=(
            _refuse_if_any(
                Look((*OFCTL, "--no-stats", "dump-flows", bridge), _FOREIGN),
                f"bridge {bridge} has flows of others by now, which would be lost with the fail mode",
                "keep them, delete them, and add them again afterwards",
            ),
            _refuse_if_any(
                Look((*OFCTL, "dump-groups", bridge), _FOREIGN_GROUPS),
                f"bridge {bridge} has groups of others by now, which would be lost with the fail mode",
                "keep them, delete them, and add them again afterwards",
            ),
            _add_base(spec),
        )),
        # First the listeners, so that an appliance which still runs does not put back what goes.
        Each(find("Controller"), (*VSCTL, "remove", "Bridge", bridge, "controller", "{}")),
        Each(find("Manager"), (*VSCTL, "remove", "Open_vSwitch", ".", "manager_options", "{}")),
        Run((*OFCTL, "del-flows", bridge, f"cookie={COOKIE_PREFIX << 48:#x}/{COOKIE_MASK:#x}")),
        Each(
            Look((*OFCTL, "dump-groups", bridge), _OUR_GROUPS),
            (*OFCTL, "del-groups", bridge, "group_id={}"),
        ),
        *(
            (Each(find("Port", "name"), ("ip", "link", "del", "dev", "{}")),)
            if spec.taps == "kept"
            else ()
        ),
        Each(find("Port", "name"), (*VSCTL, "--if-exists", "del-port", bridge, "{}")),
        Each(find("SSL"), (*VSCTL, "del-ssl")),
        When(former, "", then=forget(), otherwise=(
            When(former, "standalone", then=forget("fail_mode=standalone"), otherwise=unset),
        )),
        Say(f"bridge {bridge} is as it was"),
    )  # fmt: skip
    return (
        _check_bridge(bridge),
        When(mark, "", then=(Say(f"bridge {bridge} is not prepared"),), otherwise=(
            When(owner, spec.name, otherwise=(
                Refuse(f"bridge {bridge} was prepared for another host's plan", "use that plan"),
            )),
            *back,
        )),
        *(
            (Drop(tuple(f"{spec.directory}/{one}" for one in FILES), spec.directory, sign),)
            if spec.tls == "issue"
            else ()
        ),
        Drop((seed_path(spec), domain_path(spec)), spec.vm_directory, sign),
    )  # fmt: skip
