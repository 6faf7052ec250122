"""Downloads an archive and unpacks what is wanted of it; speech_commands.py gets its recordings so."""

import gzip
import hashlib
import http.client
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from http import HTTPStatus
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from .cache import is_lack_of_room

CHUNK_SIZE = 2**20  # bytes
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as cut."""


def fetch(url: str, path: Path, sha256: str) -> None:
    """Makes `path` the file at `url` with this checksum, going on from what of it is there, however it came there.

    A connection that breaks off is taken up again as long as each brings the file further than the one before. Only
    one process at a time may call this for a path: the caller holds a lock.

    Raises:
        FileNotFoundError: if the file cannot be had; it says why and how to go on. What came stays, for the next call;
            only a file with another checksum is deleted.
        OSError: if the disk is full or the path cannot be written. What came stays.
    """
    by_hand = f"or get that file elsewhere and put it at {path}"
    is_complete = False
    while not _has_checksum(path, sha256):
        if is_complete:
            path.unlink()
            raise FileNotFoundError(
                f"{url} was downloaded, but its SHA-256 is not {sha256}, so it was deleted: do the same again, "
                f"{by_hand}"
            )
        if path.is_symlink():
            path.unlink()  # in a shared folder it may lead to another file, which must not be written to
        size = _size(path)
        try:
            _receive(url, path)
            is_complete = True
        except (OSError, http.client.HTTPException) as error:
            if is_lack_of_room(error):
                raise
            if _size(path) <= size:
                kept = f" (the {_size(path):,} bytes that came are kept)" if _size(path) else ""
                raise FileNotFoundError(
                    f"{url} cannot be downloaded ({error}): do the same again later{kept}, {by_hand}"
                ) from error


def unpack(archive: Path, folder: Path, wanted: re.Pattern) -> None:
    """Unpacks of a .tar.gz the files whose whole path in it, without "./", is `wanted`, into a new `folder`.

    Raises:
        ValueError: if the archive is damaged, or if anything in it, wanted or not, is no plain file or folder inside
            it, but a link, say. Nothing is ever written outside `folder`.
        OSError: if the disk is full or `folder` cannot be written.
    """
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in tqdm(members, f"Unpacking {archive.name}", unit=" files"):
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise ValueError(f"{archive} holds {member.name!r}, not a plain file inside it: delete the archive")
                if member.isfile() and wanted.fullmatch(str(name)):
                    # Written as a new file, never extracted: the folder holds no link that could lead out of it.
                    path = folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with members.extractfile(member) as source, path.open("wb") as target:
                        shutil.copyfileobj(source, target)
            while stream.read(CHUNK_SIZE):
                pass  # gzip compares its checksum only at the end, which lies behind all members
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and do the same again") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_checksum(path: Path, sha256: str) -> bool:
    if not path.exists():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_SIZE):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def _receive(url: str, path: Path) -> None:
    """Appends to the file what the server has beyond its end; an error if that is not all that the server promised."""
    size = _size(path)
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return  # there is nothing beyond its end
    with response, path.open("ab") as file:
        if response.status != HTTPStatus.PARTIAL_CONTENT:  # this server sends all from the beginning
            size = 0
            file.truncate(0)
        length = response.headers["Content-Length"]
        total = size + int(length) if length else None
        with tqdm(desc=f"Downloading {path.name}", initial=size, total=total, unit="B", unit_scale=True) as progress:
            while chunk := response.read(CHUNK_SIZE):
                file.write(chunk)
                progress.update(len(chunk))
        if total is not None and file.tell() < total:
            raise ConnectionError("the connection was cut")
