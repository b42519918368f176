"""The whole script that `hairpin host` prints for one host, as an administrator reads it.

``python -m tests.golden.test_host_script`` writes them anew.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from appliance.hosting.pki import Issued, Pki
from appliance.hosting.plan import build_plan
from appliance.hosting.script import render_script
from appliance.hosting.spec import build_ports, parse_spec
from appliance.hosting.vm import render_domain, render_seed
from tests.support.host_specs import SPEC, TOKEN

FOLDER = Path(__file__).parent / "host"
# Certificates are other ones each time; what stands for them here says which.
ENDS = ("CA", "host", "our", "API")
PKI = Pki(*(Issued(f"({end} certificate)\n", f"({end} key)\n") for end in ENDS))


def build_scripts() -> dict[str, str]:
    spec = parse_spec(SPEC)
    ports = build_ports(spec, bytes(32))
    domain, seed = render_domain(spec, ports), render_seed(spec, ports, PKI, TOKEN)
    plan = build_plan(spec, ports, PKI, domain, seed)
    return {
        "prepare.sh": render_script(plan.title, plan.prepare),
        "restore.sh": render_script(plan.title, plan.restore),
        "domain.xml": domain,
        "seed.yaml": seed,
    }


@pytest.mark.parametrize("name", ["prepare.sh", "restore.sh", "domain.xml", "seed.yaml"])
def test_it_is_what_was_reviewed(name: str) -> None:
    assert build_scripts()[name] == (FOLDER / name).read_text()


@pytest.mark.parametrize("name", ["prepare.sh", "restore.sh"])
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_a_plain_shell_takes_it(name: str, shell: str) -> None:
    subprocess.run([shell, "-n"], input=build_scripts()[name], text=True, check=True, timeout=10)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in build_scripts().items():
        (FOLDER / name).write_text(text)
