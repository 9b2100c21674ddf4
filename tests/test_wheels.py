"""Fetching pinned wheels, offline: a small wheel stands in for real ones, a function for pip."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from icrouting.runtime import wheels

MEMBERS = {
    "box/data/rows.txt": "rows",
    "box/data/deep/more.txt": "more",
    "box/data/__init__.py": "raise SystemExit",
    "box/__init__.py": "raise SystemExit",
    "box-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: box\nVersion: 1.0\n",
    "box-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\n",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICROUTING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A function that pins a wheel with the given members as "box".

    It returns the log of its downloads.
    """

    def pin_wheel(
        members: Mapping[str, str] = MEMBERS, member: str = "box/data/", links: tuple = ()
    ) -> list[str]:
        source = tmp_path / "box-1.0-py3-none-any.whl"
        with zipfile.ZipFile(source, "w") as archive:
            for name, text in members.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = (
                    (stat.S_IFLNK if name in links else stat.S_IFREG) | 0o644
                ) << 16
                archive.writestr(info, text)
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
        entry = {"requirement": "box==1.0", "sha256": sha256, "member": member, "licence": "MIT"}
        monkeypatch.setitem(wheels.WHEELS, "box", entry)
        downloads = []

        def download(requirement: str, sha256: str, folder: Path) -> Path:
            downloads.append(requirement)
            return Path(shutil.copy(source, folder))

        monkeypatch.setattr(wheels, "_download", download)
        return downloads

    return pin_wheel


def pip_that_fails(stderr: str) -> Callable[..., SimpleNamespace]:
    return lambda *args, **kwargs: SimpleNamespace(returncode=1, stdout="", stderr=stderr)


def test_folder_of_a_wheel_is_extracted_without_its_code(cache, pin):
    pin()
    folder = wheels.fetch("box")
    assert folder.is_relative_to(cache)
    assert folder.name == "data"
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}
    assert files == {"rows.txt": "rows", "deep/more.txt": "more"}


def test_single_file_of_a_wheel_is_extracted_alone(cache, pin):
    pin(member="box/data/rows.txt")
    file = wheels.fetch("box")
    assert file.read_text() == "rows"
    assert os.listdir(file.parent) == ["rows.txt"]


def test_second_fetch_does_not_download(cache, pin):
    downloads = pin()
    assert wheels.fetch("box") == wheels.fetch("box")
    assert downloads == ["box==1.0"]


def test_cache_holds_nothing_but_the_asset_after_a_fetch(cache, pin):
    pin()
    folder = wheels.fetch("box")
    assert os.listdir(cache) == [folder.parent.name]


def test_nothing_is_printed_by_a_fetch_into_a_pipe(cache, pin, capfd):
    pin()
    wheels.fetch("box")
    assert capfd.readouterr() == ("", "")


def test_cache_folder_is_in_the_home_folder_unless_named(monkeypatch):
    monkeypatch.delenv("ICROUTING_CACHE", raising=False)
    assert wheels.cache_folder() == Path.home() / ".cache" / "icrouting"
    monkeypatch.setenv("ICROUTING_CACHE", "~/elsewhere")
    assert wheels.cache_folder() == Path.home() / "elsewhere"


def test_unknown_name_is_answered_with_near_matches(cache):
    with pytest.raises(ValueError, match="unknown pinned wheel 'stiacc': did you mean staicc"):
        wheels.fetch("stiacc")


@pytest.fixture
def served(pin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The wheel "box", which pip itself finds in a folder.

    So nothing but the index is a stand-in.
    """
    download = wheels._download
    pin()
    monkeypatch.setattr(wheels, "_download", download)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return wheels.WHEELS["box"]


def test_wheel_with_the_pinned_digest_is_taken_from_pip(cache, served):
    assert (wheels.fetch("box") / "rows.txt").read_text() == "rows"


def test_wheel_with_another_digest_is_refused_unopened_and_not_kept(cache, served, monkeypatch):
    monkeypatch.setitem(wheels.WHEELS, "box", {**served, "sha256": "0" * 64})
    monkeypatch.setattr(wheels.zipfile, "ZipFile", None)
    with pytest.raises(
        ValueError, match=f"Expected sha256 {'0' * 64}, Got {served['sha256']}.*nothing was kept"
    ) as error:
        wheels.fetch("box")
    assert "\n" not in str(error.value)
    assert not os.listdir(cache)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_download_that_dies_half_way_leaves_nothing(cache, pin, monkeypatch, interruption):
    pin()

    def die(requirement: str, sha256: str, folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        raise interruption

    monkeypatch.setattr(wheels, "_download", die)
    with pytest.raises(interruption):
        wheels.fetch("box")
    assert not os.listdir(cache)


def test_what_a_killed_process_left_is_not_used(cache, pin):
    pin()
    (cache / ".unfinished-old" / "ready" / "data").mkdir(parents=True)
    assert (wheels.fetch("box") / "rows.txt").read_text() == "rows"


def test_full_disk_while_extracting_is_one_line_and_leaves_nothing(cache, pin, monkeypatch):
    pin()

    def write_half(source, target):
        target.write(b"ro")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", write_half)
    with pytest.raises(OSError, match=r"cannot keep box==1\.0 in .*ICROUTING_CACHE") as error:
        wheels.fetch("box")
    assert error.value.errno == errno.ENOSPC
    assert "\n" not in str(error.value)
    assert not os.listdir(cache)


def test_full_disk_reported_by_pip_is_an_error_of_the_disk(cache, monkeypatch):
    reason = (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    )
    monkeypatch.setattr(wheels.subprocess, "run", pip_that_fails(reason))
    with pytest.raises(OSError, match="free some space") as error:
        wheels.fetch("staicc")
    assert error.value.errno == errno.ENOSPC


def test_cache_folder_that_is_a_file_is_named_in_the_error(cache):
    cache.write_text("in the way")
    with pytest.raises(OSError, match="set ICROUTING_CACHE to a folder") as error:
        wheels.fetch("staicc")
    assert str(cache) in str(error.value)


def test_failed_download_is_one_line_with_the_last_reason_of_pip(cache, monkeypatch):
    stderr = (
        "WARNING: Retrying (Retry(total=0)) after connection broken\n"
        "ERROR: Could not find a version that satisfies the requirement StaICC==0.1.1\n"
        "ERROR: No matching distribution found for StaICC==0.1.1\n"
        "[notice] another line\n"
    )
    monkeypatch.setattr(wheels.subprocess, "run", pip_that_fails(stderr))
    with pytest.raises(
        ConnectionError, match=r"No matching distribution found .*the network"
    ) as error:
        wheels.fetch("staicc")
    assert "\n" not in str(error.value)
    assert not os.listdir(cache)


def test_missing_pip_says_how_to_install_it(cache, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", pip_that_fails("python: No module named pip\n"))
    with pytest.raises(ConnectionError, match="check that pip is installed"):
        wheels.fetch("staicc")


def test_pip_takes_wheels_only_and_no_dependencies(cache, monkeypatch):
    commands, pinned = [], []

    def run(command: list[str], cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        pinned.append((cwd / command[-1]).read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        wheels.fetch("staicc")
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(commands[0])
    assert pinned == [f"StaICC==0.1.1 --hash=sha256:{wheels.WHEELS['staicc']['sha256']}\n"]


@pytest.mark.parametrize(
    "name", ["box/data/../../../evil.txt", "box/data/..\\evil.txt", "box/data/C:evil.txt"]
)
def test_member_that_leads_out_of_the_folder_lands_inside(cache, pin, tmp_path, name):
    pin({**MEMBERS, name: "evil"})
    folder = wheels.fetch("box")
    (evil,) = tmp_path.rglob("*evil.txt")
    assert evil.is_relative_to(folder)


def test_absolute_member_is_not_taken(cache, pin, tmp_path):
    pin({**MEMBERS, f"{tmp_path}/box/data/evil.txt": "evil"})
    wheels.fetch("box")
    assert not list(tmp_path.rglob("evil.txt"))


def test_member_that_is_a_link_becomes_a_file(cache, pin, tmp_path):
    pin({**MEMBERS, "box/data/link": str(tmp_path)}, links=("box/data/link",))
    link = wheels.fetch("box") / "link"
    assert not link.is_symlink()
    assert link.read_text() == str(tmp_path)


def test_fetch_overtaken_by_another_process_returns_the_same_asset(cache, pin, monkeypatch):
    pin()
    download = wheels._download

    def be_overtaken(requirement: str, sha256: str, folder: Path) -> Path:
        monkeypatch.setattr(wheels, "_download", download)
        assert wheels.fetch("box").is_dir()
        return download(requirement, sha256, folder)

    monkeypatch.setattr(wheels, "_download", be_overtaken)
    folder = wheels.fetch("box")
    assert (folder / "rows.txt").read_text() == "rows"
    assert os.listdir(cache) == [folder.parent.name]
