"""The table of `mutants.py` is of the library as it is: each fault changes one line of it."""

import collections

import mutants


def test_each_fault_changes_one_place_of_the_library():
    for fault in mutants.FAULTS:
        text = (mutants.ROOT / fault.path).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault
        before, after = text.splitlines(), fault.changed(text).splitlines()
        assert len(before) == len(after), fault
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, fault


def test_the_tests_that_should_notice_are_there():
    folder = mutants.ROOT / "tests"
    for fault in mutants.FAULTS:
        for name in fault.tests.split():
            assert len(list(folder.glob(f"*/test_{name}.py"))) == 1, fault


def test_there_are_many_and_no_two_are_alike():
    assert len(mutants.FAULTS) >= 60
    names = collections.Counter(f"{fault.module}: {fault.name}" for fault in mutants.FAULTS)
    assert max(names.values()) == 1
    assert len({fault.module for fault in mutants.FAULTS}) >= 40
