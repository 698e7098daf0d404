"""Three trained networks of different shape, from wheels on PyPI: for pictures, sound and text.

Vision: PaddleOCR's text recognition (rapidocr-onnxruntime, Apache 2.0). Audio: Silero's voice activity detector
(silero-vad, MIT). Text: Google's detector of file types (magika, Apache 2.0). What they are given is drawn and
spoken here, so that the answers are known: `read` and `label` say what they mean; above 0.5, somebody speaks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from environments import folder_of
from numpy.typing import NDArray

Array = NDArray[Any]

# Seven rows of five points each.
GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}
POINT = 5
VOICE_HZ = 16_000
VOICE_FRAME, VOICE_CONTEXT = 512, 64
MAGIKA_MODEL = "standard_v3_3"


@dataclass(frozen=True)
class Network:
    """An ONNX file, and requests that it is asked in earnest."""

    name: str
    path: Path
    requests: list[dict[str, Array]]


def vision(texts: Sequence[str] = ("1984", "20736", "355113"), seed: int = 7) -> Network:
    """Reads a line of text: float32 (batch, 3, 48, width) to (batch, width / 8, 6625), 10.9 MB.

    The width differs from request to request, the second holds two pictures.
    """
    folder = folder_of("neural_networks") / "rapidocr_onnxruntime" / "models"
    random = np.random.default_rng(seed)
    requests = [{"x": drawn(text, random)[None]} for text in texts]
    requests.insert(1, {"x": np.concatenate([requests[0]["x"], requests[0]["x"][..., ::-1]])})
    return Network("reader", folder / "ch_PP-OCRv4_rec_infer.onnx", requests)


def vision_detection(size: tuple[int, int] = (320, 480), seed: int = 7) -> Network:
    """Finds where text is, point by point: float32 (batch, 3, height, width) to (batch, 1, height, width), 4.7 MB."""
    folder = folder_of("neural_networks") / "rapidocr_onnxruntime" / "models"
    page = np.ones((3, *size), np.float32)
    line = drawn("355113", np.random.default_rng(seed))
    page[:, 100:148, 40 : 40 + line.shape[2]] = line
    return Network("finder", folder / "ch_PP-OCRv4_det_infer.onnx", [{"x": page[None]}])


def audio(seconds: float = 1.5, seed: int = 7) -> Network:
    """Tells whether somebody speaks: a frame of sound, a state that the next request takes, and a scalar, 2.3 MB.

    float32 (batch, 576), float32 (2, batch, 128) and int64 () to (batch, 1) and the next state. The first
    half of the requests is speech, the second a quiet room; each has the state of a beginning: pass `stateN` on
    to the next, and 0 again to the first of the second half.
    """
    path = folder_of("neural_networks") / "silero_vad" / "data" / "silero_vad.onnx"
    heard = [*frames(spoken(seconds, seed)), *frames(hushed(seconds, seed))]
    state, rate = np.zeros((2, 1, 128), np.float32), np.array(VOICE_HZ, np.int64)
    requests: list[dict[str, Array]] = [{"input": frame[None], "state": state, "sr": rate} for frame in heard]
    return Network("listener", path, requests)


def text() -> Network:
    """Tells the type of a file by its text: int32 (batch, 2048) to float32 (batch, 214), 3.2 MB."""
    path = folder_of("neural_networks") / "magika" / "models" / MAGIKA_MODEL / "model.onnx"
    here = Path(__file__).parents[2]
    files = [Path(__file__), here / "pyproject.toml", here / "README.md", here / "Dockerfile"]
    rows = [tokens(file.read_bytes()) for file in files]
    return Network("filetype", path, [{"bytes": row[None]} for row in rows] + [{"bytes": np.stack(rows)}])


def drawn(line: str, random: np.random.Generator) -> NDArray[np.float32]:
    """A picture of digits, dark on light, 48 points high, as the reader wants it: from -1 to 1, with some noise."""
    rows = [[[int(point) for point in row] for row in GLYPHS[digit].split()] for digit in line]
    ink = np.concatenate([np.pad(np.array(glyph), ((1, 1), (1, 1))) for glyph in rows], axis=1)
    large = np.kron(ink, np.ones((POINT, POINT)))
    picture = np.pad(large, (((48 - large.shape[0]) // 2, (49 - large.shape[0]) // 2), (8, 8)))
    # Soft edges, as a camera has them.
    for axis in (0, 1):
        picture = (np.roll(picture, -1, axis) + picture + np.roll(picture, 1, axis)) / 3
    grey = np.clip(1 - 1.8 * picture + random.normal(0, 0.02, picture.shape), -1, 1)
    return np.broadcast_to(grey, (3, *grey.shape)).astype(np.float32)


def read(answer: Array, network: Network) -> list[str]:
    """The text in each picture, from what the reader answers."""
    model = onnx.load(network.path)
    known = next(prop.value for prop in model.metadata_props if prop.key == "character").splitlines()
    # The first class says that a letter goes on, the last is the space.
    letters = ["", *known, " "]
    found = []
    for row in answer.argmax(axis=2):
        starts = [int(now) for before, now in zip([0, *row], row, strict=False) if now != before]
        found.append("".join(letters[number] for number in starts))
    return found


def spoken(seconds: float, seed: int) -> NDArray[np.float32]:
    """Vowels as a voice makes them: pulses through three resonances that wander, in syllables."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * VOICE_HZ)) / VOICE_HZ
    pitch = 120 + 15 * np.sin(2 * np.pi * 2.1 * time) + random.normal(0, 0.5, time.size).cumsum() * 0.02
    turns = np.cumsum(pitch) / VOICE_HZ
    pulses = np.diff(np.floor(turns), prepend=0.0) + random.normal(0, 0.01, time.size)
    sound = np.zeros_like(time)
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480), (300, 870, 2240)]
    which = (time * 5).astype(int) % len(vowels)
    for number in range(3):
        centre = np.convolve(np.array(vowels)[which, number], np.hanning(1601) / 800, "same")
        sound += _resonance(pulses, centre, 60 + 40 * number) / (number + 1)
    sound *= 0.4 + 0.6 * np.abs(np.sin(np.pi * 2.5 * time))
    return np.asarray(0.5 * sound / np.abs(sound).max(), np.float32)


def hushed(seconds: float, seed: int) -> NDArray[np.float32]:
    """A quiet room."""
    return np.random.default_rng(seed).normal(0, 1e-3, int(seconds * VOICE_HZ)).astype(np.float32)


def frames(sound: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """What the listener takes at a time: 32 ms, after the last 4 ms of the frame before."""
    padded = np.pad(sound, (VOICE_CONTEXT, 0))
    starts = range(0, sound.size - VOICE_FRAME + 1, VOICE_FRAME)
    return [padded[start : start + VOICE_CONTEXT + VOICE_FRAME] for start in starts]


def tokens(content: bytes) -> NDArray[np.int32]:
    """The first and the last 1024 bytes, without space around, as the detector of file types wants them."""
    block, half, padding = 4096, 1024, 256
    first, last = content[:block].lstrip()[:half], content[-block:].rstrip()[-half:]
    row = np.full(2 * half, padding, np.int32)
    row[: len(first)] = list(first)
    row[2 * half - len(last) :] = list(last)
    return row


def label(answer: Array, network: Network) -> list[str]:
    """The file type that the detector gives the highest score, for each file."""
    settings = json.loads(network.path.with_name("config.min.json").read_text())
    return [settings["target_labels_space"][number] for number in answer.argmax(axis=1)]


def _resonance(pulses: Array, centre: Array, width: float) -> Array:
    """Two poles that move: what a cavity of the mouth does."""
    radius = np.exp(-np.pi * width / VOICE_HZ)
    back = 2 * radius * np.cos(2 * np.pi * centre / VOICE_HZ)
    out = np.zeros(pulses.size + 2)
    for i, pulse in enumerate(pulses):
        out[i + 2] = pulse + back[i] * out[i + 1] - radius**2 * out[i]
    return out[2:]
