"""The scenario of the demonstration, step by step; each gives the rows that it adds to the table."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.lab.demo_policies import (
    ADDED_POLICY,
    DIRECT_REASON,
    EXPLOITS,
    LOG4SHELL,
    VERSIONS,
    Attempt,
    Exploit,
    build_documents,
    find_policy,
)
from appliance.lab.demo_probe import Answer, AnswerKind
from appliance.lab.demo_report import Check, render_seconds
from appliance.lab.demo_stage import ANSWER_SECONDS, Stage, wait_until

ALERT_SECONDS = 15.0
BLIND = ("web-2", "db-1")


def run_opening(stage: Stage) -> Iterator[Check]:
    """The VMs are found and named, and the first policies put in force."""
    stage.say("applying the first policies")
    applied = apply_documents(stage, with_added=False)
    count = applied["summary"]
    yield Check(
        "",
        "hairpin policy apply",
        "in force",
        f"revision {applied['revision']}, {count['added']} flows and groups, "
        f"{render_seconds(applied['seconds'])}",
        bool(applied["applied"]) and count["added"] > 0,
    )
    vms = stage.run_hairpin("vms")["items"]
    zones = sorted({zone for vm in vms for zone in vm["zones"]})
    names = {vm["name"] for vm in vms if vm["inScope"]}
    yield Check(
        "",
        "hairpin vms",
        "6 VMs in app, db, web",
        f"{len(names)} VMs in {', '.join(zones)}",
        names == {vm.name for vm in stage.state.vms} and zones == ["app", "db", "web"],
    )


def apply_documents(stage: Stage, *, with_added: bool) -> Any:
    return stage.run_hairpin("policy", "apply", write_documents(stage, with_added=with_added))


def write_documents(stage: Stage, *, with_added: bool) -> str:
    path = stage.directory / ("policies-more.yaml" if with_added else "policies.yaml")
    path.write_text(build_documents(stage.state.vms, with_added=with_added))
    return str(path)


def run_benign(stage: Stage) -> Iterator[Check]:
    """(a) What is harmless passes, inspected or direct."""
    stage.say("(a) benign requests")
    pairs = (("web-1", "app-1", "inspected"), ("db-1", "db-2", "direct"))
    for source, target, status in pairs:
        attempts = [Attempt(None, source, target, version) for version in VERSIONS]
        # The first connection after an apply may meet ND or ARP that is still being learned.
        answers = wait_until(lambda tries=attempts: _want_200(stage.try_all(tries)), 15.0)  # type: ignore[misc]
        answers = answers or stage.try_all(attempts)
        pair = find_pair(stage, source, target)
        texts = [
            f"{one.version}: {answer.text}" for one, answer in zip(attempts, answers, strict=True)
        ]
        how = pair["status"] + (f", {pair['parts'][0]['policy']}" if pair["parts"] else "")
        yield Check(
            "a",
            f"benign HTTP, {source} -> {target}, {status} pair",
            "HTTP 200",
            f"{', '.join(texts)} ({how})",
            all(answer.is_200 for answer in answers)
            and pair["status"] == status
            and (status != "direct" or DIRECT_REASON in json.dumps(pair)),
        )


def _want_200(answers: list[Answer]) -> list[Answer]:
    return answers if all(answer.is_200 for answer in answers) else []


def find_pair(stage: Stage, source: str, target: str) -> Any:
    """What `hairpin coverage` says of the pair."""
    pairs = stage.run_hairpin("coverage", "--vm", source, "--limit", "1000")["items"]
    wanted = (source, target)
    return next(
        one for one in pairs if (one["source"]["name"], one["destination"]["name"]) == wanted
    )


def run_exploits(stage: Stage) -> Iterator[Check]:
    """(b) Four exploits over IPv4 and IPv6, from either side of the inspected pair."""
    attempts = [
        Attempt(exploit, source, target, version)
        for exploit in EXPLOITS
        for source, target in (("web-1", "app-1"), ("app-1", "web-1"))
        for version in VERSIONS
    ]
    stage.say(f"(b) {len(attempts)} exploits at once; each waits {ANSWER_SECONDS} s for an answer")
    for outcome in attack(stage, attempts):
        yield check_blocked(stage, "b", outcome)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an exploit: what the attacker got, and the alert (None for none)."""

    attempt: Attempt
    answer: Answer
    alert: Any
    tries: int


def attack(stage: Stage, attempts: Sequence[Attempt], tries: int = 3) -> list[Outcome]:
    """Make all the attempts at once and look for their alerts.

    On a busy machine a lane that is closed on failure may close for a moment, and then an exploit
    does not reach the engine: one that got no answer and made no alert is tried again, at most
    ``tries`` times in all. One that was answered is not.
    """
    outcomes: dict[Attempt, Outcome] = {}
    for count in range(1, tries + 1):
        left = [one for one in attempts if one not in outcomes or _is_open(outcomes[one])]
        if not left:
            break
        answers = stage.try_all(left)
        stage.say("looking for the alerts")
        alerts = find_alerts(stage, left)
        for attempt, answer in zip(left, answers, strict=True):
            outcomes[attempt] = Outcome(attempt, answer, alerts.get(attempt), count)
    return [outcomes[one] for one in attempts]


def _is_open(outcome: Outcome) -> bool:
    answered = outcome.answer.kind is AnswerKind.ANSWERED
    return not answered and (outcome.answer.kind is not AnswerKind.SILENT or outcome.alert is None)


def check_blocked(stage: Stage, step: str, outcome: Outcome) -> Check:
    """One exploit: the attacker got nothing, the server never saw it, and it is recorded."""
    attempt, alert = outcome.attempt, outcome.alert
    seen = stage.count_seen(attempt)
    told = "no alert"
    if alert is not None and attempt.exploit is not None:
        ends = f"{alert['source']['vm']['name']} -> {alert['destination']['vm']['name']}"
        told = f"alert: {alert['verdict']}, {ends}, {alert['policy']}, {attempt.exploit.cve}"
    again = "" if outcome.tries == 1 else f" ({outcome.tries} tries)"
    return Check(
        step,
        str(attempt),
        "blocked, alert",
        f"{outcome.answer.text}{again}; server saw {seen}; {told}",
        outcome.answer.kind is AnswerKind.SILENT and seen == 0 and alert is not None,
    )


def find_alerts(stage: Stage, attempts: Sequence[Attempt]) -> dict[Attempt, Any]:
    """The alert of each attempt, as `hairpin alerts` gives it; waits for those that are missing."""

    def look() -> dict[Attempt, Any]:
        listed = stage.run_hairpin("alerts", "--limit", "1000")["items"]
        found.update(
            {one: alert for one in attempts for alert in listed if is_alert_of(alert, one)}
        )
        return found if len(found) == len(attempts) else {}

    found: dict[Attempt, Any] = {}
    wait_until(look, ALERT_SECONDS)
    return found


def is_alert_of(alert: Any, attempt: Attempt) -> bool:
    """Whether an alert tells of this attempt, all of it: VMs, policy, verdict, CVE, IP version."""
    ends = [(alert[end]["vm"] or {}).get("name") for end in ("source", "destination")]
    exploit: Exploit | None = attempt.exploit
    return (
        exploit is not None
        and ends == [attempt.source, attempt.target]
        and (":" in alert["destination"]["address"]) == (attempt.version == "IPv6")
        and exploit.cve in alert["signature"]["cves"]
        and alert["verdict"] == "blocked"
        and alert["policy"] == find_policy(attempt.source, attempt.target)
    )


def run_blind(stage: Stage) -> Iterator[Check]:
    """(c) The same exploits on a pair that no policy names pass, and the product says so."""
    stage.say("(c) the same exploits on a pair that no policy names")
    attempts = [Attempt(one, *BLIND, version) for one in EXPLOITS for version in VERSIONS]
    answers = stage.try_all(attempts)
    for exploit in EXPLOITS:
        mine = [
            (one, answer)
            for one, answer in zip(attempts, answers, strict=True)
            if one.exploit is exploit
        ]
        seen = [stage.count_seen(one) for one, _ in mine]
        texts = [f"{one.version}: {answer.text}" for one, answer in mine]
        yield Check(
            "c",
            f"{exploit.name}, {BLIND[0]} -> {BLIND[1]}, no policy",
            "passes",
            f"{', '.join(texts)}; server saw {sum(seen)}",
            all(answer.kind is AnswerKind.ANSWERED for _, answer in mine) and all(seen),
        )
    status = find_pair(stage, *BLIND)["status"]
    summary = stage.run_hairpin("coverage", "--limit", "1")["summary"]
    yield Check(
        "c",
        f"hairpin coverage, {BLIND[0]} -> {BLIND[1]}",
        "a blind spot",
        f"{status}; {summary['blind']} of {summary['pairs']} pairs are blind",
        status == "blind",
    )


def run_policy(stage: Stage) -> Iterator[Check]:
    """(d) A policy for the blind spot: planned, applied, and the same exploit is blocked."""
    stage.say("(d) planning and applying a policy for that pair")
    file = write_documents(stage, with_added=True)
    plan = stage.run_hairpin("policy", "plan", file)
    pairs = {
        (one["source"]["name"], one["destination"]["name"]): (one["before"], one["after"])
        for one in plan["pairs"]
    }
    answer = stage.try_it(Attempt(LOG4SHELL, *BLIND, "IPv4"))
    status = find_pair(stage, *BLIND)["status"]
    yield Check(
        "d",
        f"hairpin policy plan, with {ADDED_POLICY}",
        "changes told, none made",
        f"{plan['summary']['added']} to add, {BLIND[0]} -> {BLIND[1]}: "
        f"{' -> '.join(map(str, pairs.get(BLIND, ())))}; still {status}, exploit: {answer.text}",
        not plan["applied"]
        and plan["summary"]["added"] > 0
        and pairs.get(BLIND) == ("blind", "inspected")
        and status == "blind"
        and answer.is_200,
    )
    applied, blocked_after, answer = apply_under_attack(stage, file)
    attempt = Attempt(LOG4SHELL, *BLIND, "IPv4")
    yield Check(
        "d",
        f"hairpin policy apply, under {LOG4SHELL.name}",
        "blocked",
        f"{answer.text} {render_seconds(blocked_after)} after the command's start; "
        f"apply itself: {render_seconds(applied['seconds'])}",
        bool(applied["applied"]) and answer.kind is AnswerKind.SILENT,
    )
    before = {one: stage.count_seen(one) for one in _both(attempt)}
    outcomes = attack(stage, list(before))
    passed = sum(stage.count_seen(one) - count for one, count in before.items())
    told = sum(one.alert is not None for one in outcomes)
    status = find_pair(stage, *BLIND)["status"]
    texts = [f"{one.attempt.version}: {one.answer.text}" for one in outcomes]
    yield Check(
        "d",
        f"{LOG4SHELL.name}, {BLIND[0]} -> {BLIND[1]}, after that",
        f"blocked, alert of {ADDED_POLICY}",
        f"{', '.join(texts)}; server saw {passed}; alerts: {told}; coverage: {status}",
        all(one.answer.kind is AnswerKind.SILENT for one in outcomes)
        and passed == 0
        and told == len(outcomes)
        and status == "inspected",
    )


def _both(attempt: Attempt) -> list[Attempt]:
    return [Attempt(attempt.exploit, attempt.source, attempt.target, one) for one in VERSIONS]


def apply_under_attack(stage: Stage, file: str) -> tuple[Any, float | None, Answer]:
    """Apply while the exploit is tried one time after the other, until one is not answered.

    The apply's report; the seconds from the command's start to the start of the first exploit
    that got no answer (so a little more than the truth), None if all were answered; the last answer.
    """
    attempt = Attempt(LOG4SHELL, *BLIND, "IPv4")
    done: list[Any] = []
    faults: list[BaseException] = []

    def apply() -> None:
        try:
            done.append(stage.run_hairpin("policy", "apply", file))
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=apply)
    began = time.monotonic()
    thread.start()
    deadline = began + 20.0
    try:
        while True:
            tried = time.monotonic()
            answer = stage.try_it(attempt)
            if answer.kind is AnswerKind.SILENT:
                break
            if faults or tried > deadline:
                break
    finally:
        thread.join()
    if faults:
        raise faults[0]
    blocked_after = tried - began if answer.kind is AnswerKind.SILENT else None
    return done[0], blocked_after, answer
