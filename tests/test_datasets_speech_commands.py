"""Speech Commands: paths, splits, cache and all bad input on synthetic sounds, and the real recordings if present."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from sklearn.model_selection import train_test_split

from datasets import speech_commands, synthetic
from datasets.speech_commands import FOLDER, WORDS, load

REPOSITORY = Path(__file__).parent.parent
RECORDINGS = Path(os.environ.get("SPEECH_COMMANDS_DATA", REPOSITORY.parent / "shared" / "data"))


def load_from(data_root, cache_dir, *, split="published", seed=0):
    generator = torch.Generator().manual_seed(seed)
    with mock.patch.dict(os.environ, SEMINORM_CACHE=str(cache_dir)):
        return load(data_root=data_root, split=split, batch_size=16, device="cpu", generator=generator)


def whole(batches):
    """All paths and all labels of a part."""
    paths, labels = zip(*batches, strict=True)
    return torch.cat(paths), torch.cat(labels)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Ten clips of each word, which no test may change."""
    root = tmp_path_factory.mktemp("sample")
    synthetic.write(root, clips_per_word=10)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def root(sample, tmp_path):
    """A copy of the sample, which a test may spoil."""
    return shutil.copytree(sample, tmp_path / "root")


def clips(root, word):
    return sorted((root / FOLDER / word).iterdir())


def test_shapes_and_types(sample, cache):
    data = load_from(sample, cache)
    assert [part.dataset_size for part in (data.train, data.val, data.test)] == [70, 15, 15]
    path, label = next(iter(data.train))
    assert path.shape == (16, 161, 21)
    assert path.dtype == torch.float32
    assert label.shape == (16,)
    assert label.dtype == torch.int64
    assert torch.equal(whole(data.train)[1].bincount(), torch.full((10,), 7))


def test_time_is_channel_zero_and_the_others_are_normalised_on_the_training_part(sample, cache):
    data = load_from(sample, cache)
    for part in (data.train, data.val, data.test):
        paths, _ = whole(part)
        assert torch.equal(paths[..., 0], torch.arange(161.0).expand(len(paths), -1))
    std, mean = torch.std_mean(whole(data.train)[0][..., 1:].double(), dim=(0, 1))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)
    assert whole(data.test)[0][..., 1:].mean(dim=(0, 1)).abs().max() > 1e-3


def test_channels_that_never_change_stay_finite(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(speech_commands, "_read", lambda file: np.zeros(16_000, np.int16))
    assert whole(load_from(sample, tmp_path).train)[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:At least one mel filterbank has all zero values")
def test_coefficients_equal_a_call_by_hand(sample):
    import torchaudio

    file = clips(sample, "left")[3]
    transform = torchaudio.transforms.MFCC(log_mels=True, n_mfcc=20, melkwargs={"n_fft": 200, "n_mels": 64})
    expected = transform(torch.from_numpy(soundfile.read(file, dtype="float32")[0])).T
    cached = speech_commands._coefficients([clips(sample, "up")[0], file])
    torch.testing.assert_close(cached["coefficients"][1], expected, atol=1e-4, rtol=1e-5)


def test_labels_belong_to_their_paths(sample, cache):
    # Of the synthetic sounds, high-passed noise ("off") is told from a low tone ("no") by the second coefficient alone.
    paths, labels = whole(load_from(sample, cache).train)
    tilt = paths[..., 2].mean(dim=1)
    assert tilt[labels == WORDS.index("off")].max() < tilt[labels == WORDS.index("no")].min()


def test_only_training_is_shuffled(sample, cache):
    data = load_from(sample, cache)
    first, second = whole(data.train)[1], whole(data.train)[1]
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.equal(whole(data.val)[0], whole(data.val)[0])
    assert torch.equal(whole(load_from(sample, cache).train)[1], first)
    assert not torch.equal(whole(load_from(sample, cache, seed=1).train)[1], first)


def test_published_split_has_the_published_sizes():
    labels = torch.arange(34_975) % 10
    parts = speech_commands._published_parts(labels)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [24_482, 5_246, 5_247]
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(34_975))
    for indices in parts.values():
        counts = labels[indices].bincount()
        assert counts.max() - counts.min() <= 1


def test_published_split_is_that_of_scikit_learn():
    labels = torch.arange(200) % 10
    train, rest = train_test_split(torch.arange(200).tolist(), train_size=0.7, random_state=0, stratify=labels)
    val, test = train_test_split(rest, train_size=0.5, random_state=1, stratify=labels[rest])
    parts = speech_commands._published_parts(labels)
    assert {part: indices.tolist() for part, indices in parts.items()} == {"train": train, "val": val, "test": test}


@pytest.mark.parametrize("counts", [[7] * 10, [7, 8, 9, 10, 11, 12, 13, 14, 50, 99], [7] * 9 + [1000]])
def test_published_split_works_from_seven_clips_a_word(counts):
    labels = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    for indices in speech_commands._published_parts(labels).values():
        assert labels[indices].bincount(minlength=10).min() >= 1


def test_digest_depends_on_names_and_split_alone(sample, root, cache, tmp_path):
    digest = load_from(sample, cache).digest
    names = [f"{word}/{file.name}" for word in WORDS for file in clips(sample, word)]
    parts = speech_commands._published_parts(torch.arange(10).repeat_interleave(10))
    lines = [line for part, indices in parts.items() for line in (part, *(names[index] for index in indices))]
    assert digest == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert load_from(root, tmp_path / "other").digest == digest
    clips(root, "go")[0].unlink()
    assert load_from(root, tmp_path / "other").digest != digest


def test_layout_of_torchaudio_and_the_folder_itself_are_found(sample, root, cache, tmp_path):
    digest = load_from(sample, cache).digest
    assert load_from(root / FOLDER, cache).digest == digest
    shutil.copytree(sample, tmp_path / "torchaudio" / "SpeechCommands")
    assert load_from(tmp_path / "torchaudio", cache).digest == digest


def test_official_split_follows_the_lists(root, tmp_path):
    members = {
        part: [clips(root, word)[place] for word in WORDS] for part, place in (("validation", 1), ("testing", 2))
    }
    for part, files in members.items():
        text = "".join(f"{file.parent.name}/{file.name}\n" for file in files)
        (root / FOLDER / f"{part}_list.txt").write_text(text)
    data = load_from(root, tmp_path / "cache", split="official")
    assert [part.dataset_size for part in (data.train, data.val, data.test)] == [80, 10, 10]
    coefficients = speech_commands._coefficients(members["testing"])["coefficients"]
    paths, labels = whole(data.test)
    assert torch.equal(labels, torch.arange(10))
    # Normalised, so equal up to one linear map for each channel.
    for channel in range(20):
        pair = torch.stack([coefficients[..., channel].flatten(), paths[..., channel + 1].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9999
    assert data.digest != load_from(root, tmp_path / "cache").digest


@pytest.mark.parametrize("name", ["validation_list.txt", "testing_list.txt"])
def test_official_split_with_a_list_that_is_not_text(root, tmp_path, name):
    for file in ("validation_list.txt", "testing_list.txt"):
        (root / FOLDER / file).write_bytes(b"yes/\xff.wav\n" if file == name else b"")
    with pytest.raises(ValueError, match=f'{name} is not text in UTF-8: restore it, or choose the split "published"'):
        load_from(root, tmp_path / "cache", split="official")


@pytest.mark.parametrize("missing", ["validation_list.txt", "testing_list.txt"])
def test_official_split_without_a_list(root, tmp_path, missing):
    for file in {"validation_list.txt", "testing_list.txt"} - {missing}:
        (root / FOLDER / file).write_text("")
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        load_from(root, tmp_path / "cache", split="official")


def test_official_split_with_an_empty_part(root, tmp_path):
    (root / FOLDER / "validation_list.txt").write_text("yes/00000000_nohash_0.wav\n")
    (root / FOLDER / "testing_list.txt").write_text("")
    with pytest.raises(ValueError, match=r"puts none of the 100 clips in .* into the part val"):
        load_from(root, tmp_path / "cache", split="official")


def test_unknown_split(sample, cache):
    with pytest.raises(ValueError, match="'random', but the splits are 'published' and 'official'"):
        load_from(sample, cache, split="random")


def test_too_few_clips_for_the_published_split(root, tmp_path):
    for file in clips(root, "down")[6:]:
        file.unlink()
    with pytest.raises(ValueError, match='needs 7 or more clips of each word, but of "down" there are 6'):
        load_from(root, tmp_path / "cache")


def test_missing_root(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder: give as data_root a folder that holds .*synthetic"):
        load_from(tmp_path / "nowhere", tmp_path / "cache")


def test_empty_root(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds none of the words: give as data_root"):
        load_from(tmp_path / "empty", tmp_path / "cache")


def test_lacking_words(root, tmp_path):
    shutil.rmtree(root / FOLDER / "no")
    for file in clips(root, "stop"):
        file.unlink()
    with pytest.raises(ValueError, match="has no clips of 'no', 'stop'"):
        load_from(root, tmp_path / "cache")


def overwrite(shape, rate=16_000, **options):
    return lambda file: soundfile.write(file, np.zeros(shape), rate, **options)


BAD = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2000]),
    "2 channels": overwrite((16_000, 2)),
    "8000 Hz": overwrite(16_000, 8_000),
    "FLOAT": overwrite(16_000, subtype="FLOAT"),
    "FLAC": overwrite(16_000, format="FLAC"),
    "Format not recognised": lambda file: file.write_text("not a sound"),
    "not a plain file: pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "not a plain file: folder": lambda file: (file.unlink(), file.mkdir()),
    "not a plain file: link that leads nowhere": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


@pytest.mark.parametrize("reason", BAD)
def test_one_bad_file_in_a_hundred_is_named_and_skipped(root, tmp_path, caplog, reason):
    file = clips(root, "yes")[4]
    BAD[reason](file)
    data = load_from(root, tmp_path / "cache")
    labels = torch.cat([whole(part)[1] for part in (data.train, data.val, data.test)])
    assert labels.bincount().tolist() == [9] + [10] * 9
    (named,) = [record for record in caplog.records if str(file) in record.message]
    assert reason.partition(":")[0] in named.message
    assert named.levelno == logging.WARNING
    caplog.clear()
    load_from(root, tmp_path / "cache")  # from the cache, where the count is kept
    assert "1 skipped as bad" in caplog.text


def test_more_than_one_bad_file_in_a_hundred_stop(root, tmp_path):
    files = [clips(root, "on")[0], *clips(root, "off")[:3]]
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="4 of 100 files, more than 1 %") as raised:
        load_from(root, tmp_path / "cache")
    assert all(str(file) in str(raised.value) for file in files[:3])
    assert str(files[3]) not in str(raised.value)


def test_clips_of_another_length_are_dropped_and_counted(root, tmp_path, caplog):
    for file, length in zip(clips(root, "right"), (15_999, 16_001, 8_000), strict=False):
        soundfile.write(file, np.zeros(length), 16_000, subtype="PCM_16")
    data = load_from(root, tmp_path / "cache")
    assert data.train.dataset_size + data.val.dataset_size + data.test.dataset_size == 97
    assert "Found 97 of the 34,975 clips of the full data set (3 dropped for another length" in caplog.text


def test_of_a_huge_recording_only_the_start_is_read(root, tmp_path):
    """A file of 3 GB whose header is right, of which the disk holds only the header."""
    file = clips(root, "right")[0]
    header, size = file.read_bytes()[:44], 3 * 2**30
    header = header[:4] + (size - 8).to_bytes(4, "little") + header[8:40] + (size - 44).to_bytes(4, "little")
    file.write_bytes(header)
    os.truncate(file, size)
    assert len(speech_commands._read(file)) == 16_001
    data = load_from(root, tmp_path / "cache")
    assert data.train.dataset_size + data.val.dataset_size + data.test.dataset_size == 99


def test_cache_serves_both_splits_until_a_file_changes(root, tmp_path, monkeypatch):
    for part, place in (("validation", 1), ("testing", 2)):
        file = clips(root, "yes")[place]
        (root / FOLDER / f"{part}_list.txt").write_text(f"yes/{file.name}\n")
    load_from(root, tmp_path / "cache")
    reads = []
    monkeypatch.setattr(speech_commands, "_read", lambda file: reads.append(file) or np.zeros(16_000, dtype=np.int16))
    load_from(root, tmp_path / "cache", split="official")
    assert reads == []
    BAD["2 channels"](clips(root, "yes")[0])
    load_from(root, tmp_path / "cache")
    assert len(reads) == 100


def key_of(root):
    return speech_commands._key(speech_commands._list_files(root / FOLDER))


def set_time(file):
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_time, id="time"),
        pytest.param(lambda file: os.truncate(file, 100), id="size"),
        pytest.param(lambda file: file.rename(file.with_name("other.wav")), id="name"),
        pytest.param(lambda file: file.rename(file.parent.with_name("yes") / file.name), id="word"),
        pytest.param(Path.unlink, id="number"),
    ],
)
def test_any_change_of_a_file_makes_another_cache_key(root, change):
    file = clips(root, "go")[0]
    before, stat = key_of(root), file.stat()
    assert key_of(root) == before
    change(file)
    if change is not set_time and file.exists():
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert key_of(root) != before


def test_a_change_of_what_a_link_leads_to_makes_another_cache_key(root, tmp_path):
    file = clips(root, "go")[0]
    target = file.rename(tmp_path / "clip.wav")
    file.symlink_to(target)
    before = key_of(root)
    set_time(target)
    assert key_of(root) != before


@pytest.mark.parametrize("name", ["CACHE_VERSION", "CLIP_LENGTH", "MFCC"])
def test_another_way_to_make_the_coefficients_makes_another_cache_key(sample, monkeypatch, name):
    files = speech_commands._list_files(sample / FOLDER)
    before = speech_commands._key(files)
    monkeypatch.setattr(speech_commands, name, "another")
    assert speech_commands._key(files) != before


OTHER_CONTENT = {
    "nothing": lambda tensors: tensors.clear(),
    "one missing": lambda tensors: tensors.pop("kept"),
    "one more": lambda tensors: tensors.update(more=np.zeros(3)),
    "float64": lambda tensors: tensors.update(coefficients=tensors["coefficients"].astype(float)),
    "fewer times": lambda tensors: tensors.update(coefficients=tensors["coefficients"][:, 1:]),
    "fewer coefficients": lambda tensors: tensors.update(coefficients=tensors["coefficients"][:, :, 1:]),
    "fewer clips": lambda tensors: tensors.update(coefficients=tensors["coefficients"][1:]),
    "floating indices": lambda tensors: tensors.update(kept=tensors["kept"].astype(float)),
    "indices beyond the files": lambda tensors: tensors.update(kept=tensors["kept"] + 1),
    "indices below 0": lambda tensors: tensors.update(kept=tensors["kept"] - 1),
    "one index twice": lambda tensors: tensors.update(kept=np.sort(tensors["kept"] // 2 * 2)),
    "another order": lambda tensors: tensors.update(kept=tensors["kept"][::-1].copy()),
    "several counts": lambda tensors: tensors.update(num_bad=np.zeros(2, np.int64)),
    "half a count": lambda tensors: tensors.update(num_bad=np.array(0.5)),
}


@pytest.mark.parametrize("other", OTHER_CONTENT)
def test_a_cache_with_other_content_is_built_anew(sample, tmp_path, caplog, other):
    digest = load_from(sample, tmp_path).digest
    (path,) = tmp_path.glob("*.npz")
    intact = path.read_bytes()
    with np.load(path) as archive:
        tensors = dict(archive)
    OTHER_CONTENT[other](tensors)
    np.savez(path, **tensors)
    assert load_from(sample, tmp_path).digest == digest
    assert path.read_bytes() == intact
    assert caplog.text.count("cannot be used: it is built anew") == 1


def test_a_cache_without_any_clip_of_the_right_length_is_kept(root, tmp_path, caplog):
    for word in WORDS:
        for file in clips(root, word):
            soundfile.write(file, np.zeros(100), 16_000, subtype="PCM_16")
    for _ in range(2):
        with pytest.raises(ValueError, match='of "yes" there are 0'):
            load_from(root, tmp_path / "cache")
    assert "built anew" not in caplog.text


def test_cache_cut_short_is_rebuilt(sample, tmp_path):
    before = load_from(sample, tmp_path)
    (file,) = tmp_path.glob("*.npz")
    length = file.stat().st_size
    file.write_bytes(file.read_bytes()[: length // 2])
    after = load_from(sample, tmp_path)
    assert after.digest == before.digest
    assert torch.equal(whole(after.test)[0], whole(before.test)[0])
    assert file.stat().st_size == length


def test_synthetic_sample_is_written_once(tmp_path, caplog, monkeypatch):
    data = load_from("synthetic", tmp_path)
    assert data.train.dataset_size + data.val.dataset_size + data.test.dataset_size == 400
    assert "400 synthetic sounds, which are not speech" in caplog.text
    monkeypatch.setattr(synthetic, "write", None)
    assert load_from("synthetic", tmp_path).digest == data.digest


def test_import_leaves_torchaudio_out():
    code = "import sys, datasets.speech_commands; sys.exit('torchaudio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.skipif(not (RECORDINGS / FOLDER).is_dir(), reason="no recordings of Speech Commands at hand")
def test_real_recordings(tmp_path, caplog):
    num_files = sum(1 for word in WORDS for _ in (RECORDINGS / FOLDER / word).glob("*.wav"))
    data = load_from(RECORDINGS, tmp_path)
    num_clips = data.train.dataset_size + data.val.dataset_size + data.test.dataset_size
    assert f"Found {num_clips:,} of the 34,975 clips" in caplog.text
    assert 0.85 * num_files <= num_clips <= num_files
    paths, labels = whole(data.test)
    assert torch.isfinite(paths).all()
    assert labels.bincount(minlength=10).min() > 0


def test_clips_are_transformed_in_chunks_and_stay_in_order(sample, monkeypatch):
    files = [clips(sample, word)[0] for word in WORDS[:7]]
    alone = [speech_commands._coefficients([file])["coefficients"] for file in files]
    monkeypatch.setattr(speech_commands, "CHUNK_SIZE", 3)
    torch.testing.assert_close(speech_commands._coefficients(files)["coefficients"], torch.cat(alone))
