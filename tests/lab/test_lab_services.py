"""How Hairpin's processes are started in a lab: which user, which rights, what they can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance.lab import LabState, expose, find_process, processes, services
from steering.run import run
from tests.support.lab import wait_until

pytestmark = pytest.mark.lab

LOOK = """
import json, os, pathlib, sys
import appliance.settings, steering.model, yaml, pydantic
status = pathlib.Path("/proc/self/status").read_text()
keys = ("CapEff", "CapPrm", "CapBnd", "CapAmb", "NoNewPrivs")
found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(keys)}
print(json.dumps({"uid": os.getuid(), "gid": os.getgid(), **found}))
"""


def run_as(state: LabState, role: str) -> dict[str, object]:
    """What a process sees that is started as ``role`` is, up to its own command."""
    argv = services.build_service_argv(state, role)
    program = argv.index("appliance.cli") - 1
    argv = [*argv[:program], "-c", LOOK]
    env = {**services.build_env(), processes.MARKER: state.name}
    found: dict[str, object] = json.loads(run(argv, env=env).stdout)
    return found


def test_serve_has_its_own_user_and_no_capability_and_reads_the_program(bare_lab: LabState) -> None:
    user = services.find_user()
    assert run_as(bare_lab, services.SERVE) == {
        "uid": user.pw_uid,
        "gid": user.pw_gid,
        "CapEff": "0000000000000000",
        "CapPrm": "0000000000000000",
        "CapBnd": "0000000000000000",
        "CapAmb": "0000000000000000",
        "NoNewPrivs": "1",
    }


def test_observe_has_the_right_to_raw_sockets_and_no_other(lab: LabState) -> None:
    """It enters its namespace and its control group as root, then gives up all but one capability."""
    raw = f"{1 << 13:016x}"
    user = services.find_user()

    def read_status() -> dict[str, str]:
        text = Path(f"/proc/{find_process(lab, services.OBSERVE)[0]}/status").read_text()
        return {
            line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.split()[1:]
        }

    assert wait_until(lambda: read_status()["Uid"] == str(user.pw_uid))
    found = read_status()
    assert {found[key] for key in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {raw}
    assert found["NoNewPrivs"] == "1"
    state = json.loads((lab.run_dir / "observe" / "state.json").read_text())
    assert state["isolation"]["group"].startswith("cgroup")
    assert state["isolation"]["reasons"] == []


def test_a_tree_under_a_closed_directory_is_readable_and_nothing_beside_it(
    bare_lab: LabState, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    needed = closed / "deep/tree"
    needed.mkdir(parents=True)
    (needed / "code.py").write_text("code")
    (closed / "secret").write_text("secret")
    closed.chmod(0o700)
    for above in (tmp_path, *tmp_path.parents):
        if not expose.is_enterable(above) and above != Path("/"):
            above.chmod(0o711)  # pytest's own directories are closed as well
    unshare = ["unshare", "--mount", "--propagation", "private", "--"]
    as_user = ["setpriv", "--reuid=hairpin", "--regid=hairpin", "--init-groups", "--"]
    script = f"cat {needed}/code.py; ls {closed}; touch {needed}/x || echo refused"
    argv = [*unshare, *expose.LAUNCH, str(needed), "--", *as_user, "sh", "-c", script]
    env = {**services.build_env(), processes.MARKER: bare_lab.name}
    before = Path("/proc/self/mounts").read_text()
    assert run(argv, env=env).stdout == "codedeep\nrefused\n"
    assert Path("/proc/self/mounts").read_text() == before
    assert (closed / "secret").read_text() == "secret"
    assert list(bare_lab.directory.glob("cover-*")) == []
