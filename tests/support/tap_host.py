"""Run inside a network namespace of its own: a host with Open vSwitch's userspace datapath, prepared with kept taps.

A process stands for the VM: it opens a leg's tap, as QEMU does, sends frames, and ends. Prints JSON.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

from appliance.cli import run_cli
from tests.support.host_specs import render_local_spec

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 0x2, 0x1000, 0x4000  # linux/if_tun.h
FRAME = bytes.fromhex("ffffffffffff0200000000010806") + bytes(46)


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout


def live_once(frames: int) -> None:
    """One life of the VM."""
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(
        tap, TUNSETIFF, struct.pack("16sH22x", b"hp-prev-a", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
    )
    time.sleep(0.3)
    for _ in range(frames):
        os.write(tap, bytes(10) + FRAME)
    time.sleep(0.5)
    os.close(tap)


def main(directory: Path) -> None:
    os.environ |= {name: str(directory) for name in ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR")}
    run("ip", "link", "set", "lo", "up")
    run("ovsdb-tool", "create", f"{directory}/conf.db", "/usr/share/openvswitch/vswitch.ovsschema")
    daemon = ("--detach", "--no-chdir", "--log-file", "-vconsole:off")
    try:
        run(
            "ovsdb-server", f"{directory}/conf.db", f"--remote=punix:{directory}/db.sock",
            "--remote=db:Open_vSwitch,Open_vSwitch,manager_options",
            "--private-key=db:Open_vSwitch,SSL,private_key",
            "--certificate=db:Open_vSwitch,SSL,certificate",
            "--bootstrap-ca-cert=db:Open_vSwitch,SSL,ca_cert",
            f"--pidfile={directory}/db.pid", *daemon,
        )  # fmt: skip
        run("ovs-vsctl", "--no-wait", "init")
        run(
            "ovs-vswitchd", f"unix:{directory}/db.sock", "--disable-system",
            f"--pidfile={directory}/vs.pid", *daemon,
        )  # fmt: skip
        run(
            "ovs-vsctl",
            "add-br",
            "br-test",
            "--",
            "set",
            "Bridge",
            "br-test",
            "datapath_type=netdev",
        )
        spec, argv = directory / "host.yaml", ["--apply"]
        spec.write_text(render_local_spec(directory, "br-test", 26640, 26653))
        keys = ["--keys", str(directory / "keys")]
        refused = run_cli(["host", "prepare", str(spec), *keys, *argv])
        spec.write_text(spec.read_text() + "taps: kept\n")
        prepared = run_cli(["host", "prepare", str(spec), *keys, *argv])
        told = run("ovs-vsctl", "get", "Interface", "hp-prev-a", "ofport", "mtu").split()
        run("ovs-ofctl", "add-flow", "br-test", "priority=9,in_port=65000,arp,actions=drop")
        counts = []
        for _ in range(3):
            live_once(5)
            shown = run("ovs-ofctl", "dump-flows", "br-test", "in_port=65000,arp")
            counts.append(int(shown.split("n_packets=")[1].split(",")[0]))
        run("ovs-ofctl", "del-flows", "br-test", "in_port=65000,arp")
        again = run_cli(["host", "prepare", str(spec), *keys, *argv])
        restored = run_cli(["host", "restore", str(spec), *argv])
        left = [name for name in os.listdir("/sys/class/net") if name.startswith("hp-")]
        statuses = [refused, prepared, again, restored]
        print(json.dumps({"statuses": statuses, "told": told, "counts": counts, "left": left}))
    finally:
        for name in ("vs.pid", "db.pid"):
            if (directory / name).exists():
                run("kill", (directory / name).read_text().strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
