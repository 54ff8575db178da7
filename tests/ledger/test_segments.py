"""Segments: the files of a spool that processes share: whose one is, who may take it over, and in which order."""

import pytest

from cconv import ledger
from cconv.ledger import spool


@pytest.mark.parametrize("moment", ["before it is locked", "and holds it"])
def test_a_segment_that_another_process_takes_before_it_is_locked_is_given_up(folder, event, monkeypatch, moment):
    """Whoever sees a new file without a lock may think that its maker is dead."""
    folder.mkdir()
    mine, other = spool.Spool(folder, 1 << 20), spool.Spool(folder, 1 << 20)
    open_, others = spool.os.open, []

    def open_and_lose(path, flags, mode=0o777):
        fd = open_(path, flags, mode)
        if flags & spool.os.O_EXCL and not others:
            others.append(path)
            other.adopt()
            if moment == "before it is locked":
                assert list(other.groups(1)) == []
                assert not path.exists(), "it was empty, and is deleted"
        return fd

    monkeypatch.setattr(spool.os, "open", open_and_lose)
    sent = [event() for _ in range(3)]
    for one in sent:
        mine.append(one)
    assert others
    mine.close()  # as a kill would
    other.close()
    monkeypatch.undo()
    heir = spool.Spool(folder, 1 << 20)
    heir.adopt()
    assert [e for group in heir.groups(10) for e in group] == sent
    heir.close()


def test_a_folder_that_cannot_be_locked_is_a_refusal_and_leaks_nothing(folder, event, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(spool.fcntl, "flock", flock)
    closed = []
    close = spool.os.close
    monkeypatch.setattr(spool.os, "close", lambda fd: (closed.append(fd), close(fd)))
    with pytest.raises(ledger.LedgerUnavailable, match="No locks available"):
        spool.Spool(folder, 1 << 20).append(event())
    assert len(closed) == 1


def test_adopted_segments_come_from_the_oldest_on(folder, event):
    folder.mkdir()
    for n in range(4):
        (folder / f"{n}.events").write_bytes(event(id=f"e{n}").line())
    heir = spool.Spool(folder, 1 << 20)
    heir.append(event(id="mine"))
    heir.adopt()
    assert [e.id for group in heir.groups(10) for e in group] == ["e0", "e1", "e2", "e3", "mine"]
    heir.close()
