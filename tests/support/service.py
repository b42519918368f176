"""The management service as `hairpin serve` wires it, in the test's own process, on the world of `shortcut_world`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.app import _serve
from appliance.client import Client, Place
from appliance.settings import Settings
from tests.support.dummy_switch import BRIDGE
from tests.support.shortcut_world import LANES, VMS
from tests.support.tls_switch import ADDRESS, find_free_ports
from tests.support.waiting import wait_until


@dataclass(frozen=True)
class Service:
    client: Client
    settings: Settings

    async def ask(self, method: Callable[..., Any], *values: Any) -> Any:
        """What a method of the client answers; the service runs on this very loop meanwhile."""
        return await asyncio.to_thread(method, *values)


def build_settings(directory: Path, switch: Mapping[str, Any]) -> Settings:
    """``switch``: how it is reached, as in the settings; ``directory``: where state and run directories are."""
    lanes = [
        {
            "profile": lane.profile,
            "vlan": lane.vlan,
            "queues": list(lane.queues),
            **{
                name: {"interface": leg.interface, "device": leg.device}
                for name, leg in zip(("legA", "legB", "legC"), lane.legs, strict=True)
            },
        }
        for lane in LANES
    ]
    (port,) = find_free_ports(1)
    return Settings.model_validate(
        {
            "stateDir": directory / "state",
            "runDir": directory / "run",
            "lanes": lanes,
            "switch": {"bridge": BRIDGE, **switch},
            "api": {"port": port},
        }
    )


@contextlib.asynccontextmanager
async def open_service(settings: Settings, *, whole: bool = True) -> AsyncIterator[Service]:
    """Given once the service has found all the VMs; it must not have ended by itself in the end.

    ``whole`` False: its store is damaged, so that it finds none.
    """
    settings.run_dir.mkdir(exist_ok=True)
    serving = asyncio.create_task(_serve(settings))
    place = Place(f"http://{ADDRESS}:{settings.api.port}", settings.token_file, "the test")
    try:
        await wait_until(settings.token_file.exists)
        client = Client(place)
        if whole:
            await wait_until(lambda: _has_vms(client, serving), 20.0)
        yield Service(client, settings)
        assert not serving.done(), serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def _has_vms(client: Client, serving: asyncio.Task[int]) -> bool:
    if serving.done():
        raise RuntimeError(f"the service ended: {serving}")
    try:
        found = await asyncio.to_thread(client.find_vms)
    except Exception:
        return False
    return len(found.items) == len(VMS)
