"""What the demonstration with a VM shows beside `make demo`: boot, a VM that hangs, dies and boots, the way out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.lab.demo_failure import (
    CLOSED,
    OPEN,
    Outage,
    Pinging,
    run_outage,
    start_pinging,
)
from appliance.lab.demo_policies import LOG4SHELL, Attempt
from appliance.lab.demo_probe import AnswerKind
from appliance.lab.demo_report import Check, render_seconds
from appliance.lab.demo_stage import Stage, wait_until
from appliance.lab.demo_steps import find_pair, is_alert_of
from appliance.lab.hypervisor import find_forwarding_legs
from appliance.lab.plan import APPLIANCE_ADDRESS
from appliance.lab.qemu import can_use_kvm
from appliance.lab.vm_lab import (
    end_vm,
    fetch_certificate,
    find_certificate_fault,
    find_switch_changes,
    is_vm_running,
    read_fingerprint,
    read_switch,
    read_vm_console,
    run_on_host,
    send_vm_command,
    start_vm,
)
from steering.errors import CommandFailed, HairpinError

BOOT_SECONDS = 900.0
"""Under TCG on two busy cores; on idle ones it takes a fifth."""
API_SECONDS = 180.0
HEALTH_SECONDS = 300.0
AGED = ("they count as fresh for", "old they are can't be told")
TRIES = 3
HELD_SECONDS = 5.0
PING_EVERY = 0.05
PING_SECONDS = 3600
OFF_SECONDS = 120.0


def run_boot(stage: Stage) -> Iterator[Check]:
    """The host is prepared, the VM boots from its seed, and its API is who the console says."""
    state = stage.state
    switch = read_switch(state)
    ports = [name for name in switch.ports.split() if name.startswith("hp-")]
    listeners = [one for one in switch.listeners.split() if one.startswith(("pssl:", "ptcp:"))]
    yield Check(
        "",
        "hairpin host prepare --apply",
        "7 ports, 2 by TLS",
        f"{len(ports)} ports; {', '.join(listeners)}",
        len(ports) == 7 and [one.partition(":")[0] for one in listeners] == ["pssl", "pssl"],
    )
    kvm = can_use_kvm()
    stage.say("switching the VM on")
    began = time.monotonic()
    start_vm(state, kvm=kvm)
    legs = wait_until(lambda: _all_forward(stage) or not is_vm_running(state), BOOT_SECONDS, 1.0)
    forwarding = time.monotonic() - began
    if not legs or not is_vm_running(state):
        raise HairpinError("the VM did not come up: see its console below")
    stage.say("frames pass through both lanes; waiting for the API")
    if not wait_until(lambda: _fetch(stage), API_SECONDS, 2.0):
        raise HairpinError("the API does not answer")
    words, fine = _wait_health(stage)
    yield Check(
        "",
        f"the image boots ({'KVM' if kvm else 'TCG'})",
        "inspecting, healthy",
        f"lanes after {forwarding:.0f} s; health after {time.monotonic() - began:.0f} s: {words}",
        fine,
    )
    shown = find_shown(stage)
    fault = find_certificate_fault(state, shown)
    fingerprint = read_fingerprint(shown)
    told = fingerprint in read_vm_console(state)
    yield Check(
        "",
        "the API's certificate",
        "by the host's CA",
        f"{fault or f'for {APPLIANCE_ADDRESS}, by the CA that was issued with the host'}; "
        f"its SHA-256 {'on' if told else 'NOT on'} the console",
        not fault and told,
    )


def find_shown(stage: Stage) -> Path:
    """Where the certificate is kept that the API showed."""
    return stage.directory / "shown.pem"


def _all_forward(stage: Stage) -> bool:
    return all(find_forwarding_legs(stage.state).values())


def _fetch(stage: Stage) -> bool:
    certificate = fetch_certificate(stage.state)
    if certificate:
        find_shown(stage).write_text(certificate)
    return bool(certificate)


def find_faults(health: Any) -> list[str]:
    """Why it does not do its task, by its health; empty when it does. Pure.

    That an image's rules have grown old is no fault of a demonstration, and changes nothing of what it shows.
    """
    parts = health["components"]
    lanes = [
        f"lane {one['name']} does not inspect" for one in parts["lanes"] if not one["inspecting"]
    ]
    switch = [] if parts["switch"]["status"] == "ok" else ["the switch"]
    reasons = [one["reason"] for one in health["problems"]]
    return lanes + switch + [one for one in reasons if not any(words in one for words in AGED)]


def _wait_health(stage: Stage) -> tuple[str, bool]:
    """Health in words, and whether it is good; waits until it is."""
    last: list[str] = ["no answer"]

    def is_good() -> bool:
        try:
            # It ends with 1 when something is wrong, and says what.
            last[:] = find_faults(stage.run_hairpin("health", statuses=(0, 1)))
        except HairpinError as fault:
            last[:] = [(fault.reason.splitlines() or ["no answer"])[-1]]
        return not last

    good = wait_until(is_good, HEALTH_SECONDS, 3.0)
    return ("; ".join(last)[:160] or "ok", good)


@dataclass
class Siege:
    """The exploit on the closed pair, one time after the other, until `end`."""

    stage: Stage
    attempt: Attempt
    answered: list[str] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    tries: int = 0

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._before = self.stage.count_seen(self.attempt)
        self._thread = threading.Thread(target=self._attack)
        self._thread.start()

    def _attack(self) -> None:
        try:
            while not self._over.is_set():
                answer = self.stage.try_it(self.attempt)
                self.tries += 1
                if answer.kind is AnswerKind.ANSWERED:
                    self.answered.append(answer.text)
                self._over.wait(1.0)
        except BaseException as fault:
            self.faults.append(fault)

    def end(self) -> int:
        """How often the server saw it. Raises what broke off the attack."""
        self._over.set()
        self._thread.join()
        if self.faults:
            raise self.faults[0]
        return self.stage.count_seen(self.attempt) - self._before


def run_vm_failure(stage: Stage) -> Iterator[Check]:
    """(e) The VM hangs; QEMU is killed; the VM is reset. Under traffic, of an open and a closed policy."""
    state, kvm = stage.state, can_use_kvm()
    stage.say(f"(e) pinging a closed and an open pair every {PING_EVERY * 1000:.0f} ms")
    downs = [one for one in stage.run_hairpin("events")["items"] if one["kind"] == "lane.down"]
    stage.say(f"(e) lanes were down {len(downs)} times since the boot")
    closed, opened = (
        start_pinging(stage, *pair, every=PING_EVERY, seconds=PING_SECONDS)
        for pair in (CLOSED, OPEN)
    )

    def stop() -> None:
        stage.say("(e) stopping the VM: it hangs")
        send_vm_command(state, "stop")

    def kill() -> None:
        stage.say("(e) killing QEMU with kill -9")
        end_vm(state)

    def reset() -> None:
        stage.say("(e) resetting the VM")
        send_vm_command(state, "system_reset")

    def go_on() -> None:
        send_vm_command(state, "cont")

    def switch_on() -> None:
        stage.say("(e) switching the VM on again")
        start_vm(state, kvm=kvm)

    def nothing() -> None:
        stage.say("(e) waiting until it has booted")

    try:
        hang = Outage("VM hangs", stop, "goes on", go_on, back=API_SECONDS, held=HELD_SECONDS)
        _settle(closed, opened)
        yield from run_outage(stage, closed, opened, hang)
        for outage in (
            Outage(
                "QEMU: kill -9", kill, "started again", switch_on, HELD_SECONDS, BOOT_SECONDS, 1.0
            ),
            Outage("VM: reset", reset, "boots again", nothing, HELD_SECONDS, BOOT_SECONDS, 1.0),
        ):
            _settle(closed, opened)
            yield from _run_reboot(stage, closed, opened, outage)
    finally:
        if is_vm_running(state):
            send_vm_command(state, "cont")
        closed.stop()
        opened.stop()


def _settle(closed: Pinging, opened: Pinging) -> None:
    for one in (closed, opened):
        one.wait_steady(60.0)


def _run_reboot(stage: Stage, closed: Pinging, opened: Pinging, outage: Outage) -> Iterator[Check]:
    """An outage that ends with a boot, under attack all the time; and what is kept over it."""
    before = {one["id"] for one in _read_alerts(stage)}
    siege = Siege(stage, Attempt(LOG4SHELL, *CLOSED, "IPv4"))
    try:
        yield from run_outage(stage, closed, opened, outage)
    finally:
        seen = siege.end()
    yield Check(
        "e",
        f"  {LOG4SHELL.name} all the while, {CLOSED[0]} -> {CLOSED[1]}",
        "never delivered",
        f"{siege.tries} tries, {len(siege.answered)} answered, server saw {seen}",
        siege.tries > 0 and not siege.answered and seen == 0,
    )
    told, fine = _wait_health(stage)
    attempt = Attempt(LOG4SHELL, *CLOSED, "IPv4")
    for _ in range(TRIES):
        # As in step (b): a lane that is closed on failure may close for a moment on a busy machine.
        answer = stage.try_it(attempt)
        if answer.kind is not AnswerKind.UNREACHED:
            break
    found = wait_until(lambda: _find_new(stage, before, attempt), 60.0, 1.0)
    status = find_pair(stage, *CLOSED)["status"]
    kept = before & {one["id"] for one in _read_alerts(stage)}
    yield Check(
        "e",
        "  the appliance after that",
        "blocks and records, as before",
        f"{answer.text}; new alerts: {len(found)}; coverage: {status}; "
        f"{len(kept)} of {len(before)} alerts of before; health: {told}",
        fine
        and answer.kind is AnswerKind.SILENT
        and bool(found)
        and status == "inspected"
        and kept == before,
    )


def _read_alerts(stage: Stage) -> list[Any]:
    found: list[Any] = stage.run_hairpin("alerts", "--limit", "1000")["items"]
    return found


def _find_new(stage: Stage, before: set[str], attempt: Attempt) -> list[Any]:
    return [
        one for one in _read_alerts(stage) if one["id"] not in before and is_alert_of(one, attempt)
    ]


def run_restore(stage: Stage) -> Iterator[Check]:
    """(g) Out again, as docs/deploy.md says: policies, VM, host."""
    state = stage.state
    stage.say("(g) taking the policies, the VM and the host's preparation away")
    nothing = stage.directory / "nothing.yaml"
    nothing.write_text("{apiVersion: hairpin/v1, kind: List, items: []}\n")
    stage.run_hairpin("policy", "apply", str(nothing))
    began = time.monotonic()
    send_vm_command(state, "system_powerdown")
    off = wait_until(lambda: not is_vm_running(state), OFF_SECONDS, 0.5)
    yield Check(
        "g",
        "the VM is switched off",
        "ends by itself",
        f"after {render_seconds(time.monotonic() - began)}" if off else "still runs",
        bool(off),
    )
    try:
        run_on_host(state, "restore")
        changes = find_switch_changes(state)
    except CommandFailed as fault:
        changes = [fault.reason]
    left = [one for one in os.listdir(state.directory) if one.startswith("host-")]
    yield Check(
        "g",
        "hairpin host restore --apply",
        "the switch as before",
        f"differs: {', '.join(changes)}" if changes else f"no difference; files left: {len(left)}",
        not changes and not left,
    )
