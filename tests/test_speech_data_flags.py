"""Which recordings a trained network meets: those of its training, changed by flags."""

import argparse
import dataclasses

import pytest

from blnet.speech.config import DataConfig
from blnet.speech.data_flags import add_data_flags, data_settings
from blnet.speech.inference import load_trained
from helpers import tones


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    return {"ctc": tones.save(tmp_path_factory.mktemp("nets") / "ctc.safetensors", "ctc")}


def given(*flags):
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    return vars(parser.parse_args(list(map(str, flags))))


@pytest.mark.parametrize(
    ("before", "flags", "after"),
    [
        ({"name": "fsdd", "path": "p", "limit": 5}, (), {"name": "fsdd", "path": "p", "limit": 5}),
        ({"name": "fsdd", "path": "p", "limit": 5}, ("--limit", 3, "--holdout-speaker", "ann"),
         {"name": "fsdd", "path": "p", "limit": 3, "holdout_speaker": "ann"}),
        ({"name": "manifest", "path": "p", "eval_path": "e"}, ("--data-path", "./p"),
         {"name": "manifest", "path": "./p", "eval_path": "e"}),
        ({"name": "manifest", "path": "p", "limit": 5}, ("--data-path", "q"),
         {"name": "manifest", "path": "q", "limit": 5}),
        ({"name": "manifest", "path": "p", "limit": 5}, ("--eval-path", "f"),
         {"name": "manifest", "path": "p", "eval_path": "f"}),
        ({"name": "manifest", "path": "p", "eval_path": "e", "limit": 5}, ("--eval-path", "f"),
         {"name": "manifest", "path": "p", "eval_path": "f", "limit": 5}),
        ({"name": "manifest", "path": "p", "eval_path": "e"},
         ("--data", "folder", "--data-path", "p"),
         {"name": "folder", "path": "p", "eval_path": "e"}),
        ({"name": "manifest", "path": "p", "holdout": 0.3, "split_seed": 2},
         ("--data", "folder", "--data-path", "p"),
         {"name": "folder", "path": "p", "holdout": 0.3, "split_seed": 2}),
        ({"name": "manifest", "path": "p"}, ("--data.path", "q", "--data.eval-path", "f"),
         {"name": "manifest", "path": "q", "eval_path": "f"}),
        ({"name": "librispeech", "path": "p", "eval_path": "dev-clean"}, ("--data-path", "q"),
         {"name": "librispeech", "path": "q", "eval_path": "dev-clean"}),
        ({"name": "fsdd", "path": "p", "limit": 5, "sample_rate": 8000, "alphabet": "abc"},
         ("--data", "yesno", "--data-path", "q"),
         {"name": "yesno", "path": "q", "sample_rate": 8000, "alphabet": "abc"}),
        ({"name": "fsdd", "path": "p"}, ("--data", "manifest", "--data-path", "q"),
         {"name": "manifest", "path": "q", "eval_path": "q"}),
        ({"name": "fsdd", "path": "p"},
         ("--data", "folder", "--data-path", "q", "--eval-path", "r"),
         {"name": "folder", "path": "q", "eval_path": "r"}),
    ],
)  # fmt: skip
def test_data_are_those_of_training_but_for_the_flags(nets, before, flags, after):
    trained = dataclasses.replace(load_trained(nets["ctc"]), data=DataConfig(**before))
    assert data_settings(trained, given(*flags), evaluating=True) == DataConfig(**after)


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_part_with_a_place_of_its_own_is_not_guessed(nets, evaluating):
    own = DataConfig(name="manifest", path="p", eval_path="e")
    trained = dataclasses.replace(load_trained(nets["ctc"]), data=own)
    with pytest.raises(ValueError, match=r"--data-path q .* e was evaluated on; .* --eval-path"):
        data_settings(trained, given("--data-path", "q"), evaluating=evaluating)


@pytest.mark.parametrize(
    ("flags", "evaluating"),
    [
        (("--data-path", "q"), False),  # of which align and ngrams hold a share out
        (("--data-path", "q", "--holdout-speaker", "ann"), True),
    ],
)
def test_not_all_of_a_manifest_is_evaluated(nets, flags, evaluating):
    trained = load_trained(nets["ctc"])
    trained = dataclasses.replace(trained, data=DataConfig(name="fsdd", path="p"))
    found = data_settings(trained, given("--data", "manifest", *flags), evaluating=evaluating)
    assert found.eval_path is None


def test_a_corpus_with_a_split_of_its_own_has_no_other_name(nets):
    trained = load_trained(nets["ctc"])
    trained = dataclasses.replace(trained, data=DataConfig(name="fsdd", path="p"))
    words = ("--data", "manifest", "--data-path", "p")
    with pytest.raises(ValueError, match=r"trained on p as fsdd, which has a split .* --eval-path"):
        data_settings(trained, given(*words), evaluating=True)
    found = data_settings(trained, given(*words, "--eval-path", "e"), evaluating=True)
    assert found.eval_path == "e"
