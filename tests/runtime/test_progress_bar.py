from types import SimpleNamespace

import pytest

from muse_fast.runtime.progress_bar import ProgressBar, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress bars see, to be moved on."""
    now = [1000.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("scoring") as bar:
        for done in range(1, 26):  # three seconds each
            clock[0] += 3
            bar.show(done, 100, "images", "[not markup]")
    lines = [line for line in capsys.readouterr().out.split("\n") if line]
    assert lines[0] == "scoring images 4/100, ETA 0:04:48  [not markup]"
    assert [line.split(",")[0] for line in lines] == [f"scoring images {done}/100" for done in (4, 8, 12, 16, 20, 24)]


def test_the_steps_before_a_resumed_run_do_not_shorten_the_eta(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(seconds_between_lines=0) as bar:
        for step in (910, 920):
            clock[0] += 50
            bar.show(step, 1000, "step")
    assert capsys.readouterr().out.split("\n")[:2] == ["step 910/1000", "step 920/1000, ETA 0:06:40"]


def test_a_unit_that_is_counted_twice_starts_again(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(seconds_between_lines=0) as bar:
        for done in (1, 2, 1, 2):
            clock[0] += 20 if done == 2 else 5
            bar.show(done, 4, "epochs")
    lines = capsys.readouterr().out.split("\n")[:4]
    assert lines == ["epochs 1/4", "epochs 2/4, ETA 0:00:40", "epochs 1/4", "epochs 2/4, ETA 0:00:40"]


def test_tracked_items_pass_and_are_counted(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    items = [SimpleNamespace(slide=name) for name in "abc"]
    passed = []
    for item in track(items, None, "ROIs"):
        passed.append(item)
        clock[0] += 10
    assert passed == items
    assert capsys.readouterr().out.split("\n")[:3] == ["ROIs 1  a", "ROIs 2  b", "ROIs 3  c"]


def test_a_terminal_shows_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with ProgressBar("vit_small") as bar:
        bar.show(3, 7, "tiles", "[a] slide")
        bar.show(1, 2, "epochs")
    out = capsys.readouterr().out
    assert "vit_small tiles" in out and "3/7" in out and "[a] slide" in out
    assert "vit_small epochs" in out and "1/2" in out
