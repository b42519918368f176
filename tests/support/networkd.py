"""A program: systemd-networkd with given files, in a network and mount namespace of its own.

python -m tests.support.networkd DIRECTORY-WITH-NETWORK-FILES LEG

Without udev, for which `/sys` is read-only, as in a container. Puts LEG into a bridge as `hairpin inspect`
does, and prints what `ip` says then, as JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NETWORKD = "/usr/lib/systemd/systemd-networkd"


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def read(*words: str) -> Any:
    return json.loads(run("ip", "-json", "-details", *words))


def main(directory: Path, leg: str) -> None:
    Path("/run/systemd").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", "/run/systemd")
    shutil.copytree(directory, "/run/systemd/network")
    run("mount", "--bind", "/sys", "/sys")
    run("mount", "-o", "remount,bind,ro", "/sys")
    with open("/run/systemd/log", "w+") as log:
        daemon = subprocess.Popen([NETWORKD], stdout=log, stderr=log)
        try:
            ends = time.monotonic() + 20
            while time.monotonic() < ends and not read("route"):
                time.sleep(0.2)
            before = read("address")
            run("ip", "link", "add", "lane", "type", "bridge")
            run("ip", "link", "set", leg, "up", "master", "lane")
            time.sleep(1.5)
            found = {
                "before": before,
                "after": read("address"),
                "links": read("link"),
                "routes": read("route"),
            }
        finally:
            daemon.terminate()
            daemon.wait(10)
        log.seek(0)
        print(json.dumps({**found, "log": log.read()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
