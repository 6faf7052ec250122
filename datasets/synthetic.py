"""Ten classes of synthetic sounds in the layout of Speech Commands; speech_commands.py loads them as "synthetic".

They are not speech: tones, chirps and bursts of noise that stand in for the ten words, for demonstrations and tests
only. An accuracy on them says that the pipeline works, nothing about speech recognition.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
VERSION = 1  # raise it with every change of what `write` writes

# A tone's pitch in octaves above its base pitch, while u goes from 0 to 1 over the length of the sound.
PITCHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "yes": lambda u: 0 * u,
    "no": lambda u: -1 + 0 * u,
    "up": lambda u: 3 * u - 1,
    "down": lambda u: 2 - 3 * u,
    "left": lambda u: 2 * np.sin(np.pi * u),
    "right": lambda u: 2 - 2 * np.sin(np.pi * u),
    "stop": lambda u: 2 * np.floor(2 * u),  # two tones, the second two octaves above the first
    "go": lambda u: 1 + np.sin(12 * np.pi * u),  # six waves of vibrato
}
# Bursts of noise, below or above a cut-off frequency.
NOISES = {"on": "lowpass", "off": "highpass"}


def write(root: Path, clips_per_word: int = 40) -> None:
    """Write `clips_per_word` clips of each class, the same on every call, to root/speech_commands_v0.02/<word>/.

    Each is one second of 16 kHz, 16 bits, one channel, in a file called <8 hexadecimal digits>_nohash_0.wav: a sound of
    its class with pitch, length, start and level drawn at random, in white noise of a level drawn at random.
    """
    generator = np.random.default_rng(0)
    for word in (*PITCHES, *NOISES):
        folder = root / "speech_commands_v0.02" / word
        folder.mkdir(parents=True)
        for speaker in generator.choice(2**32, clips_per_word, replace=False):
            # Through memory: soundfile itself does not say that a disk is full.
            content = io.BytesIO()
            soundfile.write(content, _clip(word, generator), SAMPLE_RATE, subtype="PCM_16", format="WAV")
            (folder / f"{speaker:08x}_nohash_0.wav").write_bytes(content.getbuffer())


def _clip(word: str, generator: np.random.Generator) -> np.ndarray:
    """One clip of the class, (16000,), within (-1, 1)."""
    length = int(SAMPLE_RATE * generator.uniform(0.5, 0.9))
    start = generator.integers(SAMPLE_RATE - length + 1)
    if word in PITCHES:
        octaves = PITCHES[word](np.linspace(0, 1, length)) + generator.uniform(-0.4, 0.4)
        phase = 2 * np.pi * np.cumsum(500 * 2**octaves) / SAMPLE_RATE
        sound = sum(np.sin(harmonic * phase) / harmonic for harmonic in (1, 2, 3))
    else:
        import scipy.signal  # takes a while, and what is in the cache does without

        cutoff = 1500 * 2 ** generator.uniform(-0.4, 0.4)
        sections = scipy.signal.butter(4, cutoff, NOISES[word], fs=SAMPLE_RATE, output="sos")
        sound = scipy.signal.sosfilt(sections, generator.standard_normal(length))
    sound *= np.hanning(length) * _decibels(generator.uniform(-20, -3)) / np.abs(sound).max()
    clip = _decibels(generator.uniform(-60, -40)) * generator.standard_normal(SAMPLE_RATE)
    clip[start : start + length] += sound
    return clip.clip(-1, 1)


def _decibels(level: float) -> float:
    """The amplitude of a level in decibels relative to full scale."""
    return 10 ** (level / 20)
