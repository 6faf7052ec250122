"""The synthetic sounds: the layout of the data set, the same files on every call, no two sounds alike."""

import re

import numpy as np
import pytest
import soundfile

from datasets import speech_commands, synthetic


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    synthetic.write(root, clips_per_word=3)
    return sorted(root.rglob("*.wav"))


def test_layout(files):
    assert [file.parent.name for file in files] == sorted(3 * speech_commands.WORDS)
    assert {file.parent.parent.name for file in files} == {"speech_commands_v0.02"}
    assert all(re.fullmatch("[0-9a-f]{8}_nohash_0.wav", file.name) for file in files)


def test_format(files):
    for file in files:
        info = soundfile.info(file)
        assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1)
        assert (info.samplerate, info.frames) == (16_000, 16_000)


def test_same_on_every_call(files, tmp_path):
    synthetic.write(tmp_path, clips_per_word=3)
    again = sorted(tmp_path.rglob("*.wav"))
    assert [file.name for file in again] == [file.name for file in files]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(again, files, strict=True))


def test_every_sound_is_another(files):
    levels = [np.abs(soundfile.read(file)[0]).max() for file in files]
    assert len({file.read_bytes() for file in files}) == len(files)
    assert min(levels) > 0.05
    assert max(levels) < 1
    assert max(levels) > 2 * min(levels)


def test_chirps_go_up_and_down(files):
    for file in files:
        if file.parent.name in ("up", "down"):
            waveform, _ = soundfile.read(file)
            middle = int(np.average(np.arange(16_000), weights=waveform**2))
            # The strongest frequency, in Hz, well before and well after the middle of the sound.
            parts = waveform[: middle - 1500], waveform[middle + 1500 :]
            first, second = (np.abs(np.fft.rfft(part, 16_000)).argmax() for part in parts)
            assert (second > 1.5 * first) if file.parent.name == "up" else (first > 1.5 * second)


def test_on_is_dull_and_off_is_sharp(files):
    def centroid(file):
        spectrum = np.abs(np.fft.rfft(soundfile.read(file)[0])) ** 2
        return (spectrum * np.arange(len(spectrum))).sum() / spectrum.sum()

    dull, sharp = ([centroid(file) for file in files if file.parent.name == word] for word in ("on", "off"))
    assert max(dull) < min(sharp)
