"""`blnet train speech`: what runs learn and leave, go on from, refuse, skip and share."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blnet import checkpoint
from blnet.checkpoint import read_header
from blnet.cli import main
from blnet.speech.alignment import FrameLabels
from blnet.speech.config import AugmentConfig, SpeechConfig, TaskName
from blnet.speech.features import LogMel
from blnet.speech.inference import load_trained
from blnet.speech.network import SpeechNet
from blnet.speech.tasks import make_task
from blnet.speech.text import Alphabet
from blnet.speech.train import COMMAND
from blnet.trained import EMA, MODEL, load_network
from blnet.training.checkpoints import TRAINING, CheckpointFolder
from blnet.training.config import DistillationConfig
from blnet.training.journal import read_rows
from helpers.processes import free_port
from helpers.tone_runs import tiny_flags, train, train_together, write_corpus

KILLS = 6
AB = Alphabet("ab")
TEXTS: dict[str, tuple[str, ...]] = {"keyword": ("a", "b"), "ctc": ("ab", "ba", "b")}
TEXTS["frame"] = TEXTS["ctc"]
_LEARN = ("--batch-size=4", "--lr=0.01", "--augment.freq-masks=0", "--augment.time-masks=0")
# What makes the tiny networks learn in seconds.
LEARN = {
    "keyword": ("--epochs=8", *_LEARN),
    "ctc": ("--epochs=10", *_LEARN),
    "frame": ("--epochs=10", *_LEARN),
}

Launch = Callable[..., Any]
Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function that returns the folder of a task's recordings, labels and manifests."""

    @functools.cache
    def make(task: str) -> Path:
        folder = tmp_path_factory.mktemp(task)
        entries = []
        for name, count in (("train", 24), ("eval", 7)):
            write_corpus(folder, TEXTS[task], count, name)
            for number in range(count):
                text = TEXTS[task][number % len(TEXTS[task])]
                marks = torch.tensor([mark for c in text for mark in (AB.classes[c], 0)])
                # A letter is 12 frames of 10 ms, and 8 of silence.
                lengths = torch.tensor([12, 8] * len(text))
                file = str(folder / f"{name}-{number}.wav")
                entries.append((file, marks.repeat_interleave(lengths)))
        FrameLabels.of(entries, AB, 0.01, "by hand").save(folder / "labels")
        return folder

    return make


def flags(folder: Path, task: str, *words: str) -> list[str]:
    labels = [f"--data.labels={folder / 'labels'}"] if task == "frame" else []
    return tiny_flags(folder, task, *labels, *words)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, corpus: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Give a function that returns a run of each task; that of keywords has its plain network."""

    @functools.cache
    def make(task: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / task
        more = [f"--output={folder}", f"--baseline={'true' if task == 'keyword' else 'false'}"]
        assert main(flags(corpus(task), task, *LEARN[task], *more)) == 0
        return folder

    return make


def config(folder: Path, task: TaskName, *words: str) -> SpeechConfig:
    found, _ = COMMAND.parse(flags(folder, task, *words)[2:])
    assert isinstance(found, SpeechConfig)
    return found


# What is learnt, and what is left of it -----------------------------------------------------------


@pytest.mark.parametrize("task", ["keyword", "ctc", "frame"])
def test_tones_are_learnt(task: str, runs: Runs) -> None:
    run = runs(task)
    for folder in (run, run / "baseline") if task == "keyword" else (run,):
        rows = list(read_rows(folder, "epoch"))
        if task == "ctc":  # which needs longer to make words of what it knows
            assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
            assert rows[-1]["best"] <= 1
        else:
            assert rows[-1]["best"] == (1 if task == "keyword" else 0)
        assert ("cer" in rows[-1]) == (task != "keyword")
        assert ("train_accuracy" in rows[-1]) == (task != "ctc")
        assert (folder / "summary.png").is_file()
    assert (run / "baseline").exists() == (task == "keyword")


def test_a_keyword_run_says_what_it_came_to(runs: Runs, corpus: Any, capsys: Any) -> None:
    words = [*LEARN["keyword"], f"--output={runs('keyword')}", "--baseline=true", "--resume=auto"]
    capsys.readouterr()
    assert main(flags(corpus("keyword"), "keyword", *words)) == 0
    out = capsys.readouterr().out
    assert "bl_resnet22 (alpha 4, beta 2, width 0.125): best accuracy 100.00%" in out
    assert "\nresnet22 (width 0.125): best accuracy 100.00%" in out
    assert "try it: blnet predict speech FILE --checkpoint" in out


@pytest.mark.parametrize("task", ["keyword", "ctc", "frame"])
def test_a_checkpoint_says_all_that_its_use_needs(task: TaskName, runs: Runs, corpus: Any) -> None:
    trained = load_trained(runs(task), (task,))
    mine = config(corpus(task), task)
    assert trained.head == task
    assert trained.classes == (("a", "b") if task == "keyword" else ())
    assert trained.alphabet.characters == "ab"
    assert trained.features.as_dict() == LogMel(mine.features, 8000).as_dict()
    assert dataclasses.asdict(trained.data)["path"] == mine.data.path
    assert trained.title == "bl_resnet22 (alpha 4, beta 2, width 0.125)"
    assert trained.model.config.time_reduction == (1 if task == "frame" else 2)
    header = read_header(runs(task) / "best.safetensors")
    assert header["extra"]["task"] == "speech"
    json.dumps(make_task(mine).header())


def test_global_statistics_reach_the_checkpoint(corpus: Any, tmp_path: Path) -> None:
    words = ["--features.normalize=global", "--features.deltas=true", "--augment.speed=0.1"]
    out = tmp_path / "run"
    assert main(flags(corpus("ctc"), "ctc", *words, "--epochs=1", f"--output={out}")) == 0
    features = load_trained(out).features
    torch.manual_seed(5)  # recordings are varied as they are measured: always in the same way
    before = torch.random.get_rng_state()
    task = make_task(config(corpus("ctc"), "ctc", *words))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert features.mean.shape == (3, 16)
    assert torch.equal(features.mean, task.features.mean)
    assert torch.equal(features.std, task.features.std)
    assert LogMel.from_dict(json.loads(json.dumps(task.header()["features"]))).as_dict() == (
        features.as_dict()
    )
    # And they are those of the training set: its maps have mean 0 and variance 1, nearly.
    still = dataclasses.replace(task.config, augment=AugmentConfig())
    task = make_task(still)
    batch = task.prepare(task.collate([task.train_data[n] for n in range(3)]), training=False)
    valid = torch.cat([x[..., :n] for x, n in zip(batch["inputs"], batch["frames"])], -1)  # noqa: B905
    assert valid.mean(-1).abs().max() < 0.1
    assert (valid.std(-1) - 1).abs().max() < 0.1


# Going on from networks, and learning from them ---------------------------------------------------


def test_a_network_goes_on_from_another_s_weights(runs: Runs, corpus: Any, tmp_path: Path) -> None:
    on = tmp_path / "on"
    words = [f"--model.start={runs('ctc')}", f"--distillation.teacher={runs('ctc')}"]
    words += ["--epochs=1", "--lr=1e-12", "--weight-decay=0", f"--output={on}"]
    assert main(flags(corpus("ctc"), "ctc", *words)) == 0
    (first, _), (second, extra) = load_network(runs("ctc")), load_network(on)
    own = dict(second.named_parameters())
    for name, value in first.named_parameters():
        torch.testing.assert_close(own[name], value, msg=name)
    assert extra["network"]["name"] == "bl_resnet22"
    assert load_trained(on).title == load_trained(runs("ctc")).title


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("ctc", ["--model.start={keyword}"], "{keyword} differs in its task, keyword in place of "
         "ctc; choose a network that was trained alike"),
        ("frame", ["--model.start={ctc}", "--data.labels={labels}"],
         "differs in its task, ctc in place of frame"),
        ("ctc", ["--model.start={ctc}", "--data.alphabet=abc"], "number of classes, 3 in place of"),
        ("ctc", ["--model.start={ctc}", "--features.bins=20"], "features' bins, 16 in place of 20"),
        ("ctc", ["--model.start={ctc}", "--features.deltas=true"], "channels, 1 in place of 3"),
        ("ctc", ["--model.start={ctc}", "--features.normalize=global"], "features' normalize"),
        ("ctc", ["--model.start={ctc}", "--data.sample-rate=16000"], "features' sample_rate"),
        ("ctc", ["--model.start={ctc}", "--baseline=true"], "leave it out"),
        ("ctc", ["--model.start=/nowhere"], "/nowhere"),
        ("ctc", ["--distillation.teacher={keyword}"], "--distillation.teacher {keyword} differs"),
        ("ctc", ["--distillation.teacher={ctc}", "--model.time-reduction=4"],
         "answers for every 2 frames and the network for every 4"),
        ("ctc", ["--distillation.teacher={ctc}", "--data.alphabet=ba"],
         "answers 'a' where manifest has 'b'; choose a teacher of the same alphabet"),
        ("frame", [], "--task frame needs --data.labels"),
        ("keyword", ["--batch-size=100"], "more than the 24 training recordings"),
        ("keyword", ["--optimizer.name=sgd", "--lr=1e6", "--warmup-epochs=0", "--log-steps=1"],
         "loss became"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(
    task: str, words: list[str], said: str, runs: Runs, corpus: Any, tmp_path: Path, capsys: Any
) -> None:
    made = {name: runs(name) for name in ("keyword", "ctc") if f"{{{name}}}" in f"{words}"}
    made["labels"] = corpus(task) / "labels"
    words = [word.format(**made) for word in words]
    capsys.readouterr()
    out = f"--output={tmp_path / 'out'}"
    assert main([*tiny_flags(corpus(task), task), "--epochs=1", *words, out]) == 2
    told = capsys.readouterr().err
    assert said.format(**made) in told
    assert told.count("\n") == 1
    assert told.startswith("blnet train speech: error: ")


@pytest.mark.parametrize("flag", ["--model.start", "--distillation.teacher"])
def test_a_network_of_another_task_is_refused(
    flag: str, corpus: Any, tmp_path: Path, capsys: Any
) -> None:
    made = {"name": "resnext50_32x4d", "options": {}}
    path = tmp_path / "best.safetensors"
    checkpoint.save(torch.nn.Linear(2, 2), path, task="vision", network=made)
    words = [f"{flag}={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert main([*tiny_flags(corpus("keyword"), "keyword"), *words]) == 2
    assert capsys.readouterr().err == (
        f"blnet train speech: error: {flag} {tmp_path} holds a vision network where one for "
        "speech is needed; name a run of 'blnet train speech'\n"
    )


def test_a_teacher_of_other_words_is_refused(runs: Runs, corpus: Any) -> None:
    mine = config(corpus("keyword"), "keyword")
    mine = dataclasses.replace(mine, distillation=DistillationConfig(teacher="run"))
    task = make_task(mine)
    teacher, extra = load_network(runs("keyword"))
    task.as_teacher(teacher, extra)
    task.as_teacher(teacher, {})  # of which nothing is known
    said = "^--distillation.teacher run answers 'yes' where manifest has 'b'; choose a teacher of"
    with pytest.raises(ValueError, match=said):
        task.as_teacher(teacher, {**extra, "classes": ["a", "yes"]})
    with pytest.raises(ValueError, match="is no network for speech"):
        task.as_teacher(torch.nn.Linear(2, 2), {})


def test_a_teacher_hears_maps_as_it_was_taught_on(runs: Runs, corpus: Any) -> None:
    mine = config(corpus("keyword"), "keyword")
    features = dataclasses.replace(mine.features, normalize="global")
    mine = dataclasses.replace(
        mine, features=features, distillation=DistillationConfig(teacher="run")
    )
    task = make_task(mine)
    network, extra = load_network(runs("keyword"))
    theirs = LogMel(features, task.features.sample_rate)
    theirs.set_statistics(2 * task.features.mean - 1, 3 * task.features.std)
    teacher = task.as_teacher(network, {**extra, "features": theirs.as_dict()}).eval()
    samples, lengths = 0.1 * torch.randn(2, 8000), torch.tensor([8000, 6000])
    maps, frames = task.features(samples, lengths)
    assert not torch.allclose(maps, theirs(samples, lengths)[0])
    with torch.no_grad():
        wanted = network(*theirs(samples, lengths))
        torch.testing.assert_close(teacher(maps, frames), wanted, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_same_classes_only(corpus: Any, tmp_path: Path, capsys: Any) -> None:
    for name, count in (("train", 16), ("eval", 4)):
        write_corpus(tmp_path, ("a", "b"), count, name)
    words = flags(tmp_path, "keyword", "--epochs=1", "--resume=auto", f"--output={tmp_path / 'r'}")
    assert main(words) == 0
    for name in ("train", "eval"):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text(manifest.read_text().replace('"label": "b"', '"label": "c"'))
    capsys.readouterr()
    assert main(words) == 2
    assert "the data had" in capsys.readouterr().err


# Stops and several processes ----------------------------------------------------------------------


def check_same(one: Path, other: Path) -> None:
    """Two runs have the same bits in their newest checkpoint, best network and journal."""
    first, second = (CheckpointFolder(folder).latest() for folder in (one, other))
    assert first is not None
    assert second is not None
    assert first.name == second.name
    assert (first / EMA).exists() == (second / EMA).exists()
    for name in (MODEL, EMA) if (first / EMA).exists() else (MODEL,):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    states = [load_file(path / TRAINING) for path in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    for kind in ("train", "epoch"):
        told = [[(r["step"], r["loss"]) for r in read_rows(f, kind)] for f in (one, other)]
        assert told[0] == told[1]
        assert told[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", ["keyword", "ctc"])
def test_a_killed_run_goes_on_to_the_same_bits(
    task: str, corpus: Any, launch: Launch, tmp_path: Path
) -> None:
    varied = ["--augment.speed=0.1", "--augment.gain=6", "--augment.noise=0.5"]
    varied += ["--augment.shift=0.05", "--features.normalize=global"]
    settings = ["--epochs=4", "--checkpoint-steps=2", "--log-steps=1", "--resume=auto", *varied]
    settings += ["--ema.decay=0.9"] if task == "ctc" else []

    def start(folder: Path) -> Any:
        return launch(train, flags(corpus(task), task, *settings, f"--output={folder}"))

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    process = start(whole)
    process.join(60)
    assert process.exitcode == 0
    longest = time.monotonic() - began
    kills = finished = 0
    draw = random.Random()
    while kills < KILLS or not finished:
        process = start(killed)
        process.join(draw.uniform(0.2 * longest, longest) if kills < KILLS else 60)
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -9)
        if process.exitcode == 0:
            check_same(whole, killed)
            finished += 1
            shutil.rmtree(killed)


def test_two_processes_have_the_curve_of_one_that_accumulates(
    corpus: Any, launch: Launch, tmp_path: Path
) -> None:
    settings = ["--epochs=2", "--log-steps=1", "--schedule.warmup-epochs=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    words = flags(corpus("ctc"), "ctc", *settings)
    port = free_port()
    processes = [
        launch(train_together, rank, 2, port, [*words, f"--output={two}"]) for rank in range(2)
    ]
    assert main([*words, "--accumulate=2", f"--output={one}"]) == 0
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    curves = [[(r["step"], r["loss"]) for r in read_rows(f, "train")] for f in (one, two)]
    assert len(curves[0]) == 6
    assert [pytest.approx(row, rel=1e-5) for row in curves[0]] == curves[1]
    (first, _), (second, _) = load_network(one), load_network(two)
    for name, value in first.named_parameters():
        torch.testing.assert_close(second.get_parameter(name), value, rtol=1e-4, atol=1e-5)


# Recordings that cannot be used -------------------------------------------------------------------


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder of 200 training recordings: one is no recording, one has a foreign letter."""
    write_corpus(tmp_path, ("a", "b"), 200, "train")
    write_corpus(tmp_path, ("a", "b"), 4, "eval")
    (tmp_path / "train-7.wav").write_bytes(b"RIFF, but no more")
    respell(tmp_path, 12, "é")
    return tmp_path


def respell(folder: Path, number: int, text: str) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[number]["text"] = text
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_cannot_be_used_is_skipped_counted_and_named(spoilt: Path, capsys: Any) -> None:
    out = spoilt / "run"
    assert main(flags(spoilt, "ctc", "--epochs=2", f"--output={out}")) == 0
    found = {Path(row["name"]).name: row["reason"] for row in read_rows(out, "corrupt")}
    assert found.keys() == {"train-7.wav", "train-12.wav"}
    assert "'é' (U+00E9), which is not in the alphabet 'ab'" in found["train-12.wav"]
    said = capsys.readouterr().out.replace("\n", "")
    for name in found:
        assert said.count(name) == 1, "it is told once"
    assert len(list(read_rows(out, "epoch"))) == 2


def test_more_than_one_in_a_hundred_is_an_error(spoilt: Path, capsys: Any) -> None:
    respell(spoilt, 13, "a" * 30)  # of 0.2 s
    assert main(flags(spoilt, "ctc", "--epochs=2", f"--output={spoilt / 'run'}")) == 2
    told = capsys.readouterr().err
    assert "3 of the 200 training recordings cannot be read, more than 1%" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("task", ["keyword", "ctc", "frame"])
def test_every_augmentation_at_once(task: str, corpus: Any, tmp_path: Path) -> None:
    shift = [] if task == "frame" else ["--augment.shift=0.1"]
    words = [f"--augment.{name}" for name in ("speed=0.2", "gain=10", "noise=1", "freq-masks=2",
             "time-masks=2", "freq-width=4")]  # fmt: skip
    words += ["--epochs=1", "--label-smoothing=0.1", "--channels-last=true", *shift]
    out = tmp_path / "run"
    assert main(flags(corpus(task), task, *words, f"--output={out}")) == 0
    (row,) = read_rows(out, "epoch")
    assert row["loss"] > 0
    network, _ = load_network(out)
    assert isinstance(network, SpeechNet)
