"""A stand-in for the parts of conda's command line that Snakemake 9 calls.

It is not conda: it solves and installs with py-rattler, the library behind pixi, so that
`snakemake --sdm conda` can be tested where no conda is installed. Channel names are folders in
$CHANNELS. It runs where conda-requirements.txt is installed.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rattler import Channel, ChannelConfig, MatchSpec, Platform, VirtualPackage, install, solve

VERSION = "24.7.1"
"""The least that Snakemake takes."""

PREFIX = Path(sys.argv[0]).resolve().parents[1]


def option(arguments: list[str], *names: str) -> str:
    """The value of an option."""
    [place] = [arguments.index(name) for name in names if name in arguments]
    return arguments[place + 1]


async def make(prefix: str, specs: list[str], channels: list[str]) -> None:
    """Solve for `specs` and install what is found."""
    config = ChannelConfig(channel_alias=Path(os.environ["CHANNELS"]).as_uri() + "/")
    records = await solve(
        sources=[Channel(name, config) for name in channels if name != "nodefaults"],
        specs=[MatchSpec(spec) for spec in specs],
        platforms=[Platform.current(), Platform("noarch")],
        virtual_packages=VirtualPackage.detect(),
        add_pip_as_python_dependency=False,
    )
    await install(records=records, target_prefix=prefix, show_progress=False)


def create(file: Path, prefix: str) -> None:
    """Make the environment of a file, its pip section last."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    specs = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    asyncio.run(make(prefix, specs, content["channels"]))
    for entry in content["dependencies"]:
        if isinstance(entry, dict):
            pip_install(prefix, entry["pip"])


def pip_install(prefix: str, lines: list[str]) -> None:
    """As conda does: from a file of requirements, seeing nothing of the caller's environment."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = [f"{prefix}/bin/python", "-m", "pip", "install", "--quiet", "-r", file.name]
        subprocess.run(command, env=environment, check=True)


def info() -> dict[str, Any]:
    """What Snakemake asks before it begins."""
    return {
        "conda_version": VERSION,
        "conda_prefix": str(PREFIX),
        "root_prefix": str(PREFIX),
        "platform": str(Platform.current()),
        "envs_dirs": [str(PREFIX / "envs")],
    }


def main(arguments: list[str]) -> None:
    """Do one command."""
    match arguments:
        case ["--version"]:
            print("conda", VERSION)
        case ["info", *_]:
            print(json.dumps(info()))
        case ["config", *_]:
            print(json.dumps({"get": {"channel_priority": "strict"}}))
        case ["env", "create", *rest]:
            create(Path(option(rest, "-f", "--file")), option(rest, "-p", "--prefix"))
        case ["clean", *_]:
            pass  # there is no copy of what was downloaded
        case _:
            sys.exit(f"the stand-in for conda does not know: {' '.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # py-rattler's threads may crash an interpreter that ends
