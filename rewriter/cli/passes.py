"""`rewriter passes`: the methods there are."""

from __future__ import annotations

from rewriter.cli.shared import JsonOption, command, console, print_json


@command("passes")
def list_passes(as_json: JsonOption = False) -> None:
    """List the passes: name, contract, first line of the description."""
    from rewriter.plan import first_line
    from rewriter.protocol import passes

    rows = [
        {"name": name, "contract": str(known.contract), "about": first_line(known)}
        for name, known in passes().items()
    ]
    if as_json:
        return print_json({"passes": rows})
    from rich.table import Table

    table = Table("pass", "contract", "what", box=None, header_style="dim")
    for row in rows:
        table.add_row(*row.values())
    console().print(table)
