"""The management network of a lab whose service host is a VM: a bridge of the hypervisor's, apart from the switch."""

from __future__ import annotations

from appliance.lab.network import open_namespace, set_up
from appliance.lab.plan import HOST_ADDRESS, MANAGER_ADDRESS, LabState
from appliance.lab.vm_plan import (
    MANAGEMENT_BRIDGE,
    MANAGEMENT_TAP,
    MANAGER_DEVICE,
    MANAGER_PORT,
)
from steering.run import run


def create_management_network(state: LabState) -> None:
    """The hypervisor, the VM's tap and the manager's namespace on one bridge; nobody else gets there."""
    run(
        ["ip", "netns", "exec", state.hypervisor, "ip", "tuntap", "add", "dev", MANAGEMENT_TAP,
         "mode", "tap", "vnet_hdr"]
    )  # fmt: skip
    with open_namespace(state.hypervisor) as link:
        link.link("add", ifname=MANAGEMENT_BRIDGE, kind="bridge", state="up")
        (bridge,) = link.link_lookup(ifname=MANAGEMENT_BRIDGE)
        peer = {"ifname": MANAGER_DEVICE, "net_ns_fd": state.manager}
        link.link("add", ifname=MANAGER_PORT, kind="veth", peer=peer)
        for name in (MANAGEMENT_TAP, MANAGER_PORT):
            (index,) = link.link_lookup(ifname=name)
            link.link("set", index=index, master=bridge, state="up")
        link.addr("add", index=bridge, address=HOST_ADDRESS, prefixlen=24)
    set_up(state.manager, MANAGER_DEVICE)
    with open_namespace(state.manager) as link:
        (index,) = link.link_lookup(ifname=MANAGER_DEVICE)
        link.addr("add", index=index, address=MANAGER_ADDRESS, prefixlen=24)
