"""What sharing gradients costs, between two processes."""

import json
import os
import subprocess
import sys

import pytest

from blnet.bench import scale
from blnet.bench.scale import Sharing


def test_two_processes_share_their_gradients(tmp_path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"),
            *("blnet.bench.scale", "--models", "resnet18", "--batch", "2", "--size", "32"),
            *("--rounds", "2", "--json", str(tmp_path / "scale.json")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "scale.json").read_text())
    assert (kept["batch"], kept["size"], kept["rounds"]) == (2, 32, 2)
    assert {"device", "threads", "packages", "commit"} <= set(kept["environment"])
    assert kept["backend"] == "gloo"
    (found,) = kept["networks"]
    assert found["processes"] == 2
    assert found["gradient_bytes"] == 4 * 11_689_512  # torchvision's count of ResNet-18
    assert min(found["alone"], found["shared"], found["exchange"]) > 0
    assert "| resnet18 | 2 | 46.8 |" in done.stdout
    said = "1 thread and 2 images of 32x32 pixels a process, medians of 2 rounds:"
    assert f"{kept['environment']['device']}, {said}" in done.stdout


@pytest.mark.parametrize(("shared", "hidden"), [(1.0, 1.0), (1.1, 0.5), (1.5, 0.0), (0.9, 1.0)])
def test_what_backward_hides(shared: float, hidden: float) -> None:
    assert Sharing("n", 2, 4, 1.0, shared, 0.2).hidden == pytest.approx(hidden)


def test_alone_it_says_what_to_do(capsys) -> None:
    with pytest.raises(SystemExit):
        scale.main([])
    assert "start it with torchrun" in capsys.readouterr().err
