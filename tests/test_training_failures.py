"""What goes wrong in training: told in one sentence, and the run goes on after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from blnet.training import run as run_module
from blnet.training.checkpoints import CheckpointFolder
from blnet.training.journal import PLOT
from blnet.training.run import report_stop, run
from blnet.training.stopping import Interrupted
from blnet.training.task import Batch
from helpers.blobs import TinyTask, check_same_weights, tiny_config, train_tiny


def test_a_batch_larger_than_the_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 12 is more than the 11 training blobs"):
        train_tiny(str(tmp_path / "run"), {"train": 11})


TROUBLES = {
    "memory": r"a micro-batch of 12 blobs does not fit into the memory of the cpu device; "
    r"lower --batch-size \(12\) or raise --accumulate \(1\)",
    "nan": r"the loss became nan by step 8 and the last good checkpoint is .*step-00000006; start",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_is_one_sentence_and_the_run_goes_on_after_it(trouble: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings: dict[str, Any] = {"epochs": 3}
    train_tiny(str(whole), **settings)
    with pytest.raises(ValueError, match=TROUBLES[trouble]) as caught:
        train_tiny(str(broken), {"trouble": trouble, "at": 7}, **settings)
    assert len(str(caught.value).splitlines()) == 1
    latest = CheckpointFolder(broken).latest()
    assert latest is not None
    assert latest.name == "step-00000006"
    assert (broken / PLOT).is_file()
    train_tiny(str(broken), **settings)
    check_same_weights(whole, broken)


class Exploding(TinyTask):
    """Its loss is a number, whose gradient is none."""

    def loss(self, outputs: Tensor, batch: Batch, training: bool) -> Tensor:
        return super().loss(outputs, batch, training) + 0 * (outputs * 0).sqrt().sum()


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), checkpoint_steps=1)
    with pytest.raises(ValueError, match=r"the loss became nan by step 1 and no checkpoint was"):
        run(Exploding(), config, tmp_path / "run")
    assert CheckpointFolder(tmp_path / "run").latest() is None


def test_a_network_too_large_for_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyTask, "build_model", lambda self: nn.Linear(2**23, 2**22))
    with pytest.raises(ValueError, match="the network does not fit into the memory of the cpu"):
        train_tiny(str(tmp_path / "run"))


def test_a_stream_that_ends_too_early_says_so(tmp_path: Path) -> None:
    task = TinyTask(stream=True)
    task.train_data.ends = 30
    with pytest.raises(ValueError, match="blobs ended in the middle of an epoch of 48"):
        run(task, tiny_config(str(tmp_path)), tmp_path / "run")


class Whole(TinyTask):
    """Its batch normalisation sees one value for each sample."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))


def test_a_batch_too_small_for_batch_normalisation_says_so(tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path), accumulate=12)
    told = (
        r"a micro-batch of 1 blobs is too little .*--batch-size \(12\) or lower --accumulate \(12"
    )
    with pytest.raises(ValueError, match=told):
        run(Whole(), config, tmp_path / "run")


def test_a_picture_that_fails_hides_no_error_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*arguments: Any) -> None:
        raise RuntimeError("no fonts\nanywhere")

    monkeypatch.setattr(run_module, "plot", failing)
    train_tiny(str(tmp_path / "run"), epochs=1)
    assert "warning: summary.png could not be drawn (no fonts anywhere)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the loss became nan"):
        train_tiny(str(tmp_path / "other"), {"trouble": "nan"})


def test_a_stop_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    stop = Interrupted(15, 40)
    assert stop.status == 143
    report_stop(stop, "blnet try", Path("results/x"))
    told = capsys.readouterr().err
    assert "stopped after step 40" in told
    assert "--output results/x --resume auto" in told
