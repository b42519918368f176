"""The engine's own test of a ruleset (`suricata -T`), and what it says (Suricata 7, "Command line").

-T parses every rule before it gives up, so that one run names all that are wrong; a second must be
clean. Parsing its words is pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.rules.model import LeftOut, Rule, RulesetRefused
from steering.run import run_async

TRIAL_SECONDS = 300.0
TRIAL_MEMORY = 8 * 2**30
ROUNDS = 4
_FAULT = re.compile(r'error parsing signature "(?P<text>.*)')
_PLACE = re.compile(r'(?P<text>.*)" from file (?P<file>.*) at line (?P<line>\d+)\s*$')
_ERROR = re.compile(r"\b(?:Error|E)\b[:\]]? *(?:-- )?(?:[\w-]+: )?(?P<said>.+)")
_COUNTS = re.compile(r"(\d+) rules successfully loaded, (\d+) rules failed(?:, (\d+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule that the engine refused: its line (1 is the first), or None where the message, which
    Suricata cuts at 2,048 bytes, lost it; then ``text`` is how the rule begins.
    """

    line: int | None
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Trial:
    status: int
    loaded: int
    failed: int
    skipped: int
    faults: tuple[Fault, ...]
    words: str


def parse_trial(status: int, output: str) -> Trial:
    """What a run of `suricata -T -v` said."""
    faults = []
    reason = ""
    loaded = failed = skipped = 0
    for line in output.splitlines():
        if match := _FAULT.search(line):
            place = _PLACE.match(match["text"])
            number = int(place["line"]) if place else None
            text = place["text"] if place else match["text"]
            faults.append(Fault(number, text, reason or "Suricata can't parse it"))
            reason = ""
        elif match := _COUNTS.search(line):
            loaded, failed, skipped = (int(count or 0) for count in match.groups())
        elif match := _ERROR.search(line):
            reason = match["said"].strip()[:200]
    return Trial(status, loaded, failed, skipped, tuple(faults), output[-1500:])


def find_faulty(rules: Sequence[Rule], faults: Sequence[Fault]) -> dict[str, str]:
    """Key -> reason of the rules that the faults are about."""
    found = {}
    for fault in faults:
        if fault.line is not None and 0 < fault.line <= len(rules):
            found[rules[fault.line - 1].key] = fault.reason
        elif fault.line is None and fault.text:
            for rule in rules:
                if rule.text.startswith(fault.text):
                    found[rule.key] = fault.reason
    return found


def render_rules(rules: Sequence[Rule]) -> str:
    """One rule a line and nothing else: line numbers in the engine's words are places in ``rules``."""
    return "".join(f"{rule.text}\n" for rule in rules)


async def run_trial(suricata: Path, config: Path, rules: Path, log_dir: Path) -> Trial:
    """Raises CommandFailed when Suricata can't be started or takes too long."""
    log_dir.mkdir(parents=True, exist_ok=True)
    # At low priority: the engines inspect, and BFD proves it, on the same cores meanwhile.
    limits = ["nice", "-n", "10", "prlimit", f"--as={TRIAL_MEMORY}", "--core=0", "--"]
    argv = [*limits, str(suricata), "-T", "-v"]
    argv += ["-c", str(config), "-S", str(rules), "-l", str(log_dir)]
    # Without it, the configuration decides whether there is anything to read.
    env = {"SC_LOG_LEVEL": "Info"}
    ended = await run_async(argv, timeout=TRIAL_SECONDS, check=False, env=env)
    output = ended.stdout + ended.stderr
    log = log_dir / "suricata.log"
    if not _COUNTS.search(output) and log.is_file():
        output += log.read_text(errors="replace")[-(4 * 2**20) :]
    return parse_trial(ended.status, output)


async def find_loadable(
    suricata: Path, config: Path, rules: tuple[Rule, ...], work: Path, sources: dict[str, str]
) -> tuple[tuple[Rule, ...], Trial, tuple[LeftOut, ...]]:
    """Test ``rules``, leave out what the engine names, test again until it is clean.

    ``sources`` is key -> source name. Gives the rules, the clean trial, and what was left out.
    Raises RulesetRefused with the engine's words when it never is clean, CommandFailed.
    """
    left_out: list[LeftOut] = []
    staged = work / "suricata.rules"
    for _ in range(ROUNDS):
        staged.write_text(render_rules(rules), encoding="utf-8")
        trial = await run_trial(suricata, config, staged, work / "log")
        if not trial.faults and trial.status == 0 and trial.failed == 0:
            if trial.loaded + trial.skipped != len(rules):
                raise RulesetRefused(
                    f"Suricata loaded {trial.loaded} of {len(rules)} rules and named no fault",
                    "see the log",
                )
            return rules, trial, tuple(left_out)
        faulty = find_faulty(rules, trial.faults)
        if not faulty:
            raise RulesetRefused(
                f"Suricata refuses the configuration or the ruleset: {trial.words[-600:]}",
                f"try `{suricata} -T -c {config}`",
            )
        left_out += [
            LeftOut(rule.sid, rule.msg, sources.get(rule.key, ""), f"Suricata: {faulty[rule.key]}")
            for rule in rules
            if rule.key in faulty
        ]
        rules = tuple(rule for rule in rules if rule.key not in faulty)
    raise RulesetRefused(
        f"Suricata still finds rules to refuse after {ROUNDS} rounds", "leave the source out"
    )


def write_test_config(engine_data: Path, target: Path) -> Path:
    """Write a small configuration to test rules with, for when the caller has none."""
    found = {}
    for name in ("classification.config", "reference.config"):
        own = engine_data / name
        found[name] = own if own.is_file() else Path("/etc/suricata") / name
    target.write_text(render_test_config(found["classification.config"], found["reference.config"]))
    return target


def render_test_config(classification: Path, reference: Path) -> str:
    """The variables and protocols that rule feeds expect, and no outputs."""
    servers = "HTTP_SERVERS SMTP_SERVERS SQL_SERVERS DNS_SERVERS TELNET_SERVERS AIM_SERVERS"
    servers += " DC_SERVERS DNP3_SERVER DNP3_CLIENT MODBUS_CLIENT MODBUS_SERVER ENIP_CLIENT"
    servers += " ENIP_SERVER"
    # Feeds negate these, and no rule can be about what is not `any`.
    private = "[10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7]"
    ports = {
        "HTTP_PORTS": "80", "SHELLCODE_PORTS": "!80", "ORACLE_PORTS": "1521", "SSH_PORTS": "22",
        "DNP3_PORTS": "20000", "MODBUS_PORTS": "502", "FILE_DATA_PORTS": "[$HTTP_PORTS,110,143]",
        "FTP_PORTS": "21", "GENEVE_PORTS": "6081", "VXLAN_PORTS": "4789", "TEREDO_PORTS": "3544",
    }  # fmt: skip
    protocols = "http http2 ftp smtp tls ssh imap smb dcerpc dns ntp tftp ike krb5 snmp sip rdp rfb"
    protocols += " mqtt telnet nfs dhcp quic pgsql bittorrent-dht modbus dnp3 enip"
    lines = ["%YAML 1.1", "---", "vars:", "  address-groups:"]
    lines += [f'    HOME_NET: "{private}"', "    EXTERNAL_NET: any"]
    lines += [f'    {name}: "{private}"' for name in servers.split()]
    lines += ["  port-groups:", *(f'    {name}: "{value}"' for name, value in ports.items())]
    lines += [f'classification-file: "{classification}"', f'reference-config-file: "{reference}"']
    lines += ["app-layer:", "  protocols:"]
    for name in protocols.split():
        lines += [f"    {name}:", "      enabled: yes"]
        if name == "dns":
            lines += ["      tcp: {enabled: yes}", "      udp: {enabled: yes}"]
        if name == "http":
            # Suricata's own default is 4096 bytes of a body.
            lines += [
                "      libhtp:", "        default-config:", "          personality: IDS",
                "          request-body-limit: 100kb", "          response-body-limit: 100kb",
            ]  # fmt: skip
    return "\n".join(lines) + "\n"
