"""The recognition table: its facts, its recount, its formats and its file."""

import csv
import io
import json

import pytest

import blnet
from blnet import registry
from blnet.cli import Parser, main
from blnet.vision import table


@pytest.fixture(scope="module")
def rows():
    return table.recount()


def run(*words):
    parser = Parser(prog="blnet table")
    table.configure(parser)
    return table.run(parser.parse_args(words))


# paper.md, once more and by hand: (network, alpha, beta, error, GMACs, parameters).
PAPER = [
    ("ResNet-50", None, None, 23.66, "4.089", 25_557_032),
    ("bL-ResNet-50", 2, 2, 22.72, "2.911", 26_974_632),
    ("bL-ResNet-50", 2, 4, 22.69, "2.856", 26_694_568),
    ("bL-ResNet-50", 4, 2, 23.20, "2.491", 26_306_856),
    ("bL-ResNet-50", 4, 4, 23.15, "2.477", 26_236_456),
    ("bL-ResNet-50", 2, 4, 22.41, "2.856", 26_694_568),
    ("bL-ResNet-101", 2, 4, 21.34, "3.893", 41_851_560),
    ("bL-ResNeXt-50 32x4d", 2, 4, 21.62, "3.027", 26_192_168),
    ("bL-ResNeXt-101 32x4d", 2, 4, 20.87, "4.079", 41_512_744),
    ("bL-ResNeXt-101 64x4d", 2, 4, 20.34, "7.142", 77_355_816),
    ("bL-SEResNeXt-50 32x4d", 2, 4, 21.44, "3.030", 28_767_120),
    ("bL-SEResNeXt-101 32x4d", 2, 4, 21.04, "4.08", 45_881_952),
    ("bL-ResNet-152", 2, 4, None, "5.040", 57_359_016),
]


def test_facts_are_those_of_the_paper(rows):
    facts = [
        (
            r.network,
            r.alpha,
            r.beta,
            r.top1_error_percent,
            r.reference_gmacs,
            r.reference_parameters,
        )
        for r in rows
    ]
    assert facts == [(*head, float(gmacs), count) for *head, gmacs, count in PAPER]
    assert [r.group for r in rows] == [table.PAPER] * 5 + [table.OFFICIAL] * 8


def test_recount_agrees_with_the_reference(rows):
    for row in rows:
        assert row.difference_gmacs == 0, row.network
        assert row.difference_parameters == 0, row.network


def test_recount_is_a_count_of_our_networks(rows):
    for row in rows[::4]:
        options = {} if row.alpha is None else {"alpha": row.alpha, "beta": row.beta}
        counted = blnet.profile(registry.build(row.name, **options))
        assert (row.macs, row.parameters) == (counted.macs, counted.parameters)
        assert row.gmacs == round(counted.macs / 1e9, 3)


def test_differences_show(monkeypatch):
    # With another network behind the name, nothing may be left of the old figures.
    monkeypatch.setattr(table, "_count", lambda *_: (1_000, 2_500_000_000))
    rows = table.recount()
    for row, (*_, gmacs, parameters) in zip(rows, PAPER, strict=True):
        assert (row.macs, row.gmacs, row.parameters) == (2_500_000_000, 2.5, 1_000)
        assert row.difference_parameters == 1_000 - parameters
        assert row.difference_gmacs == pytest.approx(2.5 - float(gmacs), abs=1e-9)
    text = table.as_text(rows)
    assert "-25,556,032" in text
    assert "-1.589" in text
    assert "+0.023" in text


def test_notes_name_what_cannot_be_recounted(rows):
    notes = {row.network: row.note for row in rows if row.note}
    assert set(notes) == {"bL-ResNeXt-101 64x4d", "bL-SEResNeXt-101 32x4d", "bL-ResNet-152"}
    beta2 = blnet.profile(registry.build("bl_resnext101_64x4d", alpha=2, beta=2)).macs
    assert "7.97 GMACs were published" in notes["bL-ResNeXt-101 64x4d"]
    assert f"{beta2 / 1e9:.3f}" in notes["bL-ResNeXt-101 64x4d"]
    assert "4.08 GMACs is the published figure" in notes["bL-SEResNeXt-101 32x4d"]


def test_text(capsys, rows):
    assert run() == 0
    text = capsys.readouterr().out
    assert text == table.as_text(rows)
    lines = text.splitlines()
    (first,) = (line for line in lines if line.startswith("ResNet-50"))
    assert first.split() == [
        *("ResNet-50", "-", "-", "23.66", "4.089", "4.089", "0.000"),
        *("25,557,032", "25,557,032", "0"),
    ]
    (last,) = (line for line in lines if line.startswith("bL-SEResNeXt-101"))
    # As published, 4.08, not a 4.080 that nobody published.
    assert last.split()[5] == "4.08"
    assert "[2]" in last
    # Columns are aligned: the last digit of every error stands under the heading's end.
    end = lines[0].index("error %") + len("error %")
    for line in lines[1:]:
        if line.startswith(("ResNet", "bL-")):
            assert line[end - 1] != " "
            assert line[end] == " "
    assert "ICLR 2019" in text.replace("\n", " ")


def test_markdown(capsys):
    assert run("--format", "markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    piped = [line for line in lines if line.startswith("|")]
    assert len(piped) == 13 + 2 * 2
    assert len({line.count("|") for line in piped}) == 1
    assert piped[1].startswith("| --- | ---: |")


def test_json(capsys, rows):
    assert run("--format", "json") == 0
    read = json.loads(capsys.readouterr().out)
    assert read["input_size"] == [1, 3, 224, 224]
    assert "ICLR 2019" in read["source"]
    assert len(read["rows"]) == 13
    for ours, theirs in zip(rows, read["rows"], strict=True):
        assert theirs == vars(ours)
        assert isinstance(theirs["macs"], int)
        assert isinstance(theirs["parameters"], int)


def test_csv(capsys, rows):
    assert run("--format", "csv") == 0
    read = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(read) == 13
    for ours, theirs in zip(rows, read, strict=True):
        assert list(theirs) == list(vars(ours))
        expected = {k: "" if v is None else str(v) for k, v in vars(ours).items()}
        assert theirs == expected


@pytest.mark.parametrize("form", table.FORMATS)
def test_output_file_holds_what_would_be_printed(tmp_path, capsys, rows, form):
    path = tmp_path / "table"
    path.write_text("old")
    assert run("--format", form, "--output", str(path)) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text() == table.FORMATS[form](rows)
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "table"
    path.write_text("old")

    def fail():
        raise ValueError("no")

    monkeypatch.setattr(table, "recount", fail)
    with pytest.raises(ValueError, match="no"):
        run("--output", str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--format", "xml"), "invalid choice: 'xml'"),
        (("--output", "no/such/folder/table.txt"), "does not exist; create it first"),
        (("--output", "/"), "is a folder; give the name of a file to write"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["table", *words])
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())
