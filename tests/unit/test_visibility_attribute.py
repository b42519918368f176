"""Which VMs a flow was between."""

from __future__ import annotations

from appliance.visibility.attribute import AttributedFlow, Evidence, attribute_flow, attribute_flows
from appliance.visibility.record import FlowRecord, build_record
from steering.model import Holding, Machine, Port
from tests.unit.test_visibility_record import metered

START, END = 1_700_000_000.25, 1_700_000_001.5
RECORD = build_record(metered())


def machine(name: str, *macs: str) -> Machine:
    ports = tuple(
        Port(f"tap-{name}{n}", n, mac, f"if-{name}{n}", f"id-{name}", "br0")
        for n, mac in enumerate(macs)
    )
    return Machine(f"id-{name}", name, {}, (f"zone-{name}",), ports)


WEB = machine("web", "02:00:00:00:00:99", "02:00:00:00:00:0A")
DB = machine("db", "02:00:00:00:00:0b")


def ends(flow: AttributedFlow) -> tuple[object, object]:
    return tuple(
        None if end is None else (end.name, str(end.evidence)) for end in (flow.src, flow.dst)
    )  # type: ignore[return-value]


def test_by_mac_whatever_its_case_and_on_whichever_port() -> None:
    flow = attribute_flow(RECORD, [WEB, DB], [])
    assert ends(flow) == (("web", "mac"), ("db", "mac"))
    assert flow.src is not None
    assert flow.src.zones == ("zone-web",)


def test_the_mac_outweighs_the_address() -> None:
    held = [Holding("10.0.0.1", "id-db", 0)]
    assert ends(attribute_flow(RECORD, [WEB, DB], held))[0] == ("web", "mac")


def test_by_address_behind_a_router() -> None:
    routed = RECORD.model_copy(update={"src_mac": "02:ff:ff:ff:ff:ff"})
    flow = attribute_flow(routed, [WEB, DB], [Holding("10.0.0.1", "id-web", 0)])
    assert ends(flow) == (("web", "address"), ("db", "mac"))


def test_a_mac_that_two_vms_claim_proves_nothing() -> None:
    twin = machine("twin", "02:00:00:00:00:0a")
    held = [Holding("10.0.0.1", "id-twin", 0)]
    assert ends(attribute_flow(RECORD, [WEB, twin, DB], []))[0] is None
    assert ends(attribute_flow(RECORD, [WEB, twin, DB], held))[0] == ("twin", "address")


def by_address(*held: Holding) -> object:
    return ends(attribute_flow(RECORD, [machine("web"), machine("db")], held))[0]


def test_an_address_that_changed_hands_is_whose_it_was_at_the_start() -> None:
    before = Holding("10.0.0.1", "id-web", START - 100, START + 0.5)
    after = Holding("10.0.0.1", "id-db", START + 0.5)
    assert by_address(after, before) == ("web", "address")


def test_an_address_first_seen_during_the_flow_counts() -> None:
    assert by_address(Holding("10.0.0.1", "id-db", END)) == ("db", "address")


def test_an_address_held_only_before_or_after_does_not() -> None:
    assert by_address(Holding("10.0.0.1", "id-web", 0, START)) is None
    assert by_address(Holding("10.0.0.1", "id-web", END + 0.1)) is None
    assert by_address(Holding("10.0.0.9", "id-web", 0)) is None


def test_a_vm_that_has_gone_keeps_its_id() -> None:
    flow = attribute_flow(RECORD, [], [Holding("10.0.0.2", "id-gone", 0)])
    assert flow.src is None
    assert flow.dst is not None
    assert (flow.dst.vm_id, flow.dst.name, flow.dst.zones) == ("id-gone", "id-gone", ())
    assert flow.dst.evidence is Evidence.ADDRESS


def test_many_records_keep_their_order() -> None:
    records: list[FlowRecord] = [RECORD.model_copy(update={"src_port": port}) for port in range(50)]
    flows = attribute_flows(records, [WEB, DB], [])
    assert [flow.record for flow in flows] == records
