"""`llmtrain doctor`: will a run start here, and last? Without torch, on a login or a compute node."""

import json
import os
import socket
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A run: its folder, data and logging are looked at too.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a field of the config.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Look at this machine for what stops runs, with a remedy for each. Exit code 1 where something is wrong."""
    from llmtrain.config_file import load_config
    from llmtrain.doctor.examine import examine

    loaded = None if config is None else load_config(config, overrides)
    found = examine(loaded, os.environ, f"llmtrain prepare --config {config}")
    wrong = sum(finding.level == "wrong" for finding in found)
    if as_json:
        print(json.dumps({"node": socket.gethostname(), "wrong": wrong, "findings": [f._asdict() for f in found]}))
    else:
        for finding in found:
            print(f"{finding.level:<5}  {finding.probe:<11}  {finding.found}")
            if finding.remedy:
                print(f"{'':<20}> {finding.remedy}")
        print(f"{wrong} thing{'s' * (wrong != 1)} wrong")
    if wrong:
        raise typer.Exit(1)
