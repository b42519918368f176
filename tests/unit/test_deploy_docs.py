"""`docs/deploy.md`: its example is a good one, and every key of `host.yaml` is told."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from appliance.hosting.spec import HostLane, HostSpec, ManagementNetwork, ServiceVm, parse_spec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()


def find_keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_the_example_is_taken() -> None:
    found = re.search(r"```yaml\n(.*?)```", PAGE, re.S)
    assert found is not None
    spec = parse_spec(found[1])
    assert (spec.name, spec.bridge) == ("hv-1", "br-int")


def test_every_key_is_told() -> None:
    table = PAGE[PAGE.index("| key | default |") : PAGE.index("## 2. Prepare")]
    told = set(re.findall(r"`([A-Za-z.]+?)(?:\[\])?`", table))
    told |= {word.rpartition(".")[2] for word in told}
    for model in (HostSpec, HostLane, ServiceVm, ManagementNetwork):
        assert find_keys(model) <= told, find_keys(model) - told


def test_the_defaults_that_are_told_are_those_of_the_program() -> None:
    for key, name in (
        ("directory", "directory"), ("ovsDatabase", "ovs_database"), ("vmDirectory", "vm_directory"),
        ("bridge", "bridge"), ("tls", "tls"), ("taps", "taps"),
    ):  # fmt: skip
        assert f"| `{key}` | `{HostSpec.model_fields[name].default}` |" in PAGE
    numbers = {
        "vmMtu": "vm_mtu",
        "bfdMilliseconds": "bfd_milliseconds",
        "firstOfport": "first_ofport",
    }
    for key, name in numbers.items():
        assert f"| `{key}` | {HostSpec.model_fields[name].default} |" in PAGE
