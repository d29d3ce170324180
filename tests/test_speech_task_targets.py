"""The speech tasks' targets: transcripts and frame labels that do not fit name their file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blnet.speech.alignment import FrameLabels
from blnet.speech.augment import Perturb
from blnet.speech.config import AugmentConfig, FeatureConfig
from blnet.speech.features import LogMel
from blnet.speech.recordings import Utterance
from blnet.speech.task_ctc import Spelling
from blnet.speech.tasks import make_task
from blnet.speech.text import Alphabet, required_frames
from blnet.training.loading import CorruptSample
from helpers.tone_runs import AB, MODEL, write_labelled
from helpers.tone_runs import labelled_config as config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc", r"the text has 'c' \(U\+0063\), which is not in the alphabet 'ab'; spell it out"),
        ("aaaaaab", r"its transcript needs 12 frames and its 0.20 s give 9; check the transcript"),
    ],
)
def test_a_transcript_that_does_not_fit_names_its_file(
    text: str, said: str, corpus: Path, tmp_path: Path
) -> None:
    row = {"audio": str(corpus / "train-0.wav"), "text": text}
    (tmp_path / "odd.jsonl").write_text(json.dumps(row))
    odd = config(corpus, "ctc")
    odd = dataclasses.replace(
        odd, data=dataclasses.replace(odd.data, path=str(tmp_path / "odd.jsonl"))
    )
    with pytest.raises(CorruptSample, match=said) as caught:
        make_task(odd).train_data[0]
    assert caught.value.args[0] == str(corpus / "train-0.wav")


@pytest.mark.parametrize("seconds", [0, 9])
def test_a_transcript_is_held_against_what_is_heard(
    seconds: int, corpus: Path, tmp_path: Path
) -> None:
    """A manifest may say anything of a recording's length, and CTC's loss would be infinite."""
    row = {"audio": str(corpus / "train-0.wav"), "text": "aaaaaab", "seconds": seconds}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    odd = config(corpus, "ctc")
    place = str(tmp_path / "long.jsonl")
    task = make_task(
        dataclasses.replace(odd, data=dataclasses.replace(odd.data, path=place, eval_path=place))
    )
    for part in (task.train_data, task.eval_data):
        with pytest.raises(CorruptSample, match=r"needs 12 frames and its 0\.20 s give 9"):
            part[0]


@settings(max_examples=60, deadline=None)
@given(
    rate=st.integers(4000, 50_000),
    hop=st.floats(0.005, 0.0125),
    samples=st.integers(1, 60_000),
    speed=st.sampled_from([0, 0.05, 0.1, 0.2, 0.5]),
    reduction=st.sampled_from([1, 2, 4]),
)
def test_ctc_takes_a_transcript_if_it_fits_at_the_fastest(
    rate: int, hop: float, samples: int, speed: float, reduction: int
) -> None:
    features = LogMel(FeatureConfig(bins=8, window=0.025, hop=hop), rate)
    fastest = Perturb(AugmentConfig(speed=speed), rate)._speeds[-1:]
    length = samples if not fastest else -(-samples * fastest[0].new_freq // fastest[0].orig_freq)
    frames = int(features.frames(torch.tensor(length)))
    frames = -(-frames // reduction)
    spell = Spelling(Alphabet("ab"), features, speed, reduction)
    said = ("ab" * frames)[:frames]
    if frames:
        assert required_frames(spell(Utterance("x.wav", samples / rate, said))) == frames
    with pytest.raises(ValueError, match=f"give {frames};"):
        spell(Utterance("x.wav", samples / rate, f"{said}{'ab'[frames % 2]}"))
    # Of a recording that cannot be read nothing is known; that is told when it is read.
    assert len(spell(Utterance("x.wav", 0, said * 2))) == 2 * frames


def test_evaluation_takes_what_fits_at_its_own_speed(corpus: Path, tmp_path: Path) -> None:
    # 0.2 s are 18 frames, so 9 answers, and played half as fast again 12 and 6.
    row = {"audio": str(corpus / "train-0.wav"), "text": "abababa"}
    (tmp_path / "fast.jsonl").write_text(json.dumps(row))
    fast = config(corpus, "ctc", augment=AugmentConfig(speed=0.5))
    place = str(tmp_path / "fast.jsonl")
    data = dataclasses.replace(fast.data, path=place, eval_path=place)
    task = make_task(dataclasses.replace(fast, data=data))
    _, target = task.eval_data[0]
    assert len(target) == 7
    with pytest.raises(CorruptSample, match="its transcript needs 7 frames"):
        task.train_data[0]


def test_the_time_reduction_that_transcripts_are_held_against_is_the_network_s(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dataclasses.replace(MODEL, time_reduction=4)
    trained = make_task(config(corpus, "ctc", model=model))
    network = trained.build_model()
    started = (network, trained.header())
    monkeypatch.setattr("blnet.speech.task.load_network", lambda name: started)
    task = make_task(config(corpus, "ctc", model=dataclasses.replace(MODEL, start="run")))
    assert task.time_reduction == 4
    with pytest.raises(ValueError, match=r"needs 7 frames and its 0.20 s give 5; .*\(4\)"):
        task.train_data._target(Utterance("x.wav", 0.2, "abababa"))
    assert task.build_model() is network
    assert task.header()["network"] == trained.header()["network"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment": AugmentConfig(shift=0.1)}, "--augment.shift moves a recording against its"),
        ({"data": {"labels": None}}, "--task frame needs --data.labels"),
        ({"data": {"alphabet": "abc"}}, "is spelled with 'ab'; give --data.alphabet the same"),
    ],
)
def test_frame_labels_that_do_not_fit(changes: Any, said: str, corpus: Path) -> None:
    plain = config(corpus, "frame")
    if "data" in changes:
        changes = {"data": dataclasses.replace(plain.data, **changes["data"])}
    with pytest.raises(ValueError, match=said):
        make_task(dataclasses.replace(plain, **changes))


def test_a_recording_without_frame_labels_is_named(corpus: Path) -> None:
    task = make_task(config(corpus, "frame"))
    FrameLabels.of([("other.wav", torch.zeros(3))], AB, 0.01, "x").save(corpus / "few")
    few = dataclasses.replace(task.config.data, labels=str(corpus / "few"))
    with pytest.raises(CorruptSample, match=r"has no labels of .*eval-2\.wav"):
        make_task(dataclasses.replace(task.config, data=few)).eval_data[0]
