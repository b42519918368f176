"""The benchmark's arithmetic: medians, ratios of the same minute, and what a blind path scores."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import cast

import pytest

from appliance.rules.shortcut import build_shortcut_rules
from tests.bench.measures import GROUPS, ONE_FLOW
from tests.bench.peers import (
    AfPacketPeer,
    PeerPorts,
    StockPeer,
    build_peer_rules,
    build_peer_settings,
)
from tests.bench.report import render_markdown, render_plot, render_table
from tests.bench.rows import Path, Round, build_row, check, find_median, find_ratio
from tests.bench.stage import Stage
from tests.bench.traffic import BenchError, find_quantile
from tests.support.appliance import Appliance
from tests.support.inspection_lane import LaneLab


def build_round(hairpin: float, direct: float, stock: float = 1.0, af_packet: float = 1.0) -> Round:
    return Round(
        {
            Path.HAIRPIN: hairpin,
            Path.DIRECT: direct,
            Path.STOCK: stock,
            Path.AF_PACKET: af_packet,
        }
    )


ROUNDS = [build_round(5, 10), build_round(8, 10), build_round(6, 20)]


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    assert find_median(ROUNDS, Path.HAIRPIN) == 6
    assert find_ratio(ROUNDS, Path.HAIRPIN, Path.DIRECT) == 0.5


def test_a_path_that_delivers_the_exploit_scores_nothing() -> None:
    rounds = [*ROUNDS, build_round(0, 10), build_round(7, 10, af_packet=0)]
    row = build_row("x", "Gbit/s", "goal", rounds, lambda _ratio: ())
    assert row.missed == (
        "hairpin delivered the token exploit",
        "AF_PACKET IPS delivered the token exploit",
    )
    # No ratio to a path that is blind is anything to be proud of.
    assert row.ratio["hairpin / AF_PACKET IPS"] == 0


def test_a_row_says_all_that_the_file_must_have() -> None:
    def judge(ratio: Mapping[str, float]) -> tuple[str, ...]:
        return check((ratio["hairpin / direct"] >= 0.75, "less"))

    row = build_row("x", "Gbit/s", "at least 0.75", ROUNDS, judge)
    document = row.document()
    assert {"name", "value", "unit", "peers", "ratio", "goal", "met", "rounds"} <= set(document)
    assert (document["met"], document["missed"]) == (False, ["less"])
    assert [one["hairpin"] for one in document["rounds"]] == [5, 8, 6]
    assert "MISSED x" in render_table([row])
    assert "0 of 1 rows meet their goal" in render_table([row])
    assert "**no**: less" in render_markdown([document], "A machine.")
    plot = ET.fromstring(render_plot([{**document, "name": "a < b & c"}]))  # noqa: S314
    assert any(text.text == "a < b & c (Gbit/s)" for text in plot.iter() if text.text)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.99, 99.0)])
def test_quantiles(share: float, expected: float) -> None:
    assert find_quantile([float(n) for n in range(101)], share) == pytest.approx(expected, abs=0.11)


def test_groups_have_names_of_their_own_and_something_to_measure() -> None:
    assert len({group.name for group in GROUPS}) == len(GROUPS)
    assert all((group.measure is None) is not (group.alone is None) for group in GROUPS)
    assert set(ONE_FLOW) == {Path.DIRECT, Path.STOCK, Path.AF_PACKET}


def test_peers_get_every_rule_but_those_that_set_marks() -> None:
    """`nfq_set_mark` spoils the AF_PACKET engine's own memory, and a peer has no shortcut."""
    plain = 'drop tcp any any -> any any (msg:"a sid:4850990 in words"; content:"x"; sid:1; rev:1;)'
    marked = (
        'alert tcp any any -> any any (msg:"m"; content:"y"; '
        "nfq_set_mark:0x2000000/0x2000000; flowbits:set,hairpin.rule; sid:2; rev:1;)"
    )
    text = "\n".join(("# a comment", plain, *build_shortcut_rules(), marked, ""))
    kept = build_peer_rules(text).splitlines()
    assert kept[:2] == ["# a comment", plain]
    assert len(kept) == 3
    assert kept[2] == marked.replace(" nfq_set_mark:0x2000000/0x2000000;", "")


def test_an_engine_that_ended_by_itself_is_told_and_not_measured(tmp_path: FilePath) -> None:
    ports = PeerPorts("afp", "none", 222)
    peer = AfPacketPeer(tmp_path, build_peer_settings(tmp_path / "peer", ports), ports)
    stock = StockPeer(LaneLab(tmp_path, peer.settings))
    stage = Stage(cast(Appliance, None), (stock, peer), print)
    stage.check_engine(Path.AF_PACKET)  # not started yet
    peer.process = subprocess.Popen(["/bin/sleep", "60"])
    stage.check_engine(Path.AF_PACKET)
    peer.process.kill()
    peer.process.wait(10)
    with pytest.raises(BenchError, match=r"AF_PACKET IPS: the engine ended by itself, status -9"):
        stage.check_engine(Path.AF_PACKET)
    stage.check_engine(Path.STOCK)
