"""What makes way for a change, and a command that waits for its input: real tasks, threads and processes."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import psutil
import pytest

from steering.errors import CommandFailed
from steering.run import SpareCommand
from steering.rush import GaveWay, Rush


async def test_work_is_broken_off_for_a_change_and_not_begun_during_one() -> None:
    rush = Rush()
    ended: list[str] = []

    async def work() -> str:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("work")
        return "done"

    async def keep() -> None:
        with pytest.raises(GaveWay):
            await rush.give_way(work)
        ended.append("gave way")

    task = asyncio.create_task(keep())
    await asyncio.sleep(0.01)
    with rush.claim():
        await task
        assert ended == ["work", "gave way"]
        with pytest.raises(GaveWay):
            await rush.give_way(work)
        assert ended == ["work", "gave way"], "it was not begun"
    assert not rush.is_claimed


async def test_what_nobody_disturbs_returns_and_what_it_raises_is_raised() -> None:
    rush = Rush()

    async def fail() -> None:
        raise ValueError("its own")

    async def succeed() -> int:
        return 7

    assert await rush.give_way(succeed) == 7
    with pytest.raises(ValueError, match="its own"):
        await rush.give_way(fail)


async def test_who_is_cancelled_is_cancelled_and_its_work_too() -> None:
    rush = Rush()
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    task = asyncio.create_task(rush.give_way(work))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(ended.wait(), 1)


async def test_tasks_and_threads_wait_until_the_last_claim_ends() -> None:
    rush = Rush()
    passed: list[str] = []

    async def follow() -> None:
        await rush.wait_free_async()
        passed.append("task")

    def work() -> None:
        rush.wait_free()
        passed.append("thread")

    with rush.claim():
        thread = threading.Thread(target=work)
        thread.start()
        task = asyncio.create_task(follow())
        with rush.claim():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)
        assert passed == []
    await asyncio.wait_for(task, 1)
    await asyncio.to_thread(thread.join, 1)
    assert sorted(passed) == ["task", "thread"]
    await rush.wait_free_async()


async def wait_spare(command: SpareCommand) -> int:
    until = time.monotonic() + 2
    while command._spare is None or command._spare.returncode is not None:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    return command._spare.pid


async def test_a_spare_command_is_begun_before_it_is_asked_and_anew_after() -> None:
    command = SpareCommand(["sh", "-c", "echo $$; exec cat"])
    await command.begin()
    try:
        first = await wait_spare(command)
        assert (await command.run("one")).stdout == f"{first}\none"
        second = await wait_spare(command)
        assert second != first
        one, other = await asyncio.gather(command.run("two"), command.run("three"))
        assert one.stdout == f"{second}\ntwo"
        assert other.stdout.endswith("\nthree"), "without one that waits it is one of its own"
        third = await wait_spare(command)
        ended = command._spare
        psutil.Process(third).kill()
        assert ended is not None
        await ended.wait()
        assert (await command.run("four")).stdout.endswith("\nfour"), "one that died is not asked"
    finally:
        await command.close()
    assert command._spare is None
    assert not psutil.pid_exists(third) or psutil.Process(third).status() == "zombie"


async def test_a_spare_command_that_fails_or_hangs_is_told() -> None:
    failing = SpareCommand([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit('no')"])
    hanging = SpareCommand(["sleep", "30"], timeout=0.2)
    try:
        for command, said in ((failing, "exited with 1: no"), (hanging, "timed out")):
            await command.begin()
            with pytest.raises(CommandFailed, match=said):
                await command.run("x")
    finally:
        await failing.close()
        await hanging.close()
