"""What the main job deletes in its folder: what it has made itself, and no more."""

import contextlib
import json
import shutil

import pytest

pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("matplotlib")

from jaxbptt._demo import saves as demo_saves
from jaxbptt._demo.cli import main

SMALL = "--cell rnn --hidden 4 --batch 2 --window 2 --steps 4 --no-baseline --save-every 2".split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("hello world " * 300)
    return path


def job(text, out, *more):
    return main(["--text", str(text), *SMALL, "--out", str(out), *more])


def test_folders_of_others_are_left_alone(text, tmp_path):
    out = tmp_path / "out"
    notes = out / "checkpoints" / "window-functions" / "1"
    notes.mkdir(parents=True)
    (notes / "data").write_text("precious")
    assert job(text, out) == 0
    assert job(text, out) == 0  # and once more over its own results
    assert (notes / "data").read_text() == "precious"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "job.json",
        "window-functions",
    ]


def test_a_folder_of_others_in_the_place_of_a_run_is_refused(text, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "checkpoints" / "window-2" / "3").mkdir(parents=True)
    (out / "checkpoints" / "window-2" / "3" / "data").write_text("precious")
    assert job(text, out) == 2
    assert "was not made by this program. Name another --out." in capsys.readouterr().err
    assert (out / "checkpoints" / "window-2" / "3" / "data").read_text() == "precious"


@pytest.mark.exhaustive
def test_notes_put_among_the_checkpoints_stay(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    end = demo_saves.JobCheckpoints.finish

    def finish(saves):
        (out / "checkpoints" / "window-2" / "notes").write_text("precious")
        end(saves)

    monkeypatch.setattr(demo_saves.JobCheckpoints, "finish", finish)
    assert job(text, out) == 0
    left = [path.name for path in (out / "checkpoints" / "window-2").iterdir()]
    assert left == ["notes"]
    assert job(text, out) == 0  # the folder is known to be its own


def test_killed_while_it_deletes_a_finished_job_it_is_finished(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def killed(path):
        (path / "manifest" / "metadata").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_saves.shutil, "rmtree", killed)
        with contextlib.suppress(KeyboardInterrupt):
            job(text, out)
    assert any((out / "checkpoints").glob("window-2/[0-9]*"))
    before = (out / "results.json").read_bytes()
    capsys.readouterr()
    assert job(text, out, "--resume") == 0
    assert "finished" in capsys.readouterr().out
    assert (out / "results.json").read_bytes() == before
    assert not any((out / "checkpoints").glob("window-2/[0-9]*"))


@pytest.mark.exhaustive
def test_a_file_of_another_program_is_no_job(text, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "job.json").write_text(json.dumps({"finished": False}))
    assert job(text, out) == 0
    shutil.rmtree(out)


def test_it_is_saved_after_each_block_that_passes_a_number_of_steps():
    saved = []

    class Store:
        def save(self, steps, state, data):
            saved.append(steps)

    class At:
        state, curve, held_out_curve, seconds = None, [], [], 0.0

        def __init__(self, steps):
            self.steps = steps

    saves = demo_saves.RunCheckpoints(Store(), every=50, last=0)
    for steps in (30, 60, 90, 130, 150, 170):
        saves.save(At(steps), last=False)
    saves.save(At(170), last=True)
    assert saved == [60, 130, 150, 170]
