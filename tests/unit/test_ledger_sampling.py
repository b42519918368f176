"""Which witnesses a run takes: what changed first, every port in both roles, and in time every pair."""

from __future__ import annotations

from dataclasses import replace

from steering.decide import resolve_machines
from steering.model import (
    Deny,
    Family,
    Inspect,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Port,
    PortRange,
    Profile,
    Protocol,
    Service,
)
from steering.sampling import Sample, choose_witnesses
from steering.witnesses import Fragment, build_cases, find_witness_ports, render_entry
from tests.support.worlds import LANES, ZONES, build_port, build_record

BOTH = (Family.IPV4, Family.IPV6)


def build_policy(name: str, priority: int, source: str, destination: str, *ports: int) -> Policy:
    service = Service(Protocol.TCP, tuple(PortRange(port, port) for port in ports))
    action = Inspect(Profile.PREVENT, OnFailure.OPEN)
    ends = (Peer(zone=source),), (Peer(zone=destination),)
    return Policy(name, priority, *ends, (service,), BOTH, action)


def build_policies(count: int, *policies: Policy) -> PolicySet:
    return PolicySet(tuple(build_record(n) for n in range(1, count + 1)), ZONES, policies)


WEB_TO_APP = build_policy("web-to-app", 10, "web", "app", 80)


def choose(
    policies: PolicySet,
    ports: list[Port],
    run: int = 0,
    budget: int = 20_000,
    known: dict[tuple[str, str], int] | None = None,
) -> Sample:
    machines = resolve_machines(policies, ports)
    return choose_witnesses(
        policies, machines, LANES, run=run, budget=budget, addresses={}, known=known or {}
    )


def find_pairs(sample: Sample) -> set[tuple[int, int]]:
    return {(c.witness.source.ofport, c.witness.destination.ofport) for c in sample.chosen}


def test_both_ends_of_each_range_and_what_lies_beyond_have_a_witness() -> None:
    assert find_witness_ports([(80, 80), (8000, 8080)]) == (79, 80, 8000, 8080, 8081)
    assert find_witness_ports([(1, 65535)]) == (1, 65535)
    assert find_witness_ports([(80, 80), (81, 90)]) == (79, 80, 81, 90, 91)
    assert find_witness_ports([]) == (10_000,)


def test_a_pair_has_cases_of_each_family_service_direction_and_state() -> None:
    told = {
        (case.service, str(case.way), str(case.state))
        for case in build_cases([WEB_TO_APP])
        if case.family is Family.IPV4
    }
    assert {
        ("tcp/80", "opener", "new"),
        ("tcp/80", "opener", "established"),
        ("tcp/80", "opener", "midstream"),
        ("tcp/80", "answer", "established"),
        ("tcp/80", "answer", "midstream"),
        ("tcp/79", "opener", "new"),
        ("tcp/81", "opener", "new"),
        ("udp/10000", "opener", "new"),
        ("icmp", "answer", "established"),
        ("another protocol", "opener", "new"),
        ("tcp/80 first fragment", "opener", "new"),
        ("tcp later fragment", "opener", "established"),
        ("udp later fragment", "answer", "midstream"),
    } <= told


def test_witnesses_are_written_as_the_switch_reads_them() -> None:
    sample = choose(build_policies(2, WEB_TO_APP), [build_port(1), build_port(2)])
    lines = [str(render_entry(chosen.witness)) for chosen in sample.chosen]
    ends = "dl_src=02:00:00:00:00:01,dl_dst=02:00:00:00:00:02"
    back = "dl_src=02:00:00:00:00:02,dl_dst=02:00:00:00:00:01"
    assert (
        f"br-int 'in_port=1,{ends},ip,nw_proto=6,nw_src=198.19.0.1,nw_dst=198.19.0.2,nw_ttl=64,"
        "tcp_src=40000,tcp_dst=80,tcp_flags=syn' --ct-next 'trk,new'"
    ) in lines
    assert (
        f"br-int 'in_port=2,{back},ipv6,nw_proto=6,ipv6_src=fd48:5049:5250:1::2,"
        "ipv6_dst=fd48:5049:5250:1::1,nw_ttl=64,tcp_src=80,tcp_dst=40000,tcp_flags=ack,ct_mark=1'"
        " --ct-next 'trk,est,rpl'"
    ) in lines


def test_small_budgets_trace_every_pair_in_time() -> None:
    policies = build_policies(9, WEB_TO_APP)
    ports = [build_port(number) for number in range(1, 10)]
    met: set[tuple[int, int]] = set()
    for run in range(80):
        sample = choose(policies, ports, run, budget=900)
        assert sum(chosen.cost for chosen in sample.chosen) <= 900
        met |= find_pairs(sample)
    assert len(met) == sample.pairs == 72


def test_every_port_stands_once_as_a_source_and_once_as_a_destination() -> None:
    policies = build_policies(60, WEB_TO_APP)
    ports = [build_port(number) for number in range(1, 61)]
    sample = choose(policies, ports, budget=4_000)
    pairs = find_pairs(sample)
    assert {source for source, _ in pairs} == {destination for _, destination in pairs}
    assert len({source for source, _ in pairs}) == 60
    classes = {(chosen.pair_class, chosen.witness.case) for chosen in sample.chosen}
    assert len(classes) == sample.classes


def test_what_changed_goes_first() -> None:
    ports = [build_port(number) for number in range(1, 10)]
    before = choose(build_policies(9, WEB_TO_APP), ports)
    same = choose(build_policies(9, WEB_TO_APP), ports, 1, 700, dict(before.fingerprints))
    assert len({chosen.witness.source.ofport for chosen in same.chosen}) > 3
    ports[4] = replace(ports[4], mac="02:00:00:00:00:aa")
    moved = choose(build_policies(9, WEB_TO_APP), ports, 1, 700, dict(before.fingerprints))
    ends = [(c.witness.source.ofport, c.witness.destination.ofport) for c in moved.chosen]
    assert all(5 in pair for pair in ends[:100])
    more = build_policies(9, WEB_TO_APP, build_policy("db-to-db", 20, "db", "db", 5432))
    ports[4] = build_port(5)
    first = choose(more, ports, 1, 700, dict(before.fingerprints)).chosen[0].witness
    assert {first.source.name, first.destination.name} & {"host-3", "host-6", "host-9"}


def test_ports_that_cannot_be_told_apart_are_named_and_networks_kept_apart() -> None:
    twin = replace(build_port(2), mac=build_port(1).mac)
    ports = [build_port(1), twin, build_port(3), build_port(4, tag=7), build_port(5)]
    sample = choose(build_policies(5, WEB_TO_APP), ports)
    assert find_pairs(sample) == {(3, 5), (5, 3)}
    assert sample.without == (
        ("host-1", "2 ports have its MAC 02:00:00:00:00:01"),
        ("host-2", "2 ports have its MAC 02:00:00:00:00:01"),
    )


def test_every_fragment_that_may_be_of_what_is_denied_must_be_dropped() -> None:
    deny = replace(WEB_TO_APP, name="no-telnet", action=Deny("no"))
    sample = choose(build_policies(2, deny), [build_port(1), build_port(2)])
    denied = {
        f"{case.family} {case.service}"
        for chosen in sample.chosen
        if (case := chosen.witness.case).fragment is not Fragment.WHOLE
        and [str(one) for one in chosen.expected] == ["denied (policy no-telnet)"]
    }
    assert denied == {
        "ipv4 tcp/80 first fragment",
        "ipv4 tcp/1 first fragment",
        "ipv4 tcp later fragment",
        "ipv6 tcp/80 first fragment",
        "ipv6 tcp/1 first fragment",
        "ipv6 another protocol later fragment",
    }


def test_what_documents_say_of_addresses_is_kept_to() -> None:
    records = (
        replace(build_record(1), addresses=("10.0.0.1", "fd00::1")),
        replace(build_record(2), addresses=("fd00::2",)),
    )
    policies = PolicySet(records, ZONES, (WEB_TO_APP,))
    sample = choose(policies, [build_port(1), build_port(2)])
    ends = {end.name: (end.ipv4, end.ipv6, end.barred) for end in sample.ends}
    assert ends["host-1"] == ("10.0.0.1", "fd00::1", ())
    assert ends["host-2"] == ("198.19.0.2", "fd00::2", (Family.IPV4,))
    barred = [c for c in sample.chosen if "no address of this family" in str(c.expected[0])]
    assert barred
    for chosen in sample.chosen:
        case, sender = chosen.witness.case, chosen.witness.sender
        assert (chosen in barred) == (sender.name == "host-2" and case.family is Family.IPV4)
