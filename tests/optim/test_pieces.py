"""Journals cut, joined and compared: what is joined again has its bytes, what does not belong together is refused."""

import itertools

import pytest

import qzo
from qzo.optim.journal import RECORD_BYTES, JournalError, read
from qzo.optim.pieces import alike, concat, contents, cut, header_differences
from tests.support.journals import GOLDEN, golden_model

WHOLE = next(path for path in GOLDEN if path.name == "v1-ih4.qzo")  # four steps of two directions
STEP = 2 * RECORD_BYTES


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """(start, until) -> the piece of these steps, all of them."""
    folder = tmp_path_factory.mktemp("pieces")
    found = {}
    for start, until in itertools.combinations_with_replacement(range(5), 2):
        found[start, until] = folder / f"{start}-{until}.qzo"
        assert cut(WHOLE, found[start, until], start, until) == until - start
    return found


def test_the_first_steps_are_a_journal_and_more_of_it_are_the_file(pieces):
    whole = WHOLE.read_bytes()
    for until in range(5):
        assert pieces[0, until].read_bytes() == whole[: len(whole) - (4 - until) * STEP]


def test_a_piece_says_where_it_begins_and_is_no_run(pieces):
    found = contents(pieces[1, 3])
    assert (found.first, len(found.steps)) == (1, 2)
    assert repr(found.steps) == repr(contents(WHOLE).steps[1:3])
    for use in (read, lambda path: qzo.replay(golden_model(), path)):
        with pytest.raises(JournalError, match=r"1-3.qzo is a piece of a journal, from step 1 on: qzo journal concat"):
            use(pieces[1, 3])


@pytest.mark.parametrize("ends", [(4,), (1, 4), (0, 4), (2, 3, 4), (1, 2, 3, 4), (2, 2, 4)])
def test_pieces_joined_are_the_whole(pieces, tmp_path, ends):
    parts = [pieces[bounds] for bounds in itertools.pairwise((0, *ends))]
    assert concat(parts, tmp_path / "j") == 4
    assert (tmp_path / "j").read_bytes() == WHOLE.read_bytes()


def test_pieces_of_pieces(pieces, tmp_path):
    assert cut(pieces[1, 4], tmp_path / "a", 2, None) == 2
    assert cut(pieces[1, 4], tmp_path / "b", None, 2) == 1
    assert (tmp_path / "a").read_bytes() == pieces[2, 4].read_bytes()
    assert concat([tmp_path / "b", tmp_path / "a"], tmp_path / "c") == 3
    assert (tmp_path / "c").read_bytes() == pieces[1, 4].read_bytes()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(0, 2), (3, 4)], "3-4.qzo begins with step 3, step 2 was expected"),
        ([(0, 2), (1, 4)], "1-4.qzo begins with step 1, step 2 was expected"),
        ([(2, 4), (0, 2)], "0-2.qzo begins with step 0, step 4 was expected"),
    ],
)
def test_pieces_in_another_order_are_refused(pieces, tmp_path, parts, said):
    with pytest.raises(JournalError, match=said):
        concat([pieces[bounds] for bounds in parts], tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_another_journal_is_refused_by_field(pieces, tmp_path):
    other = next(path for path in GOLDEN if path != WHOLE)
    with pytest.raises(JournalError, match=r"its clip is inf, that of .*0-2.qzo is 5.0: pieces of one journal agree"):
        concat([pieces[0, 2], other], tmp_path / "j")


@pytest.mark.parametrize(("start", "until"), [(0, 5), (3, 2), (-1, 2), (5, None), (None, -1)])
def test_steps_that_there_are_not(tmp_path, start, until):
    with pytest.raises(ValueError, match=r"v1-ih4.qzo has the steps from 0 up to 4, not those from"):
        cut(WHOLE, tmp_path / "j", start, until)
    assert not (tmp_path / "j").exists()


def test_no_journal_is_overwritten(tmp_path):
    (tmp_path / "j").write_text("mine")
    for write in (lambda: cut(WHOLE, tmp_path / "j", None, None), lambda: concat([WHOLE], tmp_path / "j")):
        with pytest.raises(JournalError, match="j exists already, and a journal is never overwritten"):
            write()
    assert (tmp_path / "j").read_text() == "mine"


def test_the_steps_before_damage_are_kept(pieces, tmp_path):
    damaged = bytearray(WHOLE.read_bytes())
    damaged[-STEP - 5] ^= 1  # in step 2
    (tmp_path / "d").write_bytes(damaged)
    for until in (None, 3):
        with pytest.raises(JournalError, match=r"qzo journal cut .*d --until 2 keeps the steps before"):
            cut(tmp_path / "d", tmp_path / "j", None, until)
    with pytest.raises(JournalError, match="d is damaged"):
        concat([tmp_path / "d"], tmp_path / "j")
    assert cut(tmp_path / "d", tmp_path / "j", None, 2) == 2
    assert (tmp_path / "j").read_bytes() == pieces[0, 2].read_bytes()


def test_a_tail_is_left_behind(pieces, tmp_path):
    (tmp_path / "t").write_bytes(WHOLE.read_bytes() + b"abc")
    assert cut(tmp_path / "t", tmp_path / "j", None, None) == 4
    assert (tmp_path / "j").read_bytes() == WHOLE.read_bytes()


def test_what_two_headers_differ_in():
    both = [contents(path) for path in GOLDEN]
    found = header_differences(*both)
    assert found["directions"] == (1, 2)
    assert found["recipe.batch_size"] == (None, 4)
    assert not {"digest", "arena.0", "versions.torch"} & found.keys(), "these are alike"
    assert header_differences(both[0], both[0]) == {}


def test_how_many_steps_are_alike(pieces, tmp_path):
    whole = contents(WHOLE)  # a NaN among its losses is like itself
    assert [alike(whole, contents(pieces[0, until])) for until in range(5)] == [0, 1, 2, 3, 4]
    assert alike(whole, contents(GOLDEN[0])) == 0


def test_there_has_to_be_a_journal(tmp_path):
    (tmp_path / "cut").write_bytes(WHOLE.read_bytes()[:40])
    for name, said in {"none": "there is no journal", "": "is a folder", "cut": "cut has no whole header"}.items():
        with pytest.raises((JournalError, FileNotFoundError), match=said):
            contents(tmp_path / name)
