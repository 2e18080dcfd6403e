"""One job at a time, in order; cancelled, refused and failed ones."""

import threading

import pytest

from sfv_jax.errors import UserError
from sfv_jax.web.request import RequestError
from sfv_jax.web.turns import Job, Turns


class Told:
    """Events of a job."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if event["event"] in ("end", "error"):
            self.ended.set()

    def end(self) -> list:
        assert self.ended.wait(30)
        return self.events


@pytest.fixture
def turns():
    failed = []
    made = Turns(2, failed.append)
    made.failures = failed
    yield made
    made.close()


def test_jobs_run_one_after_another_and_know_their_place(turns):
    go, begun, order = threading.Event(), threading.Event(), []
    told = [Told() for _ in range(3)]

    def first(job):
        begun.set()
        assert go.wait(30)
        order.append(0)

    turns.add(Job(first, told[0]))
    assert begun.wait(30)
    for n in (1, 2):
        turns.add(Job(lambda job, n=n: order.append(n), told[n]))
    with pytest.raises(RequestError, match="2 videos are waiting already"):
        turns.add(Job(lambda job: None, Told()))
    go.set()
    for one in told:
        assert one.end()[-1] == {"event": "end"}
    assert order == [0, 1, 2]
    ahead = [[event["ahead"] for event in one.events if event["event"] == "waiting"] for one in told]
    assert ahead[0] == [0] and ahead[1][0] == 1 and ahead[2] == [2, 1]


def test_a_job_can_be_stopped_while_it_waits_and_while_it_runs(turns):
    begun, told = threading.Event(), [Told(), Told()]

    def forever(job):
        begun.set()
        while True:
            job.check()

    running, waiting = Job(forever, told[0]), Job(lambda job: pytest.fail("began"), told[1])
    turns.add(running)
    assert begun.wait(30)
    turns.add(waiting)
    for job, one in ((waiting, told[1]), (running, told[0])):
        turns.cancel(job)
        assert one.end()[-1] == {"event": "error", "message": "Stopped."}
        turns.cancel(job)
    last = Told()
    turns.add(Job(lambda job: None, last))
    assert last.end()[-1] == {"event": "end"} and turns.failures == []


def test_errors_are_sentences_and_bugs_are_logged(turns):
    def wrong(job):
        raise UserError("too\nwide")

    def bug(job):
        raise KeyError("secret")

    told = [Told(), Told()]
    for work, one in zip((wrong, bug), told, strict=True):
        turns.add(Job(work, one))
    assert told[0].end()[-1] == {"event": "error", "message": "too wide."}
    assert told[1].end()[-1] == {"event": "error", "message": "An error of the program (KeyError); see its log."}
    turns.close()
    assert [type(error) for error in turns.failures] == [KeyError]
