"""Artifacts in a local folder, each under its SHA-256. See ``ArtifactStore`` in the ports."""

import errno
import os
import re
import stat
import tempfile
from hashlib import sha256
from pathlib import Path

from phoenix_ml.application.ports import StoredArtifact
from phoenix_ml.domain.errors import ArtifactStoreUnavailable, ModelLoadFailed

_BLOCK_BYTES = 1 << 20
_REPAIR = "register the same file again to repair it"
# The only form of URI that the store hands out, so nothing else can lead anywhere.
_URI = re.compile(r"sha256/([0-9a-f]{2})/(\1[0-9a-f]{62})")


class FileArtifacts:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, source: Path) -> StoredArtifact:
        try:
            return self._put(source)
        except OSError as exc:
            raise ArtifactStoreUnavailable(
                f"the artifact cannot be stored in {self._folder}: {exc.strerror}", folder=str(self._folder)
            ) from exc

    def _put(self, source: Path) -> StoredArtifact:
        self._folder.mkdir(parents=True, exist_ok=True)
        digest = sha256()
        with source.open("rb") as given, tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as copy:
            try:
                while block := given.read(_BLOCK_BYTES):
                    digest.update(block)
                    copy.write(block)
                copy.flush()
                os.fsync(copy.fileno())
                name = digest.hexdigest()
                uri = f"sha256/{name[:2]}/{name}"
                path = self._locate(uri)
                path.parent.mkdir(parents=True, exist_ok=True)
                Path(copy.name).chmod(0o440)
                # Also over an existing file: should that one be damaged, this heals it.
                Path(copy.name).replace(path)
            except BaseException:
                Path(copy.name).unlink(missing_ok=True)
                raise
        return StoredArtifact(uri, name)

    def fetch(self, uri: str, sha256_: str) -> Path:
        path = self._locate(uri)
        try:
            # A link would let whoever can write to the folder lead the server out of it.
            with open(path, "rb", opener=_open_regular) as file:
                digest = sha256()
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as exc:
            advice = f"; {_REPAIR}" if isinstance(exc, FileNotFoundError) else ""
            raise ModelLoadFailed(
                f"the artifact cannot be read: {exc.strerror}: {path}{advice}", uri=uri, path=str(path)
            ) from exc
        if digest.hexdigest() != sha256_:
            raise ModelLoadFailed(
                f"the artifact is damaged: {path} has sha256 {digest.hexdigest()}, registered was {sha256_}; "
                f"{_REPAIR}",
                uri=uri,
                path=str(path),
                found_sha256=digest.hexdigest(),
            )
        return path

    def _locate(self, uri: str) -> Path:
        path = self._folder / uri
        # The form comes first: what has another one is not even looked for on the disk.
        if not _URI.fullmatch(uri) or path.parent.resolve() != (self._folder.resolve() / uri).parent:
            raise ModelLoadFailed(f"the artifact URI {uri!r} leads out of the store", uri=uri)
        return path


def _open_regular(path: str, flags: int) -> int:
    """A descriptor of a file that is one: no link, folder or pipe, on which a read would wait for ever."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return descriptor
