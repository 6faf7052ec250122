"""Downloads against a real server on this machine that fails in every way, and archives that mean harm."""

import hashlib
import io
import multiprocessing
import re
import shutil
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from datasets import download, speech_commands, synthetic
from datasets.speech_commands import FOLDER, WORDS

CONTENT = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()

SPAWN = multiprocessing.get_context("spawn")


class Handler(BaseHTTPRequestHandler):
    """Sends the server's content, or what is asked of it, as its `faults` for this request say."""

    def do_GET(self):
        server = self.server
        faults = server.faults.pop(0) if server.faults else {}
        asked = self.headers["Range"]
        server.asked.append(asked)
        if status := faults.get("status"):
            self.send_error(status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and not faults.get("ignore_range") else 0
        if asked and start >= len(server.content):
            self.send_error(416)
            return
        content = server.content[start:]
        self.send_response(206 if asked and not faults.get("ignore_range") else 200)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        for position in range(0, len(content[: faults.get("cut")]), 2**16):
            self.wfile.write(content[: faults.get("cut")][position : position + 2**16])
            time.sleep(faults.get("pause", 0))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.faults, server.asked = CONTENT, [], []
    server.url = f"http://127.0.0.1:{server.server_port}/{FOLDER}.tar.gz"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The bytes of a small data set, packed as the real one: with "./" before each name, and more than is wanted."""
    root = tmp_path_factory.mktemp("archive") / FOLDER
    synthetic.write(root.parent, clips_per_word=8)
    for name in (
        "LICENSE",
        "validation_list.txt",
        "testing_list.txt",
        "bed/0_nohash_0.wav",
        "_background_noise_/a.wav",
        "yes/a.wav.txt",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as members:
        members.add(root, ".")
    return packed.getvalue()


@pytest.fixture
def data_set(server, archive, monkeypatch):
    """The server has the small data set."""
    server.content = archive
    server.sha256 = hashlib.sha256(archive).hexdigest()
    monkeypatch.setattr(speech_commands, "URL", server.url)
    monkeypatch.setattr(speech_commands, "SHA256", server.sha256)
    return server


def names_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_fetched_once(server, tmp_path):
    path = tmp_path / "file"
    for _ in range(2):
        download.fetch(server.url, path, SHA256)
        assert path.read_bytes() == CONTENT
    assert server.asked == [None]


def test_a_cut_connection_is_taken_up_again(server, tmp_path):
    server.faults = [{"cut": 700_000}, {"cut": 1}]
    download.fetch(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=700000-", "bytes=700001-"]


def test_a_connection_that_brings_nothing_more_is_explained_and_the_next_call_goes_on(server, tmp_path):
    path = tmp_path / "file"
    server.faults = [{"cut": 700_000}, {"cut": 0}]
    with pytest.raises(
        FileNotFoundError,
        match=r"connection was cut.: do the same again later \(the 700,000 bytes that came are kept\), .*put it at",
    ):
        download.fetch(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT[:700_000]
    download.fetch(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT
    assert server.asked[2:] == ["bytes=700000-"]


def test_a_server_that_knows_no_ranges_sends_all(server, tmp_path):
    path = tmp_path / "file"
    for there in (CONTENT[:1_000_000], CONTENT + b"more"):
        path.write_bytes(there)
        server.faults = [{"ignore_range": True}]
        download.fetch(server.url, path, SHA256)
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("there", [b"", CONTENT[:1000][::-1], CONTENT + b"more", CONTENT[::-1]])
def test_a_wrong_checksum_is_named_and_the_next_call_starts_anew(server, tmp_path, there):
    path = tmp_path / "file"
    path.write_bytes(there)
    if not there:
        server.content = CONTENT[::-1]
    with pytest.raises(FileNotFoundError, match=f"its SHA-256 is not {SHA256}, so it was deleted: do the same again"):
        download.fetch(server.url, path, SHA256)
    assert not path.exists()
    server.content = CONTENT
    download.fetch(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT


def test_an_absent_server_or_file_is_explained(server, data_set, tmp_path, monkeypatch):
    server.faults = [{"status": 404}]
    with pytest.raises(FileNotFoundError, match=r"\(HTTP Error 404: .*or give as data_root a folder that holds"):
        speech_commands._find_folder(None, tmp_path)
    monkeypatch.setattr(speech_commands, "URL", "http://127.0.0.1:9/file")
    with pytest.raises(FileNotFoundError, match=r"Connection refused.*put it at .*\.tar\.gz; or give as data_root"):
        speech_commands._find_folder(None, tmp_path)
    assert names_below(tmp_path) <= {"speech_commands.lock"}


def test_nothing_is_said_of_bytes_where_none_came(server, tmp_path):
    server.faults = [{"status": 404}]
    with pytest.raises(FileNotFoundError) as caught:
        download.fetch(server.url, tmp_path / "file", SHA256)
    assert "0 bytes" not in str(caught.value)


@pytest.mark.parametrize("there", [None, b"", CONTENT[:1000]], ids=["leads nowhere", "empty", "start of the file"])
def test_a_link_is_replaced_by_a_file_of_its_own(server, tmp_path, there):
    target, path = tmp_path / "target", tmp_path / "file"
    if there is not None:
        target.write_bytes(there)
    path.symlink_to(target)
    download.fetch(server.url, path, SHA256)
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert there == (target.read_bytes() if target.exists() else None)


def test_a_link_to_the_whole_file_is_read(server, tmp_path):
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_bytes(CONTENT)
    path.symlink_to(target)
    download.fetch(server.url, path, SHA256)
    assert path.is_symlink()
    assert server.asked == []


def test_a_silent_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    server.faults = [{"cut": 2**16, "pause": 0.4}, {"cut": 0, "pause": 0.4}]
    with pytest.raises(FileNotFoundError, match=r"timed out|was cut"):
        download.fetch(server.url, tmp_path / "file", SHA256)


def test_only_the_words_and_the_lists_are_unpacked(data_set, tmp_path):
    folder = speech_commands._find_folder(None, tmp_path)
    names = names_below(folder)
    assert {Path(name).parts[0] for name in names} == {*WORDS, "validation_list.txt", "testing_list.txt"}
    assert len(names) == 8 * 10 + 2
    assert speech_commands._find_folder(None, tmp_path) == folder
    assert data_set.asked == [None]
    assert not list(tmp_path.glob("*.tar.gz"))
    assert not list(tmp_path.glob("*.partial"))


def test_an_archive_got_elsewhere_needs_no_server(data_set, tmp_path):
    (tmp_path / f"{FOLDER}.tar.gz").write_bytes(data_set.content)
    assert len(names_below(speech_commands._find_folder(None, tmp_path))) == 82
    assert data_set.asked == []


def evil(kind, outside):
    member = tarfile.TarInfo("yes/a.wav")
    member.type = kind if isinstance(kind, bytes) else tarfile.REGTYPE
    member.linkname = str(outside / "target")
    member.name = {"up": "yes/../../../up.wav", "root": f"{outside}/root.wav", "hidden": "../yes/b.wav"}.get(
        kind, "yes/a.wav"
    )
    return member


@pytest.mark.parametrize(
    "kind",
    ["up", "root", "hidden", tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
@pytest.mark.parametrize("wanted", [speech_commands.WANTED, re.compile(".*", re.DOTALL)], ids=["words", "all"])
def test_an_archive_that_means_harm_is_refused(tmp_path, kind, wanted):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "target").write_text("untouched")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as members:
        members.addfile(evil(kind, outside))
        after = tarfile.TarInfo("yes/a.wav")  # through the link, if that was made
        after.size = 3
        members.addfile(after, io.BytesIO(b"bad"))
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"evil\.tar\.gz holds '.*', not a plain file inside it"):
        download.unpack(tmp_path / "evil.tar.gz", folder, wanted)
    assert names_below(tmp_path) == {"evil.tar.gz", "outside/target"}
    assert (outside / "target").read_text() == "untouched"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content[:-5], id="end missing"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"no archive", id="text"),
        pytest.param(lambda content: content[:90_000] + b"\0" * 90_000 + content[180_000:], id="hole"),
    ],
)
def test_a_damaged_archive_leaves_no_folder(data_set, tmp_path, monkeypatch, damage):
    data_set.content = damage(data_set.content)
    monkeypatch.setattr(speech_commands, "SHA256", hashlib.sha256(data_set.content).hexdigest())
    with pytest.raises(ValueError, match=r"tar\.gz is damaged \(.*delete it and do the same again"):
        speech_commands._find_folder(None, tmp_path)
    assert names_below(tmp_path) == {f"{FOLDER}.tar.gz", "speech_commands.lock"}


def test_a_full_disk_is_explained_and_the_download_goes_on(data_set, tmp_path, small_disk):
    assert len(data_set.content) > 2**20
    with pytest.raises(
        OSError, match=r"^There is no room for .* \(No space left on device\): make some, or set SEMINORM_"
    ):
        speech_commands._find_folder(None, small_disk)
    [partial] = small_disk.glob("*.tar.gz")
    size = partial.stat().st_size
    assert 2**20 >= size > 2**19
    (tmp_path / partial.name).write_bytes(partial.read_bytes())  # as if the disk had grown
    assert len(names_below(speech_commands._find_folder(None, tmp_path))) == 82
    assert data_set.asked == [None, f"bytes={size}-"]


def test_a_disk_that_is_full_when_unpacking_or_transforming_keeps_nothing_half(small_disk, tmp_path, data_set):
    with pytest.raises(OSError, match="There is no room for"):
        speech_commands._find_folder("synthetic", small_disk)
    (tmp_path / f"{FOLDER}.tar.gz").write_bytes(data_set.content)
    (small_disk / f"{FOLDER}.tar.gz").symlink_to(tmp_path / f"{FOLDER}.tar.gz")
    with pytest.raises(OSError, match=r"There is no room for .*speech_commands "):
        speech_commands._find_folder(None, small_disk)
    with pytest.raises(OSError, match=r"There is no room for .*big\.npz"):
        speech_commands.load_or_build(small_disk / "big.npz", lambda: {"big": torch.ones(2**20)}, bool)
    assert {path.suffix for path in small_disk.iterdir()} == {".lock", ".gz"}


def find(url, sha256, cache, pause):
    """Looks for the data set, and pauses after each file that it unpacks."""
    copy = shutil.copyfileobj
    download.shutil.copyfileobj = lambda *files: (copy(*files), time.sleep(pause))
    speech_commands.URL, speech_commands.SHA256 = url, sha256
    speech_commands._find_folder(None, cache)


def find_in_a_process(data_set, cache, pause=0.0):
    """No fork: a kill there may leave a lock taken that forks share, such as that of tqdm, and this process waiting."""
    process = SPAWN.Process(target=find, args=(data_set.url, data_set.sha256, cache, pause))
    process.start()
    return process


def kill_when(process, condition):
    while not condition():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()


def test_kills_in_mid_download_and_in_mid_unpack_are_made_good(data_set, tmp_path):
    archive, partial = tmp_path / f"{FOLDER}.tar.gz", tmp_path / "speech_commands.partial"
    data_set.faults = [{"pause": 0.1}]
    kill_when(find_in_a_process(data_set, tmp_path), lambda: archive.exists() and archive.stat().st_size > 0)
    size = archive.stat().st_size
    assert 0 < size < len(data_set.content)
    kill_when(find_in_a_process(data_set, tmp_path, pause=0.02), lambda: len(names_below(partial)) > 3)
    assert 3 < len(names_below(partial)) < 82
    assert not (tmp_path / "speech_commands").exists()
    assert len(names_below(speech_commands._find_folder(None, tmp_path))) == 82
    assert data_set.asked == [None, f"bytes={size}-"]
    assert not archive.exists()
    assert not partial.exists()


def test_of_two_processes_one_downloads_and_the_other_waits(data_set, tmp_path, caplog):
    data_set.faults = [{"pause": 0.02}]
    other = find_in_a_process(data_set, tmp_path, pause=0.01)
    while not data_set.asked:
        time.sleep(0.005)
    assert len(names_below(speech_commands._find_folder(None, tmp_path))) == 82
    other.join(60)
    assert other.exitcode == 0
    assert data_set.asked == [None]
    assert "Waiting for another process" in caplog.text
