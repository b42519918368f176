"""Do the legs carry what VMs send: a frame too long for its lane is lost, and no sender is told. Pure.

docs/mtu.md has the rules and what they were measured by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from steering.compile import find_vms_in_scope
from steering.membership import build_membership
from steering.model import Inspect, Lane, Machine, PolicySet

TAG_BYTES = 4  # of the lane's VLAN


def find_width_problems(
    policies: PolicySet,
    machines: Sequence[Machine],
    lanes: Iterable[Lane],
    mtus: Mapping[str, int],
    *,
    super_packets: bool,
) -> tuple[str, ...]:
    """A sentence for each leg that loses what VMs send that a policy inspects.

    ``mtus`` in bytes, by interface; one that is not in it is not judged. ``super_packets``: with
    `userspace-tso-enable` the switch cuts them to the leg's MTU, so a leg may carry too much, too.
    """
    inspecting = tuple(one for one in policies.policies if isinstance(one.action, Inspect))
    named = find_vms_in_scope(
        PolicySet(policies.machines, policies.zones, inspecting),
        build_membership(policies.zones, machines),
    )
    ports = sorted(
        (mtus[port.interface], port.interface)
        for machine in machines
        for port in machine.ports
        if machine.vm_id in named and port.interface in mtus
    )
    if not ports:
        return ()
    legs = [leg.interface for lane in lanes for leg in lane.legs]
    return tuple(_find_problems([one for one in legs if one in mtus], ports, mtus, super_packets))


def _find_problems(
    legs: Sequence[str],
    ports: Sequence[tuple[int, str]],
    mtus: Mapping[str, int],
    super_packets: bool,
) -> Iterator[str]:
    (least, narrow), (most, wide) = ports[0], ports[-1]
    wanted = most + TAG_BYTES
    for leg in legs:
        carries = mtus[leg]
        if carries < most:
            yield (
                f"leg {leg} carries {carries} bytes, VM port {wide} sends up to {most}: larger frames "
                f"of inspected pairs are lost; `ip link set dev {leg} mtu {wanted}`, and the same for "
                "its device in the service host"
            )
        elif super_packets and carries > least + TAG_BYTES:
            yield (
                f"leg {leg} carries {carries} bytes, VM port {narrow} takes {least}: with "
                "userspace-tso-enable super-packets of inspected pairs are cut too long for it and "
                f"lost; `ip link set dev {leg} mtu {least + TAG_BYTES}`, and the same for its device "
                "in the service host"
            )
