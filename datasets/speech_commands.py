"""Speech Commands, ten words, as paths of mel-frequency cepstral coefficients: what the Neural CDE is trained on."""

import contextlib
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from . import download, synthetic
from .batches import Batches, DataSplit
from .cache import cache_directory, load_or_build, make_folder

logger = logging.getLogger(__name__)

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The words in the order of their labels 0 to 9."""
SPLITS = ("published", "official")
NUM_CLIPS = 34_975
"""How many clips of these words in the full data set have exactly 16,000 samples."""
SAMPLE_RATE = 16_000
CLIP_LENGTH = 16_000
PATH_LENGTH = 161
FOLDER = "speech_commands_v0.02"
URL = f"http://download.tensorflow.org/data/{FOLDER}.tar.gz"
SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
WANTED = re.compile(rf"({'|'.join(WORDS)})/[^/]+\.wav|(validation|testing)_list\.txt")
"""Which files of the archive are unpacked."""
MFCC = {"log_mels": True, "n_mfcc": 20, "melkwargs": {"n_fft": 200, "n_mels": 64}}
CACHE_VERSION = 2  # raise it with every change of what `_coefficients` returns
CHUNK_SIZE = 256  # clips that are transformed at once
MAX_BAD_SHARE = 0.01
MIN_CLIPS_PER_WORD = 7  # of so many, stratification puts one or more into each part
GOOD_FILE = "a whole WAV file of one channel, 16 bits and 16 kHz"
HELP = (
    f'give as data_root a folder that holds {FOLDER}/<word>/*.wav, or "synthetic" for a small '
    "built-in sample of sounds that are not speech"
)


def load(
    *,
    data_root: str | Path | None,
    split: str,
    batch_size: int,
    device: str | int | torch.device,
    generator: torch.Generator | None,
) -> DataSplit:
    """The data set, version 0.02, as batches of (path, label) on `device`; `generator` shuffles those for training.

    A path is (batch, 161, 21) float32: the time 0, 1, ..., 160, then 20 coefficients, each normalised with its mean
    and standard deviation over the training paths. A label is (batch,) int64, the position in `WORDS`.

    `data_root` is a folder that holds speech_commands_v0.02/ or torchaudio's SpeechCommands/speech_commands_v0.02/, or
    is that folder itself. It may hold fewer clips than the full set; the log says how many. "synthetic" stands for the
    sounds of synthetic.py and None for a download of 2.4 GB, each made once and kept in the cache.

    The split "published" is the paper's: 70 %, 15 % and 15 % at random, stratified by label, so that the same speakers
    are in every part. Its authors took the files in the order of their file system; here they are sorted, which makes
    other parts by the same rule. "official" follows the data set's own lists, which have no speaker in two parts.

    Clips of another length than 16,000 samples are dropped, as in the paper. What is called *.wav but is not a whole
    WAV file of one channel, 16 bits and 16 kHz is named in the log and skipped. ValueError if more than 1 % are such,
    if `data_root` is not such a folder or lacks words or the lists, if a list is not UTF-8, if the split is unknown or
    there are too few clips for it; FileNotFoundError if the download fails; OSError if there is no room for it in the
    cache.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but the splits are {' and '.join(map(repr, SPLITS))}.")
    cache = cache_directory()
    folder = _find_folder(data_root, cache)
    files = _list_files(folder)
    path = cache / f"speech_commands-{_key(files)}.npz"
    cached = load_or_build(path, lambda: _coefficients(files), lambda cached: _fits(cached, len(files)))
    coefficients = cached["coefficients"]
    kept = [files[index] for index in cached["kept"].tolist()]
    names = [f"{file.parent.name}/{file.name}" for file in kept]
    labels = torch.tensor([WORDS.index(file.parent.name) for file in kept], dtype=torch.int64)
    _report(data_root, num_files=len(files), num_kept=len(names), num_bad=int(cached["num_bad"]))

    parts = _published_parts(labels) if split == "published" else _official_parts(names, folder)
    std, mean = torch.std_mean(coefficients[parts["train"]], dim=(0, 1))
    digest = hashlib.sha256()
    batches = {}
    for part, indices in parts.items():
        digest.update("\n".join([part, *(names[index] for index in indices), ""]).encode())
        normalised = (coefficients[indices] - mean) / (std + 1e-5)
        time = torch.arange(float(PATH_LENGTH)).expand(len(indices), -1)
        path = torch.cat([time.unsqueeze(-1), normalised], dim=-1).to(device)
        order = generator if part == "train" else None
        batches[part] = Batches((path, labels[indices].to(device)), batch_size, generator=order)
    return DataSplit(**batches, digest=digest.hexdigest())


def _find_folder(data_root: str | Path | None, cache: Path) -> Path:
    """The folder that holds the folders of the words."""
    if data_root is None:
        root, archive = cache / "speech_commands", cache / f"{FOLDER}.tar.gz"
        make_folder(root, lambda partial: _download(archive, partial / FOLDER))
        archive.unlink(missing_ok=True)
    elif data_root == "synthetic":
        root = cache / f"synthetic-{synthetic.VERSION}"
        make_folder(root, synthetic.write)
    else:
        root = Path(os.path.expanduser(data_root))
    for folder in (root / FOLDER, root / "SpeechCommands" / FOLDER, root):
        if any(os.path.isdir(folder / word) for word in WORDS):
            return folder
    problem = "holds none of the words" if os.path.isdir(root) else "is not a folder"
    raise ValueError(f"data_root {root} {problem}: {HELP}.")


def _download(archive: Path, folder: Path) -> None:
    """Make `folder` from the archive, which is downloaded unless it is there."""
    try:
        download.fetch(URL, archive, SHA256)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or {HELP}.") from error
    download.unpack(archive, folder, WANTED)


def _list_files(folder: Path) -> list[Path]:
    """The clips, word after word in the order of the labels, those of a word sorted by name."""
    files = {word: sorted((folder / word).glob("*.wav")) for word in WORDS}
    lacking = [word for word in WORDS if not files[word]]
    if lacking:
        raise ValueError(f"{folder} has no clips of {', '.join(map(repr, lacking))}, but needs some of all ten words.")
    return [file for word in WORDS for file in files[word]]


def _key(files: list[Path]) -> str:
    """What the coefficients depend on, as a short hash."""
    states = []
    for file in files:
        stat = file.stat(follow_symlinks=file.exists())  # a link may lead nowhere
        states.append((file.parent.name, file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps([CACHE_VERSION, CLIP_LENGTH, MFCC, states]).encode()).hexdigest()[:16]


def _coefficients(files: list[Path]) -> dict[str, Tensor]:
    """The MFCCs (num_kept, 161, 20) of the clips of 16,000 samples, which `files` these are, and how many were bad."""
    import torchaudio

    with warnings.catch_warnings():
        # Known and kept: with 64 mel filters on 101 frequencies, some filters fall between two frequencies.
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        transform = torchaudio.transforms.MFCC(sample_rate=SAMPLE_RATE, **MFCC)

    waveforms, num_bad = _read_all(files)
    kept = [index for index, waveform in waveforms.items() if len(waveform) == CLIP_LENGTH]
    coefficients = torch.empty(len(kept), PATH_LENGTH, MFCC["n_mfcc"])
    with _one_thread():
        for start in tqdm(range(0, len(kept), CHUNK_SIZE), desc="MFCC", unit=f" x {CHUNK_SIZE} clips"):
            chunk = np.stack([waveforms[index] for index in kept[start : start + CHUNK_SIZE]])
            coefficients[start : start + len(chunk)] = transform(torch.from_numpy(chunk) / 2**15).transpose(1, 2)
    return {
        "coefficients": coefficients,
        "kept": torch.tensor(kept, dtype=torch.int64),
        "num_bad": torch.tensor(num_bad),
    }


def _fits(cached: dict[str, Tensor], num_files: int) -> bool:
    """Whether these are such tensors as `_coefficients` makes of so many files."""
    kept = cached["kept"].tolist()
    return {name: (tensor.dtype, tensor.shape) for name, tensor in cached.items()} == {
        "coefficients": (torch.float32, (len(kept), PATH_LENGTH, MFCC["n_mfcc"])),
        "kept": (torch.int64, (len(kept),)),
        "num_bad": (torch.int64, ()),
    } and kept == sorted(set(kept).intersection(range(num_files)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch compute on one thread: on several it divides sums, and how depends on their number."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _read_all(files: list[Path]) -> tuple[dict[int, np.ndarray], int]:
    """The samples of each good file by its position in `files`, and how many files are bad, which the log names.

    ValueError if more than 1 % are bad.
    """
    waveforms, complaints = {}, []
    for index, file in enumerate(tqdm(files, desc="WAV", unit=" files")):
        try:
            waveforms[index] = _read(file)
        except ValueError as error:
            complaints.append(f"{file} ({error})")
    if len(complaints) > MAX_BAD_SHARE * len(files):
        first = ", ".join(complaints[:3])
        raise ValueError(
            f"{len(complaints)} of {len(files)} files, more than 1 %, are not {GOOD_FILE}: "
            f"{first}{', ...' if len(complaints) > 3 else ''}; restore or remove them."
        )
    for complaint in complaints:
        logger.warning("Skipped %s, which is not %s.", complaint, GOOD_FILE)
    return waveforms, len(complaints)


def _read(file: Path) -> np.ndarray:
    """The samples of a clip, int16, but at most one more than a clip has. ValueError if it is not a `GOOD_FILE`."""
    if not file.is_file():  # to open a pipe would wait for someone to write
        raise ValueError("not a plain file")
    with file.open("rb") as stream:
        header = stream.read(8)
    # soundfile reads what there is of a file cut short, so the length that the header promises is compared here.
    if header[:4] == b"RIFF" and int.from_bytes(header[4:], "little") + 8 > file.stat().st_size:
        raise ValueError("truncated")
    try:
        with soundfile.SoundFile(file) as sound:
            found = (sound.format, sound.subtype, sound.channels, sound.samplerate)
            if found != ("WAV", "PCM_16", 1, SAMPLE_RATE):
                raise ValueError("{}, {}, {} channels, {} Hz".format(*found))
            return sound.read(CLIP_LENGTH + 1, dtype="int16")
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string) from error


def _report(data_root: str | Path | None, *, num_files: int, num_kept: int, num_bad: int) -> None:
    """Say in the log what was found, as a warning where it is not the full data set."""
    if data_root == "synthetic":
        logger.warning("Using %d synthetic sounds, which are not speech: for demonstrations and tests only.", num_kept)
        return
    found = f"Found {num_kept:,} of the {NUM_CLIPS:,} clips of the full data set"
    skipped = f"{num_files - num_kept - num_bad:,} dropped for another length, {num_bad:,} skipped as bad"
    logger.log(logging.INFO if num_kept == NUM_CLIPS else logging.WARNING, f"{found} ({skipped}).")


def _published_parts(labels: Tensor) -> dict[str, Tensor]:
    """The indices of each part: 70 % for training, then the rest in half, each stratified by label."""
    from sklearn.model_selection import train_test_split  # takes seconds, and what is in the cache does without

    counts = labels.bincount(minlength=len(WORDS))
    if counts.min() < MIN_CLIPS_PER_WORD:
        raise ValueError(
            f"The published split needs {MIN_CLIPS_PER_WORD} or more clips of each word, but of "
            f'"{WORDS[counts.argmin()]}" there are {counts.min()} of {CLIP_LENGTH:,} samples.'
        )
    indices = np.arange(len(labels))
    train, rest = train_test_split(indices, train_size=0.7, random_state=0, stratify=labels.numpy())
    val, test = train_test_split(rest, train_size=0.5, random_state=1, stratify=labels[rest].numpy())
    return {part: torch.from_numpy(array) for part, array in (("train", train), ("val", val), ("test", test))}


def _official_parts(names: list[str], folder: Path) -> dict[str, Tensor]:
    """The indices of each part, from the two lists that come with the data set; what is in neither is for training."""
    listed = {}
    for part, file in (("val", folder / "validation_list.txt"), ("test", folder / "testing_list.txt")):
        if not file.is_file():
            raise ValueError(f'{file} is missing, but the split "official" needs it; the split "published" does not.')
        try:
            listed |= dict.fromkeys(file.read_text("utf-8").split(), part)
        except UnicodeDecodeError as error:
            raise ValueError(
                f'{file} is not text in UTF-8: restore it, or choose the split "published", which does not need it.'
            ) from error
    parts = {"train": [], "val": [], "test": []}
    for index, name in enumerate(names):
        parts[listed.get(name, "train")].append(index)
    for part, indices in parts.items():
        if not indices:
            raise ValueError(
                f'The split "official" puts none of the {len(names)} clips in {folder} into the part {part}: '
                'add clips, or choose the split "published".'
            )
    return {part: torch.tensor(indices) for part, indices in parts.items()}
