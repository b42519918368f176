"""What the fields of a policy document may hold: their forms, said once, and how much of each."""

from __future__ import annotations

import re

KINDS = ("VirtualMachine", "Zone", "SteeringPolicy")
MAX_MACHINES = 16_000
MAX_ZONES = 1_000
MAX_POLICIES = 2_000
MAX_TAGS = 32
MAX_ADDRESSES = 16
MAX_PEERS = 64
MAX_SERVICES = 32
MAX_PORTS = 64
PRIORITIES = (1, 10_000)
SHUN_SECONDS = (1, 3_600)
SHORTCUT_FLOWS = (1, 10_000)

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NAME_RULE = "a name: 1 to 63 of a-z, 0-9 and -, not beginning or ending with -"
VM_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,62}[A-Za-z0-9])?")
VM_ID_RULE = "a vm-id: 1 to 64 of letters, digits and . _ : -"
UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
ADDRESS = re.compile(r"[0-9A-Fa-f.:]{2,45}")
ADDRESS_RULE = "an IPv4 or IPv6 address without a prefix"
TAG = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
TAG_RULE = "a tag: 1 to 63 of letters, digits and . _ / -"
# Reasons end up in logs, in alerts and on terminals: one printable line.
REASON = re.compile(
    r"(?=.*\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]{1,200}"
)
REASON_PATTERN = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]{0,200}$"
"""The same as a JSON schema says it; may be empty."""
REASON_RULE = "a reason: one line of 1 to 200 characters"
PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
