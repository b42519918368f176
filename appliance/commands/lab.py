"""`hairpin lab`: a hypervisor in network namespaces."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance.commands import options
from appliance.commands.output import clean, print_json, print_line, print_note, print_table

app = typer.Typer(help="A hypervisor with VMs in network namespaces.", no_args_is_help=True)

DEFAULT_VMS = 6  # as in appliance.lab, which takes long to import; a test compares them

Name = Annotated[str, typer.Option("--name", help="Which lab.")]


@app.command("up")
def up(
    vms: Annotated[int, typer.Option("--vms", help="How many VMs, over 3 zones.")] = DEFAULT_VMS,
    name: Name = "lab",
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Start the appliance in it.")
    ] = True,
    super_packets: Annotated[
        bool,
        typer.Option(
            "--super-packets/--no-super-packets",
            help="Let switch and links carry packets of up to 64 KiB.",
        ),
    ] = True,
    json: options.Json = False,
) -> None:
    """Make a lab: VMs, a switch, an inspector and the management service."""
    from appliance.lab import bring_up, read_status

    state = bring_up(
        name,
        vms,
        serve=serve,
        super_packets=super_packets,
        progress=lambda line: print_note(clean(line)),
    )
    if json:
        return print_json(read_status(name).document())
    print_line(f"lab {state.name} is up with {len(state.vms)} VMs")
    print_line("try: hairpin vms; hairpin lab exec VM -- COMMAND; hairpin lab down")


@app.command("down")
def down(name: Name = "lab", json: options.Json = False) -> None:
    """Take a lab down, whatever is left of it."""
    from appliance.lab import take_down

    was_up = take_down(name, progress=lambda line: print_note(clean(line)))
    if json:
        return print_json({"name": name, "wasUp": was_up})
    print_line(f"lab {name} is down" if was_up else f"lab {name} was not up")


@app.command("status")
def status(name: Name = "lab", json: options.Json = False) -> None:
    """Show what stands of a lab; status 1 unless all of it does."""
    from appliance.lab import read_status

    found = read_status(name)
    if json:
        print_json(found.document())
    else:
        print_line(
            f"lab {found.name}: {'up' if found.whole else found.phase if found.standing else 'down'}"
            + (f", service at {found.url}" if found.url else "")
        )
        if found.vms:
            columns = ("vm", "zone", "ipv4", "ipv6", "up")
            rows = [
                [
                    vm.get(key, "") if key != "up" else ("yes" if vm.get("up") else "no")
                    for key in ("name", "zone", "address4", "address6", "up")
                ]
                for vm in found.vms
            ]
            print_table(columns, rows, "")
        if found.processes:
            rows = [
                [one["role"], one["pid"], "yes" if one["running"] else "no", one["log"]]
                for one in found.processes
            ]
            print_table(("process", "pid", "running", "log"), rows, "")
        for problem in found.problems:
            print_line(f"problem: {clean(problem)}")
    if not found.whole:
        raise typer.Exit(1)


@app.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def execute(
    vm: Annotated[str, typer.Argument(metavar="VM", help="The VM's name.")],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="What to run, with its arguments.")
    ],
    name: Name = "lab",
) -> None:
    """Run a command inside a VM; ends with the command's own status."""
    from appliance.lab import run_in

    argv = command[1:] if command[:1] == ["--"] else command
    raise typer.Exit(run_in(name, vm, argv))
