"""The page as people see it: in Debian's chromium."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert.config.yaml_text import format_document
from megatron_bert.report.curves import AXES
from megatron_bert.report.page import write_page
from megatron_bert.report.records import RunRecords
from tests.debian_packages import need_programs
from tests.report.browser import Browser, start_browser
from tests.report.made_runs import make_run

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.browser

WIDTHS = (390, 1280)
NAMES = ("one", "other", "a run with quite a long name")
# What of the page is drawn at all: a hidden element has no box.
DRAWN = """[...document.querySelectorAll("svg.chart.by-AXIS .line")]
    .filter((line) => line.getBoundingClientRect().width > 1).length"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    need_programs(["chromium"], ["chromium"])
    with start_browser("chromium", tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    parallel = {"pipeline": 4, "pipeline_schedule": "zero_bubble", "virtual_stages": 2}
    settings = {"parallel": parallel, "data": {"tokenizer": "/" + "a-long-folder/" * 20}}
    runs = [
        RunRecords.read(
            make_run(
                folder / name,
                700,
                seed=seed,
                texts=("wiki", "law"),
                skipped=(200, 201),
                settings={**settings, "run": {"seed": seed}},
            )
        )
        for seed, name in enumerate(NAMES)
    ]
    write_page(runs, folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_without_complaints_asks_for_nothing_and_fits(
    browser: Browser, page: Path, width: int
) -> None:
    browser.open(page, width)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    # Fewer than a dozen charts with curves of each run would be a part of what there is.
    assert browser.value(DRAWN.replace("AXIS", "step")) >= 12 * len(NAMES)


def test_two_runs_stand_side_by_side_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    model = {"max_position_embeddings": 512}
    runs = [
        RunRecords.read(
            make_run(tmp_path / name, 20, settings={"model": {**model, "num_layers": layers}})
        )
        for layers, name in enumerate(("one", "/".join(["a-long-folder"] * 9) + "/other"))
    ]
    model["max_position_embeddings"] = 2048
    (tmp_path / "one" / "config.yaml").write_text(format_document({"model": model}))
    write_page(runs, tmp_path / "page.html")
    browser.open(tmp_path / "page.html", 400)
    tables = "[...document.querySelectorAll('table')]"
    assert browser.value(f"{tables}.length") == 4
    assert (
        browser.value(f"{tables}.filter((t) => t.getBoundingClientRect().right > 400).length") == 0
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_shows_curves_of_all_runs_in_their_colours(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[feature])
    browser.open(page, width)
    browser.value('document.querySelector("figure").scrollIntoView()')
    picture = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    assert picture.width == width
    counts = {colour: count for count, colour in picture.getcolors(maxcolors=1 << 24)}
    background = max(counts, key=counts.__getitem__)
    assert (sum(background) > 600) == (scheme == "light")
    for number in range(len(NAMES)):
        colour = browser.value(
            f'getComputedStyle(document.querySelector(".line.r{number}")).stroke'
        )
        shade = tuple(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))
        # Thin lines are mixed with what lies under their edges.
        near = sum(
            count
            for seen, count in counts.items()
            if max(abs(a - b) for a, b in zip(seen, shade, strict=True)) < 40
        )
        assert near > 20, (NAMES[number], shade)
    browser.call("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_the_switch_changes_the_axis_of_all_charts(
    browser: Browser, page: Path, scripts: bool
) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=not scripts)
    browser.open(page, 1280)
    for axis in reversed(AXES):
        click(browser, f"label[for=by-{axis}]")
        for other in AXES:
            drawn = browser.value(DRAWN.replace("AXIS", other))
            assert (drawn > 0) == (other == axis)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_pointing_at_a_chart_tells_the_values_there(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    x, y = place(browser, "svg.chart")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    position, *values = browser.value('document.querySelector(".readout").textContent').split(" · ")
    word, step = position.split()
    assert word == "step"
    losses = {name: RunRecords.read(page.parent / name).columns["loss"] for name in NAMES}
    training = [value.rsplit(" ", 1) for value in values if "training" in value]
    assert [name for name, _ in training] == [f"{name} training" for name in NAMES]
    for (_, value), loss in zip(training, losses.values(), strict=True):
        assert float(value) == pytest.approx(loss[int(step) - 5 : int(step) + 5].mean(), abs=0.1)


def test_printed_it_has_plots_and_no_switch(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.open(page, 794)
    assert browser.value('getComputedStyle(document.querySelector(".switch")).display') == "none"
    assert browser.value(DRAWN.replace("AXIS", "step")) >= 12 * len(NAMES)
    assert browser.value("document.scrollingElement.scrollWidth") <= 794
    browser.call("Emulation.setEmulatedMedia", media="")
    assert browser.pdf().startswith(b"%PDF")


def place(browser: Browser, selector: str) -> tuple[float, float]:
    """The middle of an element, scrolled into sight."""
    found = f"document.querySelector({selector!r})"
    browser.value(f"{found}.scrollIntoView({{block: 'center'}})")
    box = browser.value(f"{found}.getBoundingClientRect().toJSON()")
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def click(browser: Browser, selector: str) -> None:
    x, y = place(browser, selector)
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
