"""The process that runs nfstream: ``python -m appliance.visibility.meter CONFIG``.

Writes one line for each expired flow to the file descriptor ``records``: a flow record, or
``{"beat": PORT}`` for a heartbeat. nfstream itself prints a report of its counters to standard
output once a second. Both pipes end at the supervisor (`appliance.visibility.observer`).

nfstream forks one worker, which would outlive this process: every process here asks the kernel to
be killed when its parent dies (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from appliance.visibility.heartbeat import is_heartbeat
from appliance.visibility.record import build_record, render_record

# Of each of the two processes. A worker that needs more dies and is replaced.
MEMORY_LIMIT = 2**30
CAPTURE_BUFFER = 8 * 2**20
# A frame of the longest IP packet with one VLAN tag would not fit nfstream's 16 bit sizes. Its own
# default, 1536, leaves out every IPv6 packet longer than that (super-packets).
SNAPSHOT = 65535
DISSECTED_PACKETS = 20
_PR_SET_PDEATHSIG = 1


class MeterConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    parent: int
    device: str
    mac: str
    idle_seconds: int
    active_seconds: int
    records: int
    group: Path | None


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent does; exit if that is already so."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def run_meter(config: MeterConfig) -> int:
    """Meter until killed. Raises ValueError with nfstream's words when it can't capture."""
    # The library pulls in pandas; the supervisor, which imports this module, stays without.
    from nfstream import NFStreamer

    here = os.getpid()
    os.register_at_fork(after_in_child=lambda: die_with(here))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    streamer = NFStreamer(
        source=config.device,
        decode_tunnels=False,
        # What this host itself sends out of the device is no mirrored traffic, but for the beats.
        bpf_filter=f"inbound or ether src {config.mac}",
        promiscuous_mode=True,
        snapshot_length=SNAPSHOT,
        socket_buffer_size=CAPTURE_BUFFER,
        idle_timeout=config.idle_seconds,
        active_timeout=config.active_seconds,
        n_dissections=DISSECTED_PACKETS,
        statistical_analysis=False,
        # Only one: the heartbeat would keep the clock of just one of several going.
        n_meters=1,
        performance_report=1,
    )
    with os.fdopen(config.records, "wb", buffering=0) as records:
        for flow in streamer:
            if is_heartbeat(flow, config.mac):
                line = json.dumps({"beat": flow.src_port}).encode() + b"\n"
            else:
                line = render_record(build_record(flow))
            records.write(line)
    return 0


def main() -> int:
    config = MeterConfig.model_validate_json(sys.argv[1])
    die_with(config.parent)
    if config.group is not None:
        (config.group / "cgroup.procs").write_text(str(os.getpid()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return run_meter(config)


if __name__ == "__main__":
    sys.exit(main())
