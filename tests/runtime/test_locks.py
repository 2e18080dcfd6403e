"""Locks between processes, of this machine and of others."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sfv_jax.runtime import locks
from sfv_jax.runtime.locks import Lock, LockError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "lock.json"


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", 0.4)
    monkeypatch.setattr(locks, "SIGN", 0.05)


def elsewhere(**changes) -> dict:
    """Returns an owner on another machine."""
    owner = {"process": 123, "host": "node7", "place": "another", "started": "", "since": "yesterday", "token": "t"}
    return owner | changes


def test_one_owner_at_a_time(path):
    with Lock(path, "runs/a") as lock:
        owner = json.loads(path.read_text())
        assert owner["process"] == os.getpid() and owner["host"] and owner["since"]
        with (
            pytest.raises(LockError, match=f"runs/a is in use by process {os.getpid()} on .* since 20"),
            Lock(path, "runs/a"),
        ):
            pass
        lock.check()
    assert list(path.parent.iterdir()) == []
    with Lock(path, "runs/a"):
        pass


def test_the_lock_of_a_process_that_is_gone_is_taken_over_at_once(path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for started, number in (("", process.pid), ("1", os.getpid())):  # gone; its number is that of a later process
        path.write_text(json.dumps(elsewhere(process=number, place=locks.place(), started=started)))
        began = time.monotonic()
        with Lock(path, "runs/a"):
            assert time.monotonic() - began < 1 and json.loads(path.read_text())["process"] == os.getpid()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_zombie_is_gone():
    process = subprocess.Popen([sys.executable, "-c", ""])
    while locks._state(process.pid)[0] != "Z":
        time.sleep(0.01)
    assert not locks.is_running(process.pid, "")
    process.wait()


@pytest.mark.parametrize("content", [json.dumps(elsewhere()), "", "[]", '{"process": "x"}', "\0\0"])
def test_a_silent_owner_on_another_machine_is_taken_over_after_a_while(path, hurried, capsys, content):
    path.write_text(content)
    began = time.monotonic()
    with Lock(path, "runs/a") as lock:
        assert time.monotonic() - began > 0.4
        lock.check()
    assert "runs/a: locked by" in capsys.readouterr().err and not list(path.parent.iterdir())


def test_an_owner_on_another_machine_that_gives_signs_is_left_alone(path, hurried, monkeypatch):
    with Lock(path, "runs/a"):
        time.sleep(0.15)
        monkeypatch.setattr(locks, "place", lambda: "another")
        with pytest.raises(LockError, match="runs/a is in use by process"), Lock(path, "runs/a"):
            pass
    assert not path.exists()


def test_who_was_taken_over_notices(path):
    with Lock(path, "runs/a") as lock:
        path.write_text(json.dumps(elsewhere()))
        with pytest.raises(LockError, match="taken over by process 123 on node7 since yesterday"):
            lock.check()
    assert json.loads(path.read_text()) == elsewhere()  # not removed: it is not ours


def test_a_deleted_lock_is_made_anew(path):
    with Lock(path, "runs/a") as lock:
        path.unlink()
        lock.check()
        assert json.loads(path.read_text())["token"] == lock.token


def test_without_hard_links(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(path, "runs/a"), pytest.raises(LockError, match="in use"), Lock(path, "runs/a"):
        pass
    assert not list(path.parent.iterdir())


def test_who_saw_an_abandoned_lock_long_ago_does_not_take_that_of_its_heir(path, monkeypatch):
    """Of two processes that look at the same moment, one waits while the other takes over."""
    path.write_text(json.dumps(elsewhere(process=2**22 + 5, place=locks.place())))
    heir, is_abandoned = Lock(path, "runs/a"), Lock._is_abandoned

    def wait(self, owner, sign):
        found = is_abandoned(self, owner, sign)
        monkeypatch.setattr(Lock, "_is_abandoned", is_abandoned)
        heir.__enter__()
        return found

    monkeypatch.setattr(Lock, "_is_abandoned", wait)
    with pytest.raises(LockError, match=f"runs/a is in use by process {os.getpid()}"), Lock(path, "runs/a"):
        pass
    heir.check()
    assert json.loads(path.read_text())["token"] == heir.token
    heir.__exit__()
    assert not list(path.parent.iterdir())


def test_who_is_silent_amid_a_takeover_does_not_take_the_lock_of_its_heir(path, hurried, monkeypatch):
    """Both on other machines: one looks, the other takes both locks over while that is silent, then that goes on."""
    path.write_text(json.dumps(elsewhere()))
    first, heir, replace = Lock(path, "runs/a"), Lock(path, "runs/a"), Path.replace
    monkeypatch.setattr(locks.Lock, "_give_signs", lambda self: None)
    monkeypatch.setattr(locks, "place", lambda: "mine")

    def wait(self, target):
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(locks, "place", lambda: "the heir's")
        heir.__enter__()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", wait)
    with pytest.raises(LockError, match=f"runs/a is in use by process {os.getpid()}"):
        first.__enter__()
    heir.check()
    heir.__exit__()
    assert not list(path.parent.iterdir())


def test_a_lock_that_was_replaced_at_once_is_not_its_makers(path, monkeypatch):
    """A takeover that was under way for long may replace the file until its own is removed."""
    clear = Lock._clear_remains

    def replaced(self):
        path.write_text(json.dumps(elsewhere(process=os.getpid(), place=locks.place())))
        clear(self)

    monkeypatch.setattr(Lock, "_clear_remains", replaced)
    with pytest.raises(LockError, match=f"in use by process {os.getpid()} on node7"), Lock(path, "runs/a"):
        pass
    assert json.loads(path.read_text())["host"] == "node7"


def test_without_hard_links_a_removed_file_leaves_no_lock_of_nobody(path, monkeypatch):
    calls = []

    def refuse(temporary, _):
        if not calls:
            temporary.unlink()  # as by an owner that clears what is left
        calls.append(path.exists())
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(path, "runs/a") as lock:
        assert calls == [False, False] and lock._is_mine()
    assert not list(path.parent.iterdir())


def test_all_that_is_left_of_takeovers_is_removed(path):
    for name in (".lock.json.a.tmp", ".lock.json.b.claim", "..lock.json.b.claim.c.claim", "..lock.json.b.claim.d.tmp"):
        (path.parent / name).touch()
    (path.parent / ".other.lock.json.a.tmp").touch()
    with Lock(path, "runs/a"):
        assert sorted(x.name for x in path.parent.iterdir()) == [".other.lock.json.a.tmp", "lock.json"]


CONTENDER = """
import os, sys, time
from pathlib import Path
from sfv_jax.runtime.locks import Lock, LockError
path, inside = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    said = "refused"
    try:
        with Lock(path, "a"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            time.sleep(0.002)
            inside.unlink()
            said = "won"
    except LockError:
        pass
    except FileExistsError:
        said = "TWO OWNERS"
    print(said, flush=True)
"""


def test_one_of_many_processes_wins(path):
    """Processes and an abandoned lock, again and again: never two owners at once, and nothing is left."""
    command = [sys.executable, "-c", CONTENDER, str(path), str(path.parent.parent / "inside")]
    options = dict(env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    contenders = [subprocess.Popen(command, **options) for _ in range(6)]
    try:
        assert {process.stdout.readline() for process in contenders} == {"ready\n"}
        for number in range(50):
            gone = elsewhere(process=2**22 + 5, place=locks.place(), token=f"{number}")
            path.write_text(json.dumps(gone))
            for process in contenders:
                print(file=process.stdin, flush=True)
            found = {process.stdout.readline() for process in contenders}
            assert found in ({"won\n"}, {"won\n", "refused\n"}) and not list(path.parent.iterdir())
    finally:
        for process in contenders:
            process.stdin.close()
            process.wait()


def test_a_takeover_that_was_killed_is_taken_over(path):
    gone = elsewhere(process=2**22 + 5, place=locks.place())
    path.write_text(json.dumps(gone))
    code = (
        f"import os\nfrom pathlib import Path\nfrom sfv_jax.runtime.locks import Lock\n"
        f"Path.replace = lambda *_: os._exit(7)\nLock(Path({str(path)!r}), 'a').__enter__()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 7 and len(list(path.parent.glob(".*.claim"))) == 1
    with Lock(path, "runs/a"):
        assert json.loads(path.read_text())["process"] == os.getpid()
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("_", range(20))
def test_one_of_many_wins(path, _):
    """Many threads and an abandoned lock: never two owners at once."""
    inside, won, most = [], [], []

    def contend():
        try:
            with Lock(path, "runs/a"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.02)
                inside.pop()
                won.append(1)
        except LockError:
            pass

    path.write_text(json.dumps(elsewhere(process=2**22 + 5, place=locks.place())))
    threads = [threading.Thread(target=contend) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won and max(most) == 1 and not list(path.parent.iterdir())


def test_a_killed_process_leaves_a_lock_that_does_not_hinder(path):
    code = (
        f"import sys\nfrom pathlib import Path\nfrom sfv_jax.runtime.locks import Lock\nLock(Path({str(path)!r}), 'a')"
    )
    code += ".__enter__()\nprint('locked', flush=True)\nsys.stdin.read()"
    command, env = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(LockError, match=f"a is in use by process {process.pid} on"), Lock(path, "a"):
            pass
        process.kill()
    with Lock(path, "a"):
        pass
