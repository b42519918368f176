"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from appliance.commands.output import JSON_WANTED
from steering.model import Profile


def _want_json(value: bool) -> bool:
    JSON_WANTED.set(value)
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print JSON (docs/cli.md); errors too.", callback=_want_json, is_eager=True
    ),
]
Url = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="The service, as http://HOST:PORT.")
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="File with the service's token.")
]
Config = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="The appliance's settings file.")
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many.")]
Cursor = Annotated[
    str | None, typer.Option("--cursor", help="Go on where the page before ended (its `next`).")
]
Vm = Annotated[
    str | None, typer.Option("--vm", metavar="VM", help="Only with this VM (name or vm-id).")
]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="From then on (RFC 3339).")
]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Before then.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="IP", help="Only with this address.")
]
Sid = Annotated[int | None, typer.Option("--sid", min=1, help="Only of this rule.")]
Cve = Annotated[
    str | None, typer.Option("--cve", metavar="CVE", help="Only of this CVE, as CVE-2021-44228.")
]
Lane = Annotated[Profile | None, typer.Option("--lane", help="Only of this lane.")]
