"""A checkpoint that changed on disk is refused: any bit of any array, and of the manifest."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import draw

import jaxbptt

pytest.importorskip("orbax.checkpoint")

REC = jaxbptt.record(lambda w, c, x: (jnp.tanh(c @ w + x), c), window=3)
W, C = draw(0, 24, 24), draw(1, 2, 24)


@pytest.fixture(scope="module")
def state():
    tape = jax.jit(REC.init)(W, C, C)
    for _ in range(4):
        tape, _ = jax.jit(REC)(W, tape, C)
    return {"w": W, "tape": tape, "key": jax.random.key(3), "half": W.astype(jnp.bfloat16), "n": 7}


@pytest.fixture
def saved(state, tmp_path):
    with jaxbptt.checkpoints(tmp_path, REC) as store:
        store.save(5, state, data={"position": 123456})
    return tmp_path


def equal(a, b):
    def bits(v):
        is_key = jnp.issubdtype(getattr(v, "dtype", None), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(v) if is_key else v).tobytes()

    return all(map(lambda p, q: bits(p) == bits(q), jax.tree.leaves(a), jax.tree.leaves(b)))


def test_an_undamaged_one_comes_back(saved, state):
    got, data = jaxbptt.checkpoints(saved, REC).restore(state)
    assert equal(got, state)
    assert data == {"position": 123456}


# Of a read that failed orbax leaves futures behind, whose loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_flipped_bit_is_taken_for_what_was_saved(saved, state):
    """Wherever it is: it is refused, or it is in none of the bytes that are read."""
    drawn, refused = random.Random(0), 0
    files = [f for f in sorted(saved.rglob("*")) if f.is_file() and "/d/" in f.as_posix()]
    sizes = [f.stat().st_size for f in files]
    for file in drawn.choices(files, sizes, k=16):
        good = file.read_bytes()
        bad = bytearray(good)
        bad[drawn.randrange(len(bad))] ^= 1 << drawn.randrange(8)
        file.write_bytes(bad)
        try:
            got, _ = jaxbptt.checkpoints(saved, REC).restore(state)
        except ValueError:
            refused += 1
        else:
            assert equal(got, state)
        file.write_bytes(good)
    assert refused >= 4


def test_another_value_is_named_with_its_leaf(saved, state, monkeypatch):
    """As if the storage handed out other bits without noticing."""
    store = jaxbptt.checkpoints(saved, REC)
    read = store._disk.read

    def flipped(step, item, wanted):
        found = dict(read(step, item, wanted))
        name = next((name for name in found if name.endswith("half")), None)
        if name:
            array = np.array(found[name])
            array.view(np.uint16)[0, 0] ^= 1
            found[name] = array
        return found

    monkeypatch.setattr(store._disk, "read", flipped)
    with pytest.raises(ValueError, match=r"^checkpoint 5 in .* but like\['half'\] does not match"):
        store.restore(state)


def test_another_number_in_the_manifest_is_refused(saved, state):
    (file,) = [f for f in saved.rglob("*") if f.is_file() and b"123456" in f.read_bytes()]
    file.write_bytes(file.read_bytes().replace(b"123456", b"123457"))
    with pytest.raises(
        ValueError, match=r"^checkpoint 5 in .* but its manifest does not match its"
    ):
        jaxbptt.checkpoints(saved, REC).restore(state)


def test_one_of_before_there_were_checksums_is_read(saved, state):
    (file,) = [f for f in saved.rglob("*") if f.is_file() and b"123456" in f.read_bytes()]
    manifest = json.loads(file.read_text())
    for leaf in manifest["leaves"]:
        leaf.pop("checksum", None)
    del manifest["checksum"]
    file.write_text(json.dumps(manifest))
    assert equal(jaxbptt.checkpoints(saved, REC).restore(state)[0], state)


def without(key):
    def change(manifest):
        del manifest[key]
        return manifest

    return change


def without_names(manifest):
    del manifest["leaves"][1]["name"]
    return manifest


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((without(key), f"has no '{key}'") for key in "leaves tapes format jax data".split()),
        (without_names, "has no 'name' in entry 1 of 'leaves'"),
        (lambda m: m | {"leaves": {}}, "has no 'leaves' of the right type"),
        (lambda m: m | {"tapes": ["tape"]}, "has no 'path' in entry 0 of 'tapes'"),
        (lambda m: [m], "has no keys"),
        (lambda m: None, "has no keys"),
    ],
)
def test_a_manifest_that_lacks_something_is_refused(saved, state, change, said, sealed):
    (file,) = [f for f in saved.rglob("*") if f.is_file() and b"123456" in f.read_bytes()]
    manifest = json.loads(file.read_text())
    if not sealed:  # as of before there were checksums
        del manifest["checksum"]
    file.write_text(json.dumps(change(manifest)))
    with pytest.raises(ValueError, match=rf"^checkpoint 5 in .*, but its manifest {said}\. Take"):
        jaxbptt.checkpoints(saved, REC).restore(state)


@pytest.mark.parametrize("directory", [None, 3, b"run", ["run"], REC])
def test_a_directory_is_a_path(directory):
    with pytest.raises(ValueError, match=r"directory must be a path, .* but got .* Name a folder"):
        jaxbptt.checkpoints(directory, REC)
