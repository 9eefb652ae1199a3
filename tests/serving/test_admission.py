"""Back-pressure: who waits, who is turned away, and that the service stays itself under a crowd."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from imaging.files import dicom
from neuroloop.bootstrap import Services
from neuroloop.core.errors import Unavailable
from neuroloop.serving.admission import (
    BURST,
    CALM_SECONDS,
    COMING_SECONDS,
    COMING_WHILE_IDLE_SECONDS,
    CROWD,
    Door,
    Places,
)
from serving.running import BEARER, encoded, head, serving


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def start(places: Places, work, count: int, **how) -> list[asyncio.Task]:
    return [asyncio.ensure_future(places.run(work, number, seconds=30, **how)) for number in range(count)]


def test_a_burst_waits_and_all_of_it_is_answered_in_its_order():
    async def play() -> list[int]:
        places, order, gate = Places(1, "test"), [], threading.Event()
        tasks = start(places, lambda n: (gate.wait(20), order.append(n)), 1 + BURST)
        await settled()
        assert places.full()
        gate.set()
        await asyncio.gather(*tasks)
        places.close()
        return order

    assert asyncio.run(play()) == list(range(1 + BURST))


def test_one_too_many_is_turned_away_at_once_and_the_latest_of_those_who_wait_with_it():
    async def play() -> tuple[list, list]:
        places, gate = Places(1, "test"), threading.Event()
        tasks = start(places, lambda n: gate.wait(20) and n, 1 + BURST)
        await settled()
        with pytest.raises(Unavailable, match="busy"):
            await places.run(len, "", seconds=30)
        await settled()
        done = [task for task in tasks if task.done()]
        gate.set()
        said = await asyncio.gather(*tasks, return_exceptions=True)
        places.close()
        return [tasks.index(task) for task in done], said

    sent_off, said = asyncio.run(play())
    assert sent_off == list(range(1 + CROWD, 1 + BURST))
    assert said[: 1 + CROWD] == list(range(1 + CROWD))
    assert all(isinstance(each, Unavailable) for each in said[1 + CROWD :])


def test_who_was_let_in_counts_until_it_is_worked_on_or_takes_too_long_to_come():
    async def play() -> None:
        clock, gate = Clock(), threading.Event()
        places = Places(1, "test", clock)
        places.turned_away()
        with places.coming():
            assert not places.full()
            with places.coming():
                assert places.full()  # one for the thread, one to wait
            assert not places.full()
            tasks = start(places, lambda n: gate.wait(20), 1)
            await settled()
            assert not places.full()  # it is worked on, and counts no more as coming
            with places.coming():
                clock.now += COMING_WHILE_IDLE_SECONDS
                assert places.full()
                clock.now += COMING_SECONDS
                assert not places.full()  # sends too slowly to keep others out
        gate.set()
        await asyncio.gather(*tasks)
        places.close()

    asyncio.run(play())


def test_while_a_thread_has_nothing_to_do_slow_senders_keep_nobody_out():
    clock = Clock()
    places = Places(1, "test", clock)
    places.turned_away()
    with places.coming(), places.coming():
        assert places.full()
        clock.now += COMING_WHILE_IDLE_SECONDS
        assert not places.full()
    places.close()


def test_who_has_come_is_not_turned_away_for_those_who_came_later():
    async def play() -> list:
        clock, gate = Clock(), threading.Event()
        places = Places(1, "test", clock)
        places.turned_away()

        async def come(number: int, arrived: asyncio.Event) -> int:
            with places.coming():
                await arrived.wait()
                return await places.run(lambda: gate.wait(20) and number, seconds=30)

        arrivals = [asyncio.Event() for _ in range(5)]
        tasks = [asyncio.ensure_future(come(*each)) for each in enumerate(arrivals)]
        await settled()
        for arrived in arrivals[:3]:  # one works, one waits, one is too many; two are still to come
            arrived.set()
            await settled()
        turned_away = [task.done() for task in tasks]
        gate.set()
        for arrived in arrivals[3:]:
            await asyncio.wait([task for task in tasks[:2] if not task.done()] or tasks[:1])
            arrived.set()
        said = await asyncio.gather(*tasks, return_exceptions=True)
        places.close()
        assert turned_away == [False, False, True, False, False]
        return said

    said = asyncio.run(play())
    assert said[:2] == [0, 1]
    assert isinstance(said[2], Unavailable)


def test_nobody_counts_as_coming_any_more_whatever_became_of_the_request():
    async def answered(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 401})

    async def broken(scope, receive, send) -> None:
        raise ConnectionError

    async def silent(scope, receive, send) -> None:
        await asyncio.sleep(60)

    async def play() -> None:
        places = Places(1, "test", Clock())
        places.turned_away()
        scope = {"type": "http", "method": "POST", "path": "/v1/predictions", "headers": []}

        async def send(message) -> None: ...

        for app in (answered, broken, silent):
            door = Door(app, places, frozenset({scope["path"]}))
            tasks = [asyncio.ensure_future(door(dict(scope), None, send)) for _ in range(1 + CROWD)]
            await settled()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not places.full()
        places.close()

    asyncio.run(play())


def test_strangers_pass_the_door_without_counting_and_send_nobody_off():
    async def play() -> tuple[list, int]:
        places, gate, inside = Places(1, "test", Clock()), threading.Event(), []
        waiting = start(places, lambda n: gate.wait(20) and n, 1 + BURST)
        await settled()
        assert places.full()

        async def application(scope, receive, send) -> None:
            inside.append(scope)

        door = Door(application, places, frozenset({"/v1/predictions"}), expected=lambda _: False)
        scope = {"type": "http", "method": "POST", "path": "/v1/predictions", "headers": []}
        for _ in range(100):
            await door(dict(scope), None, None)
        gate.set()
        answered = await asyncio.gather(*waiting)
        places.close()
        return answered, len(inside)

    assert asyncio.run(play()) == (list(range(1 + BURST)), 100)


def test_only_few_wait_until_nobody_was_turned_away_for_a_while():
    async def play() -> None:
        clock, gate = Clock(), threading.Event()
        places = Places(1, "test", clock)
        places.turned_away()
        tasks = start(places, lambda n: gate.wait(20), 1 + CROWD)
        await settled()
        assert places.full()
        clock.now += CALM_SECONDS
        assert not places.full()
        gate.set()
        await asyncio.gather(*tasks)
        places.close()

    asyncio.run(play())


def test_fewer_are_worked_on_at_once_while_others_are_turned_away_and_all_again_afterwards():
    async def play() -> list[int]:
        clock, gate, running = Clock(), threading.Semaphore(0), []
        places = Places(4, "test", clock, in_a_crowd=2)
        places.turned_away()
        tasks = start(places, lambda n: (running.append(n), gate.acquire(timeout=20)), 3, patient=True)
        await asyncio.sleep(0.2)
        seen = [len(running)]
        clock.now += CALM_SECONDS
        tasks += start(places, lambda n: (running.append(n), gate.acquire(timeout=20)), 2, patient=True)
        gate.release()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while len(running) < 5:
            await asyncio.sleep(0.01)
        seen.append(len(running))
        gate.release(10)
        await asyncio.gather(*tasks)
        places.close()
        return seen

    assert asyncio.run(play()) == [2, 5]  # one of the five has ended, four are at work


def test_the_parts_of_a_request_that_was_let_in_are_not_sent_off():
    async def play() -> list:
        places, gate = Places(1, "test"), threading.Event()
        tasks = start(places, lambda n: gate.wait(20) and n, 1 + BURST, patient=True)
        await settled()
        places.turned_away()
        tasks += start(places, lambda n: gate.wait(20) and n, 1, patient=True)
        gate.set()
        said = await asyncio.gather(*tasks)
        places.close()
        return said

    assert asyncio.run(play()) == [*range(1 + BURST), 0]


def test_after_a_crowd_batches_turn_no_single_upload_away():
    async def play() -> list[int]:
        places, gate = Places(1, "test", Clock()), threading.Event()
        places.turned_away()
        parts = start(places, lambda n: gate.wait(20), 3 * 2, patient=True)
        await settled()
        assert not places.full()
        single = start(places, lambda n: gate.wait(20) and 7, 1)
        await settled()
        assert places.full()  # in a crowd but one may wait
        gate.set()
        said = await asyncio.gather(*single)
        await asyncio.gather(*parts)
        places.close()
        return said

    assert asyncio.run(play()) == [7]


def test_single_uploads_and_the_parts_of_batches_take_turns():
    async def play() -> list[str]:
        places, order, gate = Places(1, "test", Clock()), [], threading.Event()
        tasks = start(places, lambda n: (gate.wait(20), order.append("part")), 1 + 4, patient=True)
        await settled()
        tasks += start(places, lambda n: order.append("single"), 3)
        await settled()
        gate.set()
        await asyncio.gather(*tasks)
        places.close()
        return order

    assert asyncio.run(play()) == ["part", "part", "single", "part", "single", "part", "single", "part"]


def test_batches_beyond_a_burst_of_parts_are_turned_away_at_the_door():
    async def application(scope, receive, send) -> None:
        inside.append(scope["path"])

    async def send(message) -> None:
        said.append(message.get("status"))

    inside, said = [], []

    async def play() -> None:
        places, gate = Places(1, "test", Clock()), threading.Event()
        parts = start(places, lambda n: gate.wait(20), 1 + BURST, patient=True)
        await settled()
        door = Door(application, places, frozenset({"/one", "/batch"}), patient=frozenset({"/batch"}))
        for path in ("/one", "/batch"):
            await door({"type": "http", "method": "POST", "path": path, "headers": []}, None, send)
        gate.set()
        await asyncio.gather(*parts)
        places.close()

    asyncio.run(play())
    assert (inside, said[0]) == (["/one"], 503)


def test_a_place_is_free_when_the_work_has_ended_not_when_somebody_stops_waiting():
    async def play() -> None:
        places, gate, ran = Places(1, "test"), threading.Event(), threading.Event()
        with pytest.raises(Unavailable, match="too long"):
            await places.run(gate.wait, 20, seconds=0.05)
        with pytest.raises(Unavailable, match="too long"):
            await places.run(ran.set, seconds=0.05)
        assert not ran.is_set()  # it gave up while it waited, so it is never begun
        gate.set()
        await places.run(ran.set, seconds=20)
        assert ran.is_set()
        places.close()

    asyncio.run(play())


def test_who_leaves_while_waiting_takes_no_place_with_them():
    async def play() -> int:
        places, gate = Places(1, "test"), threading.Event()
        first = start(places, lambda n: gate.wait(20), 1)
        leaving = start(places, lambda n: n, 5)
        await settled()
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        gate.set()
        await asyncio.gather(*first)
        found = await places.run(lambda: 7, seconds=20)
        places.close()
        return found

    assert asyncio.run(play()) == 7


def test_an_error_of_the_work_frees_its_place():
    async def play() -> None:
        places = Places(1, "test")
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await places.run(lambda: 1 / 0, seconds=20)
        places.close()

    asyncio.run(play())


def test_a_crowd_gets_answers_or_503_and_the_probes_answer_all_the_while(services: Services, champion: str):
    data = encoded(head("glioma"))
    with serving(services) as api, httpx.Client(base_url=f"http://127.0.0.1:{api.port}", timeout=60) as client:
        ended = threading.Event()

        def crowd(_: int) -> list[httpx.Response]:
            with httpx.Client(base_url=f"http://127.0.0.1:{api.port}", timeout=60, headers=BEARER) as one:
                said = []
                for _ in range(3):
                    said.append(one.post("/v1/predictions", files={"file": ("a.png", data)}))
                    if said[-1].status_code == 503:
                        time.sleep(0.5)  # as one does who was told to come back later
                return said

        def probe() -> list[int]:
            said = []
            while not ended.is_set():
                said += [client.get(f"/health/{name}").status_code for name in ("live", "ready")]
                time.sleep(0.05)
            return said

        with ThreadPoolExecutor(3 * BURST + 1) as pool:
            probed = pool.submit(probe)
            answers = [answer for some in pool.map(crowd, range(3 * BURST)) for answer in some]
            ended.set()
            assert set(probed.result()) == {200}
        given = [answer for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code != 201]
        assert {answer.status_code for answer in refused} == {503}
        assert len(given) > BURST // 2  # on a slow machine some of the burst are given up for their time limit
        for answer in refused:
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.headers["X-Request-Id"]
        assert len({answer.json()["id"] for answer in given}) == len(given)
        rows = services.log.known([answer.json()["id"] for answer in given])
        assert len(rows) == len(given)
        assert {row.object_key for row in rows.values()} <= set(api.stored())
        assert api.client.post("/v1/predictions", files={"file": ("a.png", data)}).status_code == 201


def decoding_workers() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread or child that has ended meanwhile
            for child in (task / "children").read_text().split():
                if b"decode_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
    return found


def test_files_that_take_long_to_read_keep_no_thread_from_plain_ones(services: Services, champion: str, monkeypatch):
    monkeypatch.setattr("neuroloop.serving.decoding._BEGIN_SECONDS", 20.0)
    others = decoding_workers()
    with serving(services) as api, ThreadPoolExecutor(8) as pool:
        scan = head("glioma")
        assert api.upload(dicom(scan)).status_code == 201
        (worker,) = decoding_workers() - others
        os.kill(worker, signal.SIGSTOP)
        try:
            slow = [pool.submit(api.upload, dicom(scan)) for _ in range(8)]
            assert api.predict(scan).status_code == 201
            assert api.predict(scan).status_code == 201
            assert not any(each.done() for each in slow)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert {each.result().status_code for each in slow} <= {201, 503}
        assert api.upload(dicom(scan)).status_code == 201
