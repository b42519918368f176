"""Queue rules, both dialects, as whole readable lines; and how drift is recognised."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.inspection.netfilter import QueueCounters, parse_queue_counters
from appliance.inspection.queueing import (
    TABLES,
    count_nftables_rules,
    find_table_faults,
    render_iptables,
    render_iptables_removal,
    render_nftables,
    render_rules,
)
from steering.errors import WrongInput
from steering.model import Lane, Leg, Profile

PREVENT = Lane(1, Profile.PREVENT, 100, (0,), Leg("leg0", "eth1"), Leg("leg1", "eth2"))
DETECT = Lane(2, Profile.DETECT, 101, (4, 5, 6), Leg("leg2", "eth3"), Leg("leg3", "eth4"))

EBTABLES_FILTER = """\
*filter
:hairpin RETURN
-I FORWARD 1 -j hairpin
-I INPUT 1 -j hairpin
-I OUTPUT 1 -j hairpin
-A hairpin -p IPv4 -i eth1 -o eth2 -j ACCEPT
-A hairpin -p IPv6 -i eth1 -o eth2 -j ACCEPT
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-id 100 --vlan-encap 0800 -j ACCEPT
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-id 100 --vlan-encap 86DD -j ACCEPT
-A hairpin -p IPv4 -i eth2 -o eth1 -j ACCEPT
-A hairpin -p IPv6 -i eth2 -o eth1 -j ACCEPT
-A hairpin -p 802_1Q -i eth2 -o eth1 --vlan-id 100 --vlan-encap 0800 -j ACCEPT
-A hairpin -p 802_1Q -i eth2 -o eth1 --vlan-id 100 --vlan-encap 86DD -j ACCEPT
-A hairpin -p IPv4 -i eth3 -o eth4 -j ACCEPT
-A hairpin -p IPv6 -i eth3 -o eth4 -j ACCEPT
-A hairpin -p 802_1Q -i eth3 -o eth4 --vlan-id 101 --vlan-encap 0800 -j ACCEPT
-A hairpin -p 802_1Q -i eth3 -o eth4 --vlan-id 101 --vlan-encap 86DD -j ACCEPT
-A hairpin -p IPv4 -i eth4 -o eth3 -j ACCEPT
-A hairpin -p IPv6 -i eth4 -o eth3 -j ACCEPT
-A hairpin -p 802_1Q -i eth4 -o eth3 --vlan-id 101 --vlan-encap 0800 -j ACCEPT
-A hairpin -p 802_1Q -i eth4 -o eth3 --vlan-id 101 --vlan-encap 86DD -j ACCEPT
-A hairpin -i eth1 -j DROP
-A hairpin -i eth2 -j DROP
-A hairpin -i eth3 -j DROP
-A hairpin -i eth4 -j DROP
-A hairpin -o eth1 -j DROP
-A hairpin -o eth2 -j DROP
-A hairpin -o eth3 -j DROP
-A hairpin -o eth4 -j DROP
COMMIT
"""

EBTABLES_NAT = """\
*nat
:hairpin RETURN
-I POSTROUTING 1 -j hairpin
-A hairpin -p 802_1Q -o eth1 --mark 0x100/0xff00 -j ACCEPT
-A hairpin -o eth1 --mark 0x100/0xff00 -j ACCEPT
-A hairpin -p 802_1Q -o eth2 --mark 0x100/0xff00 -j ACCEPT
-A hairpin -o eth2 --mark 0x100/0xff00 -j ACCEPT
-A hairpin -p 802_1Q -o eth3 --mark 0x200/0xff00 -j ACCEPT
-A hairpin -o eth3 --mark 0x200/0xff00 -j ACCEPT
-A hairpin -p 802_1Q -o eth4 --mark 0x200/0xff00 -j ACCEPT
-A hairpin -o eth4 --mark 0x200/0xff00 -j ACCEPT
-A hairpin -o eth1 -j DROP
-A hairpin -o eth2 -j DROP
-A hairpin -o eth3 -j DROP
-A hairpin -o eth4 -j DROP
COMMIT
"""

IPTABLES_MANGLE = """\
*mangle
:hairpin - [0:0]
-I FORWARD 1 -j hairpin
-A hairpin -i lane1 -j MARK --set-xmark 0x100/0xff00
-A hairpin -i lane1 -j NFQUEUE --queue-num 0
-A hairpin -i lane1 -j DROP
-A hairpin -i lane2 -j MARK --set-xmark 0x200/0xff00
-A hairpin -i lane2 -j NFQUEUE --queue-balance 4:6
-A hairpin -i lane2 -j DROP
COMMIT
"""

NFTABLES = """\
table bridge hairpin { }
delete table bridge hairpin
table bridge hairpin {
	counter lane1_in_tagged { }
	counter lane1_in_untagged { }
	counter lane1_out_tagged { }
	counter lane1_out_untagged { }
	counter lane1_refused { }
	counter lane2_in_tagged { }
	counter lane2_in_untagged { }
	counter lane2_out_tagged { }
	counter lane2_out_untagged { }
	counter lane2_refused { }
	chain lane1 {
		ether type { ip, ip6 } counter name "lane1_in_untagged" queue num 0
		ether type 8021q vlan id 100 vlan type { ip, ip6 } counter name "lane1_in_tagged" queue num 0
		counter name "lane1_refused" drop
	}
	chain lane2 {
		ether type { ip, ip6 } counter name "lane2_in_untagged" queue num 4-6
		ether type 8021q vlan id 101 vlan type { ip, ip6 } counter name "lane2_in_tagged" queue num 4-6
		counter name "lane2_refused" drop
	}
	chain forward {
		type filter hook forward priority -200; policy accept;
		iifname "eth1" oifname "eth2" goto lane1
		iifname "eth2" oifname "eth1" goto lane1
		iifname "eth3" oifname "eth4" goto lane2
		iifname "eth4" oifname "eth3" goto lane2
		iifname { "eth1", "eth2" } counter name "lane1_refused" drop
		iifname { "eth3", "eth4" } counter name "lane2_refused" drop
		oifname { "eth1", "eth2", "eth3", "eth4" } drop
	}
	chain input {
		type filter hook input priority -200; policy accept;
		iifname { "eth1", "eth2", "eth3", "eth4" } drop
	}
	chain output {
		type filter hook output priority -200; policy accept;
		oifname { "eth1", "eth2", "eth3", "eth4" } drop
	}
	chain leaving {
		type filter hook postrouting priority 300; policy accept;
		oifname { "eth1", "eth2" } ether type 8021q counter name "lane1_out_tagged" accept
		oifname { "eth1", "eth2" } counter name "lane1_out_untagged" accept
		oifname { "eth3", "eth4" } ether type 8021q counter name "lane2_out_tagged" accept
		oifname { "eth3", "eth4" } counter name "lane2_out_untagged" accept
	}
}
"""

SAVED_MANGLE = """\
# Generated by iptables-save v1.8.9 (nf_tables) on Mon Nov 23 09:02:44 2026
*mangle
:FORWARD ACCEPT [0:0]
:hairpin - [0:0]
-A FORWARD -j hairpin
-A FORWARD -j hairpin
-A FORWARD -i eth9 -j ACCEPT
-A hairpin -i lane1 -j MARK --set-xmark 0x100/0xff00
-A hairpin -i lane1 -j NFQUEUE --queue-num 0
COMMIT
"""


def saved_as_applied(kind, lanes):
    """What a `-save` prints after our script was applied to an empty table."""
    return "\n".join(
        (
            f":hairpin {kind.policy}",
            *(f"-A {hook} -j hairpin" for hook in kind.hooks),
            *render_rules(kind, lanes),
        )
    )


def test_iptables_dialect_closes_first_and_queues_last():
    scripts = render_iptables([PREVENT, DETECT])
    assert [script.argv for script in scripts] == [
        ("ebtables-restore", "--noflush"),
        ("ebtables-restore", "--noflush"),
        ("iptables-restore", "--noflush"),
        ("ip6tables-restore", "--noflush"),
    ]
    assert [script.text for script in scripts] == [
        EBTABLES_FILTER,
        EBTABLES_NAT,
        IPTABLES_MANGLE,
        IPTABLES_MANGLE,
    ]


def test_nftables_dialect():
    assert render_nftables([PREVENT, DETECT]) == NFTABLES


EBTABLES_CLASSES = """\
-A hairpin -i eth1 -o eth2 -j mark --mark-set 0x0 --mark-target CONTINUE
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-prio 1 -j mark --mark-set 0x10000 --mark-target CONTINUE
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-prio 2 -j mark --mark-set 0x20000 --mark-target CONTINUE
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-prio 3 -j mark --mark-set 0x30000 --mark-target CONTINUE
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-prio 4 -j mark --mark-set 0x40000 --mark-target CONTINUE
-A hairpin -p 802_1Q -i eth1 -o eth2 --vlan-prio 5 -j mark --mark-set 0x50000 --mark-target CONTINUE
"""

NFTABLES_CLASSES = """\
	chain lane1 {
		meta mark set 0x00000000
		ether type 8021q vlan id 100 vlan pcp 1 meta mark set 0x00010000
		ether type 8021q vlan id 100 vlan pcp 2 meta mark set 0x00020000
		ether type 8021q vlan id 100 vlan pcp 3 meta mark set 0x00030000
		ether type 8021q vlan id 100 vlan pcp 4 meta mark set 0x00040000
		ether type 8021q vlan id 100 vlan pcp 5 meta mark set 0x00050000
		ether type { ip, ip6 } counter name "lane1_in_untagged" queue num 0
"""


def test_a_lane_with_a_third_leg_puts_the_class_into_the_mark_before_anything_is_let_in():
    third = replace(PREVENT, leg_c=Leg("leg9", "eth9"))
    back = EBTABLES_CLASSES.replace("-i eth1 -o eth2", "-i eth2 -o eth1")
    first = EBTABLES_FILTER.index("-A hairpin")
    wanted = EBTABLES_FILTER[:first] + EBTABLES_CLASSES + back + EBTABLES_FILTER[first:]
    scripts = render_iptables([third, DETECT])
    assert [script.text for script in scripts] == [
        wanted,
        EBTABLES_NAT,
        IPTABLES_MANGLE,
        IPTABLES_MANGLE,
    ]
    nftables = render_nftables([third, DETECT])
    begin = NFTABLES_CLASSES.splitlines(keepends=True)
    assert nftables == NFTABLES.replace(begin[0] + begin[-1], NFTABLES_CLASSES)
    assert count_nftables_rules(nftables) == count_nftables_rules(NFTABLES) + 6
    # Nothing of its device: it is in no bridge.
    assert "eth9" not in nftables + wanted
    kind = TABLES[0]
    saved = saved_as_applied(kind, [third, DETECT])
    assert find_table_faults(kind, [third, DETECT], saved) == ()
    faults = find_table_faults(kind, [third, DETECT], saved.replace("0x30000", "0x10000"))
    assert "--vlan-prio 3" in faults[0]


def test_a_full_queue_or_a_missing_engine_never_lets_a_packet_by():
    rendered = render_nftables([PREVENT]) + "".join(s.text for s in render_iptables([PREVENT]))
    assert "bypass" not in rendered


def test_a_table_that_holds_our_chain_already_is_replaced_and_what_is_foreign_stays():
    script = render_iptables([PREVENT], {"iptables mangle": SAVED_MANGLE})[2]
    assert (
        script.text
        == """\
*mangle
:hairpin - [0:0]
-F hairpin
-D FORWARD -j hairpin
-D FORWARD -j hairpin
-I FORWARD 1 -j hairpin
-A hairpin -i lane1 -j MARK --set-xmark 0x100/0xff00
-A hairpin -i lane1 -j NFQUEUE --queue-num 0
-A hairpin -i lane1 -j DROP
COMMIT
"""
    )


def test_nothing_leaves_the_chain_that_queues_but_through_the_queue():
    for lane in (PREVENT, DETECT):
        for gone in ("MARK", "NFQUEUE", "DROP"):
            left = [r.split(" -j ")[1].split()[0] for r in render_rules(TABLES[2], [lane])]
            left.remove(gone)
            # No mark: dropped on leaving. No queue: dropped behind it. No drop: still queued.
            assert left in (["NFQUEUE", "DROP"], ["MARK", "DROP"], ["MARK", "NFQUEUE"])


def test_removal_names_only_what_is_there():
    scripts = render_iptables_removal({"iptables mangle": SAVED_MANGLE})
    assert [script.text for script in scripts] == [
        "*mangle\n-D FORWARD -j hairpin\n-D FORWARD -j hairpin\n-F hairpin\n-X hairpin\nCOMMIT\n"
    ]


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.name)
def test_what_was_applied_shows_no_fault_and_every_missing_line_shows_one(kind):
    saved = saved_as_applied(kind, [PREVENT, DETECT])
    assert find_table_faults(kind, [PREVENT, DETECT], saved) == ()
    lines = saved.splitlines()
    for gone in range(1, len(lines)):
        without = "\n".join(lines[:gone] + lines[gone + 1 :])
        assert find_table_faults(kind, [PREVENT, DETECT], without), lines[gone]


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.name)
def test_a_rule_before_ours_is_a_fault(kind):
    hook = kind.hooks[0]
    saved = saved_as_applied(kind, [PREVENT])
    preceded = saved.replace(f"-A {hook} -j hairpin", f"-A {hook} -j ACCEPT\n-A {hook} -j hairpin")
    assert find_table_faults(kind, [PREVENT], preceded) == (
        f"{kind.name}: {hook} does not jump to `hairpin` first",
    )
    extra = saved + "\n-A hairpin -j ACCEPT"
    assert find_table_faults(kind, [PREVENT], extra) == (
        f"{kind.name}: 1 rules too many, the first `-A hairpin -j ACCEPT`",
    )


def test_queues_that_no_rule_can_name_are_refused():
    gap = Lane(1, Profile.PREVENT, 100, (0, 2), PREVENT.leg_a, PREVENT.leg_b)
    for render in (render_iptables, render_nftables):
        with pytest.raises(WrongInput, match=r"lanes\[0\].queues: 0, 2 are not consecutive"):
            render([gap])


lanes_strategy = st.integers(1, 8).map(
    lambda count: [
        Lane(
            number,
            Profile.PREVENT,
            99 + number,
            tuple(range(number * 10, number * 10 + number)),
            Leg(f"a{number}", f"da{number}"),
            Leg(f"b{number}", f"db{number}"),
        )
        for number in range(1, count + 1)
    ]
)


@given(lanes_strategy)
def test_no_rule_lets_a_frame_from_one_lane_to_another(lanes):
    pairs = {(lane.leg_a.device, lane.leg_b.device) for lane in lanes}
    pairs |= {(b, a) for a, b in pairs}
    for line in render_rules(TABLES[0], lanes):
        if line.endswith("ACCEPT"):
            words = line.split()
            assert (words[words.index("-i") + 1], words[words.index("-o") + 1]) in pairs
    leaving = [line.split() for line in render_rules(TABLES[1], lanes) if "--mark" in line]
    marks = [words[words.index("--mark") + 1] for words in leaving]
    assert len(set(marks)) == len(lanes)


@given(lanes_strategy)
def test_rules_are_counted_alike_in_any_listing(lanes):
    rendered = render_nftables(lanes)
    listed = rendered.replace("queue num", "queue to").replace("ether type 8021q ", "")
    assert count_nftables_rules(rendered) == 8 * len(lanes) + 3 == count_nftables_rules(listed)


def test_queue_counters():
    text = (
        "    0   7797     1 2 65531     3     4  7340265  1\nnonsense\n   4 1 0 2 65531 0 0 9 1\n"
    )
    assert parse_queue_counters(text) == (
        QueueCounters(0, waiting=1, dropped=3, user_dropped=4, packets=7340265, listener=7797),
        QueueCounters(4, waiting=0, dropped=0, user_dropped=0, packets=9, listener=1),
    )
