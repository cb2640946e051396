"""The main job, interrupted and killed, goes on to the last bit; what doesn't fit is said."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from harness import PATIENCE, ROOT, environment

from jaxbptt._checkpoints.manifest import sealed
from jaxbptt._demo import job as demo_job
from jaxbptt._demo.cli import main
from jaxbptt._demo.train import BLOCK

pytest.importorskip("orbax.checkpoint")

SMALL = ["--cell", "rnn", "--hidden", "8", "--batch", "4", "--window", "4", "--every", "3"]
STEPS = 350  # no whole number of saves
OPTIONS = [*SMALL, "--steps", str(STEPS), "--save-every", "100"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "periodic.txt"
    path.write_text("the cat sat on the mat, and " * 80)
    return path


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Leaves out the picture, a third of a small job's time; other tests look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_job.results, "picture", lambda runs: mock.MagicMock())
        yield


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The results of a job that nothing interrupts."""
    out = tmp_path_factory.mktemp("alone")
    assert main(["--text", str(text), *OPTIONS, "--out", str(out)]) == 0
    return out


def params_of(out):
    with np.load(out / "parameters.npz") as saved:
        return dict(saved)


def facts_of(out):
    """The results, without what depends on the clock."""
    facts = json.loads((out / "results.json").read_text())
    for run in facts["runs"]:
        del run["seconds"], run["steps_per_second"]
    return facts


def assert_same_results(out, alone):
    ours, theirs = params_of(out), params_of(alone)
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    assert facts_of(out) == facts_of(alone)


def interrupted_after(steps, monkeypatch, run=0):
    """From now on a SIGINT comes after so many steps of one of the job's runs."""
    train, runs = demo_job.train, iter(range(9))

    def interrupted(*arguments, stop_asked, **options):
        blocks, this = iter(range(1, 99)), next(runs)

        def asked_after_a_block():
            if this == run and BLOCK * next(blocks) == steps:
                signal.raise_signal(signal.SIGINT)
            return stop_asked()

        return train(*arguments, stop_asked=asked_after_a_block, **options)

    monkeypatch.setattr(demo_job, "train", interrupted)


@pytest.fixture(scope="module", params=[(0, 150), (2, 200)], ids=str)
def left(request, text, tmp_path_factory):
    """The folder that a job leaves when it is interrupted in its first or last run."""
    run, steps = request.param
    out, said = tmp_path_factory.mktemp("left"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        interrupted_after(steps, patch, run)
        assert job(text, out) == 130
    facts = facts_of(out)
    assert facts["interrupted"] is True
    assert [each["steps"] for each in facts["runs"]] == [STEPS] * run + [steps]
    assert facts["runs"][-1]["curve"][-1][0] == steps
    last = f"interrupted after {steps} of {STEPS} steps of window"
    assert said.getvalue().splitlines()[-1].startswith(last)
    return out


@pytest.fixture
def interrupted(left, tmp_path):
    """That folder again, for one test alone."""
    return shutil.copytree(left, tmp_path / "job")


in_the_first_run = pytest.mark.parametrize("left", [(0, 150)], ids=str, indirect=True)


def test_interrupted_it_goes_on_to_the_last_bit(interrupted, text, alone):
    assert job(text, interrupted, "--resume") == 0
    assert_same_results(interrupted, alone)


KILLED_AT_ITS_FIRST_SAVE = """
import os, pathlib, signal, sys, time
import jaxbptt
from jaxbptt._demo.cli import main
save = jaxbptt.Checkpoints.save
def save_and_die(*arguments):
    save(*arguments)
    while not list(pathlib.Path(sys.argv[1]).glob("*/[0-9]*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
jaxbptt.Checkpoints.save = save_and_die
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_killed_it_goes_on_to_the_last_bit(text, alone, tmp_path):
    arguments = ["--text", str(text), *OPTIONS, "--out", str(tmp_path), "--resume"]
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT_ITS_FIRST_SAVE, tmp_path / "checkpoints", *arguments],
        cwd=ROOT,
        capture_output=True,
        env=environment(),
        timeout=PATIENCE,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not (tmp_path / "results.json").exists()
    assert main(arguments) == 0
    assert_same_results(tmp_path, alone)


def job(text, out, *more):
    return main(["--text", str(text), *OPTIONS, "--out", str(out), *more])


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@in_the_first_run
def test_what_does_not_fit_is_refused_and_nothing_is_lost(interrupted, text, capsys):
    before = content_of(interrupted)
    for more, said in [
        ([], "has an interrupted job. Add --resume"),
        (["--resume", "--window", "5"], "--window must be 4 to go on with the job"),
        (["--resume", "--learning-rate", "0.5"], "--learning-rate must be 0.005 to go on"),
        (["--resume", "--text", __file__], "has a job with another text"),
    ]:
        assert job(text, interrupted, *more) == 2
        assert said in capsys.readouterr().err
        assert content_of(interrupted) == before  # from which it goes on, as is held above


@in_the_first_run
def test_recorded_steps_of_another_jax_are_left_behind(interrupted, text, capsys):
    (manifest,) = (interrupted / "checkpoints" / "window-4-every-3").glob("150/manifest/metadata")
    told = manifest.read_text()
    assert f'"{jax.__version__}"' in told
    manifest.write_text(json.dumps(sealed(json.loads(told) | {"jax": "0.1.2"})))
    assert job(text, interrupted, "--resume", "--no-baseline") == 0
    said = capsys.readouterr().out
    assert "0.1.2" in said
    assert "The recorded steps are left behind, all else goes on." in said
    assert facts_of(interrupted)["runs"][0]["steps"] == STEPS


def test_a_finished_job_is_left_as_it_is(text, alone, capsys):
    before = (alone / "results.json").stat()
    assert job(text, alone, "--resume") == 0
    assert "is finished: there is nothing to go on with" in capsys.readouterr().out
    assert (alone / "results.json").stat() == before
    assert [path.name for path in (alone / "checkpoints").iterdir()] == ["job.json"]


def test_a_folder_that_is_not_the_jobs_is_not_emptied(text, tmp_path, capsys):
    theirs = tmp_path / "checkpoints" / "theirs"
    theirs.mkdir(parents=True)
    assert job(text, tmp_path, "--resume", "--no-baseline", "--steps", "20") == 0
    assert "there is no interrupted job" in capsys.readouterr().out
    assert theirs.exists()
