"""The artifact store's contract, over a folder of files."""

import os
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix_ml.domain.errors import ArtifactStoreUnavailable, ModelLoadFailed
from phoenix_ml.infrastructure.artifacts.files import FileArtifacts

BYTES = b"the bytes of a model " * 1000
DIGEST = sha256(BYTES).hexdigest()
URI = f"sha256/{DIGEST[:2]}/{DIGEST}"

opened: list[str] | None = None


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open":
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


@pytest.fixture(scope="module")
def audit() -> None:
    """Python's own record of every file that is opened; a hook, once added, stays."""
    sys.addaudithook(note_opened)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def store(folder: Path) -> FileArtifacts:
    return FileArtifacts(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(BYTES)
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file with the very bytes that are asked for, but outside of the store."""
    path = tmp_path / "outside" / DIGEST
    path.parent.mkdir()
    path.write_bytes(BYTES)
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_an_artifact_is_stored_under_its_digest(store: FileArtifacts, folder: Path, source: Path) -> None:
    """The digest is the name, so a version can never come to mean other bytes."""
    stored = store.put(source)
    assert (stored.uri, stored.sha256) == (URI, DIGEST)
    path = store.fetch(stored.uri, stored.sha256)
    assert path == folder / URI
    assert path.read_bytes() == BYTES
    assert files_in(folder) == [URI]
    assert source.read_bytes() == BYTES


def test_an_empty_file_is_an_artifact_too(store: FileArtifacts, tmp_path: Path) -> None:
    """The store judges no contents; the engine does."""
    (tmp_path / "empty").touch()
    stored = store.put(tmp_path / "empty")
    assert store.fetch(stored.uri, stored.sha256).read_bytes() == b""


def test_the_same_bytes_are_stored_once(
    store: FileArtifacts, folder: Path, source: Path, outside: Path
) -> None:
    """Whatever the file's name."""
    first = store.put(source)
    again = store.put(outside)
    assert again == first
    assert files_in(folder) == [URI]


def test_other_bytes_get_another_name(store: FileArtifacts, folder: Path, source: Path) -> None:
    """Both stay readable."""
    first = store.put(source)
    source.write_bytes(BYTES + b"!")
    second = store.put(source)
    assert second.uri != first.uri
    assert store.fetch(first.uri, first.sha256).read_bytes() == BYTES
    assert store.fetch(second.uri, second.sha256).read_bytes() == BYTES + b"!"
    assert len(files_in(folder)) == 2


def test_a_stored_artifact_is_read_only(store: FileArtifacts, source: Path) -> None:
    """Nobody edits one by mistake."""
    stored = store.put(source)
    assert store.fetch(stored.uri, stored.sha256).stat().st_mode & 0o222 == 0


def test_an_artifact_that_is_gone_is_named(store: FileArtifacts, folder: Path) -> None:
    """The message leads an operator to the place where the file should be."""
    with pytest.raises(ModelLoadFailed, match="No such file") as caught:
        store.fetch(URI, DIGEST)
    assert str(folder / URI) in caught.value.message
    assert caught.value.details == {"uri": URI, "path": str(folder / URI)}


@pytest.mark.parametrize("damage", [b"", BYTES[:-1], BYTES[:-1] + b"?", BYTES + b"more"])
def test_a_damaged_artifact_is_refused_with_both_digests(
    store: FileArtifacts, folder: Path, source: Path, damage: bytes
) -> None:
    """A model that is not what was registered must never answer."""
    store.put(source)
    (folder / URI).chmod(0o644)
    (folder / URI).write_bytes(damage)
    with pytest.raises(ModelLoadFailed, match="damaged") as caught:
        store.fetch(URI, DIGEST)
    found = sha256(damage).hexdigest()
    for part in (str(folder / URI), found, DIGEST):
        assert part in caught.value.message
    assert caught.value.details["found_sha256"] == found
    assert caught.value.details["path"] == str(folder / URI)


def test_putting_the_same_bytes_heals_a_damaged_artifact(
    store: FileArtifacts, folder: Path, source: Path
) -> None:
    """Registering the version again is how an operator repairs it."""
    store.put(source)
    (folder / URI).chmod(0o644)
    (folder / URI).write_bytes(b"damage")
    store.put(source)
    assert store.fetch(URI, DIGEST).read_bytes() == BYTES
    assert files_in(folder) == [URI]


def test_bytes_under_another_digest_are_damage(store: FileArtifacts, source: Path) -> None:
    """The digest that was registered decides, not the file's name."""
    stored = store.put(source)
    with pytest.raises(ModelLoadFailed, match="damaged"):
        store.fetch(stored.uri, "0" * 64)


def test_a_source_that_cannot_be_read_leaves_nothing_behind(store: FileArtifacts, folder: Path) -> None:
    """Neither an artifact nor a temporary file."""
    with pytest.raises(ArtifactStoreUnavailable, match="No such file"):
        store.put(folder / "no-such-file")
    assert files_in(folder) == []


def test_a_linked_file_is_refused(store: FileArtifacts, folder: Path, outside: Path) -> None:
    """Even if it has the right bytes: a link leads out of the store."""
    (folder / URI).parent.mkdir(parents=True)
    (folder / URI).symlink_to(outside)
    with pytest.raises(ModelLoadFailed):
        store.fetch(URI, DIGEST)


@pytest.mark.parametrize("level", ["sha256", f"sha256/{DIGEST[:2]}"])
def test_a_linked_folder_is_refused_for_reading_and_writing(
    store: FileArtifacts, folder: Path, source: Path, outside: Path, level: str
) -> None:
    """A folder inside the store that lies elsewhere is outside of it."""
    elsewhere = outside.parent
    (elsewhere / DIGEST[:2]).mkdir()
    (elsewhere / DIGEST[:2] / DIGEST).write_bytes(BYTES)
    before = files_in(elsewhere)
    (folder / level).parent.mkdir(parents=True, exist_ok=True)
    (folder / level).symlink_to(elsewhere, target_is_directory=True)
    for use in (lambda: store.fetch(URI, DIGEST), lambda: store.put(source)):
        with pytest.raises(ModelLoadFailed, match="leads out of the store"):
            use()
    assert files_in(elsewhere) == before
    assert [name for name in files_in(folder) if name != level] == []


def test_the_store_itself_may_be_reached_by_a_link(folder: Path, tmp_path: Path, source: Path) -> None:
    """Where the store lies is the operator's choice: /data is often a link."""
    (tmp_path / "real").mkdir()
    folder.symlink_to(tmp_path / "real", target_is_directory=True)
    store = FileArtifacts(folder)
    stored = store.put(source)
    assert store.fetch(stored.uri, stored.sha256).read_bytes() == BYTES


def test_a_relative_store_is_found(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``file:artifacts`` is a setting too."""
    monkeypatch.chdir(tmp_path)
    store = FileArtifacts(Path("artifacts"))
    stored = store.put(source)
    assert store.fetch(stored.uri, stored.sha256).read_bytes() == BYTES


def odd_uris(outside: Path) -> Iterator[str]:
    up = "../" * 12
    absolute = str(outside)
    yield from ("", ".", "..", "/", "../x", "sha256", "sha256/", f"sha256/{DIGEST[:2]}", absolute)
    yield from (f"..{absolute}", f"{up}{absolute}", f"sha256/../{URI}", f"./{URI}", f"/{URI}", f"{URI}/")
    yield from (f"sha256/{DIGEST[:2]}/../../../outside/{DIGEST}", f"../outside/{DIGEST}")
    yield from (f"sha256//{DIGEST[:2]}/{DIGEST}", f"{URI}\n", f"{URI}\0", f"\0{URI}", "a\0b", "\ud800")
    yield from (f"file://{absolute}", URI.upper(), URI.replace("sha256", "SHA256"), f"sha256/zz/{DIGEST}")
    yield from (f"sha256/00/{DIGEST}", "x" * 10_000, "sha256\\..\\x", "%2e%2e/x", URI.replace("/", "\\"))


def assert_refused_unopened(use: Callable[[str], object], uri: str) -> None:
    """The URI is refused, and no file was opened on the way."""
    global opened  # noqa: PLW0603 - what the audit hook writes to
    opened = []
    try:
        with pytest.raises(ModelLoadFailed, match="leads out of the store") as caught:
            use(uri)
        assert opened == []
        assert "register" not in caught.value.message  # nobody can repair that
    finally:
        opened = None


@pytest.mark.usefixtures("audit")
def test_no_uri_leads_out_of_the_store(store: FileArtifacts, source: Path, outside: Path) -> None:
    """A URI may come from a database that others write to."""
    store.put(source)
    for uri in odd_uris(outside):
        assert_refused_unopened(lambda uri: store.fetch(uri, DIGEST), uri)
    assert outside.read_bytes() == BYTES


pieces = st.sampled_from(["..", ".", "", "/", "sha256", "outside", DIGEST, DIGEST[:2], "~", "\0", "\\", "C:"])
weird = st.lists(pieces | st.text(max_size=6), max_size=8).map("/".join) | st.text(max_size=80)


@pytest.mark.usefixtures("audit")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uri=weird.filter(lambda uri: uri != URI))
def test_whatever_the_uri_nothing_outside_is_opened(store: FileArtifacts, outside: Path, uri: str) -> None:
    """Only the one form that the store itself hands out is ever looked for on the disk."""
    assert_refused_unopened(lambda uri: store.fetch(uri, DIGEST), uri)
    assert outside.read_bytes() == BYTES
