from llamero.core import progress


class Recorder:
    def __init__(self):
        self.seen: list[object] = []

    def start(self, name: str, *, total: int | None, unit: str, done: int) -> int:
        self.seen.append((name, total, unit, done))
        return 7

    def advance(self, line: int, amount: int, note: str) -> None:
        self.seen.append((line, amount, note))

    def stop(self, line: int) -> None:
        self.seen.append((line, "stopped"))


def test_a_loop_is_a_plain_iterator_until_a_bar_is_installed():
    assert list(progress.track([1, 2], "count")) == [1, 2]
    bar = Recorder()
    progress.install(bar)
    try:
        assert list(progress.track([1, 2], "count", unit="rows")) == [1, 2]
    finally:
        progress.install(None)
    assert bar.seen == [("count", 2, "rows", 0), (7, 1, ""), (7, 1, ""), (7, "stopped")]
    list(progress.track([1], "silent again"))
    assert len(bar.seen) == 4
