"""The report as a browser shows it: what it says, what it asks for, and what it does when it is touched."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train.ranks.launcher import Launcher
from dist_train.tasks import panels
from dist_train.tasks.panels import Plot, Table
from dist_train.tools import report

from report_runs import (
    CLASSES,
    lines,
    make,
    measured,
    write_evaluation,
    write_lines,
    write_masks,
    write_predictions,
)
from zygote import Run, Zygote

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# "<!--<script>" would keep a browser from seeing the end of a script.
NASTY = "<!--<script> <img src=nope onerror=hacked()> & %{x} \"'"
Open = Callable[..., contextlib.AbstractContextManager]


@pytest.fixture(scope="module")
def browser():
    """A browser, started once."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        process = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield process
        process.close()


@pytest.fixture
def opened(browser) -> Open:
    """Opens a page, and at its end looks for errors and requests."""

    @contextlib.contextmanager
    def open_page(path: Path, **context) -> Iterator:
        with contextlib.closing(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)) as own:
            page, said, asked = own.new_page(), [], []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.as_uri())
            yield page
            # data: and blob: are in the page itself
            assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
            assert not said

    return open_page


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs, of which one has a nasty name, as have its classes and its data set."""
    place = tmp_path_factory.mktemp("report")
    runs = [make(place / "plain"), make(place / NASTY, loss=2.0, name=f"</script><script>hacked()</script>{NASTY}")]
    write(place / "page.html", *runs)
    return place / "page.html"


def write(path: Path, *runs: Path) -> Path:
    assert report.run([*map(str, runs), "-o", str(path)], Launcher()) == 0
    return path


def figure(key: str) -> str:
    return f"[data-panel='{key}'] .canvas"


def curve(page, key: str, number: int) -> dict:
    """A trace as the plot has it."""
    return page.eval_on_selector(figure(key), f"e => ({{...e.data[{number}], line: 0, marker: 0}})")


def layout(page, key: str, path: str):
    return page.eval_on_selector(figure(key), f"e => e.layout.{path}")


def row(page, key: str) -> list[str]:
    return [cell.inner_text() for cell in page.query_selector_all(f"#summary tr[data-row='{key}'] td b")]


def test_the_page_says_what_the_runs_recorded(opened: Open, two: Path):
    with opened(two) as page:
        assert row(page, "status") == ["finished", "finished"]
        assert row(page, "best_accuracy") == ["54.00%", "54.00%"] and row(page, "steps") == ["40", "40"]
        assert row(page, "eval_loss") == ["0.025", "0.05"]
        assert row(page, "samples_per_s") == ["1,200", "600"] and row(page, "restarts") == ["1", "1"]
        best = [e.inner_text() for e in page.query_selector_all("#summary tr[data-row='samples_per_s'] td.best b")]
        assert best == ["1,200"]
        counts = page.eval_on_selector_all(".canvas", "all => all.map(e => e.data.length)")
        # loss; accuracy, rate, norm, throughput; time line with its four kinds of events; heat maps
        assert counts == [4, 2, 2, 2, 2, 6, 1, 1, 1, 1]
        for number, loss in ((0, 1.0), (2, 2.0)):
            for trace, kind in ((number, "train/loss"), (number + 1, "eval/loss")):
                of_kind = [line for line in lines(loss=loss) if kind in line]
                drawn = curve(page, "loss", trace)
                assert drawn["x"] == [line["step"] for line in of_kind]
                assert drawn["y"] == [line[kind] for line in of_kind]
        assert len(page.query_selector_all(".gallery img")) == 12
        assert page.eval_on_selector_all(".gallery img", "all => all.every(e => e.naturalWidth === 8)")
        assert page.inner_text(".gallery figcaption").split("\n") == ["cat", "→ dog, 99%", "loss 9, #0"]
        z = curve(page, "ranks-plain", 0)["z"]
        assert [len(z), len(z[0]), z[1][0]] == [2, 40, 2.1]
        said = curve(page, "confusion-plain", 0)["customdata"]
        assert len(said) == len(CLASSES) and " of " in said[0][0]
        marks = page.eval_on_selector(figure("timeline"), "e => e.data.map(t => [t.name, (t.text || []).length])")
        assert marks[2:] == [["checkpoint", 8], ["start", 2], ["resume", 2], ["stop", 2]]
        resumed = page.eval_on_selector(figure("timeline"), "e => e.data[4].text[0]")
        assert "resume at step 20" in resumed and "2m 00s after the stop" in resumed
        differs = page.eval_on_selector_all("#config > .scroll tbody tr", "all => all.map(e => e.dataset.row)")
        assert differs == ["data.name", "optim.lr"]
        page.click("#config summary")
        assert page.query_selector("#config details tr[data-row='train.seed']").is_visible()
        assert "abc123" in page.inner_text("#environment")


def test_what_users_named_is_text(opened: Open, two: Path):
    with opened(two) as page:
        assert page.evaluate("window.hacked") is None
        assert not page.query_selector_all("main script, main img:not(.gallery img), svg a")
        assert page.inner_text("#run-1 h3").strip() == NASTY
        assert page.inner_text("tr[data-row='data.name'] td:last-child") == f"</script><script>hacked()</script>{NASTY}"
        ticks = page.eval_on_selector_all(f"{figure('timeline')} .ytick text", "all => all.map(e => e.textContent)")
        assert ticks == ["plain", f"{NASTY[:14]}…{NASTY[-13:]}"]
        names = page.eval_on_selector_all(
            f"{figure('confusion-plain')} .ytick text", "all => all.map(e => e.textContent)"
        )
        assert names == ["cat", "dog", "<script…cript>", "%{x} & …cript>"]
        assert CLASSES[2] in page.inner_text("[data-panel='recall-plain']")
        plot = page.query_selector(f"{figure('loss')} .nsewdrag")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        hover = page.wait_for_selector(f"{figure('loss')} .hoverlayer .legend")
        assert NASTY[:20] in hover.text_content()


def test_no_script_but_its_own_runs(browser, two: Path):
    with contextlib.closing(browser.new_page()) as page:
        page.goto(two.as_uri())
        blocked = page.evaluate(
            """new Promise(done => {
                addEventListener("securitypolicyviolation", event => done(event.effectiveDirective));
                setTimeout(() => done("not blocked"), 5000);
                const script = document.createElement("script");
                script.textContent = "window.hacked = 1";
                document.body.append(script);
            })"""
        )
        assert blocked == "script-src-elem" and page.evaluate("window.hacked") is None
        assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"


def test_the_buttons(opened: Open, two: Path):
    with opened(two) as page:
        page.click("[data-axis=time]")
        assert curve(page, "loss", 0)["x"] == [line["time_s"] for line in lines() if "train/loss" in line]
        assert "time" in layout(page, "loss", "xaxis.title.text")
        page.click("[data-axis=step]")
        page.click("[data-log=loss] [value=log]")
        assert [layout(page, key, "yaxis.type") for key in ("loss", "grad_norm")] == ["log", "linear"]
        page.eval_on_selector(figure("loss"), "e => Plotly.relayout(e, {'xaxis.range[0]': 5, 'xaxis.range[1]': 9})")
        page.wait_for_function("document.querySelector('[data-panel=lr] .canvas').layout.xaxis.range[1] === 9")
        page.click("[data-hide='0']")
        assert page.eval_on_selector(figure("loss"), "e => e.data.length") == 2
        assert page.inner_text("[data-hide='0']") == "show"
        page.click("[data-hide='0']")
        assert page.eval_on_selector(figure("loss"), "e => e.data.length") == 4


def test_dark_mode_is_followed(opened: Open, two: Path):
    seen = {}
    with opened(two, color_scheme="dark") as page:
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(
                "dark => (document.querySelector('.canvas').layout.legend.font.color === '#e7ebf0') === dark",
                arg=scheme == "dark",
            )
            seen[scheme] = [
                page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
            ]
            seen[scheme] += [page.eval_on_selector(".canvas", "e => e.data[0].line.color")]
    assert all(dark != light for dark, light in zip(seen["dark"], seen["light"], strict=True))


@pytest.mark.parametrize("classes", [CLASSES, tuple(f"a class with quite a long name {i}" for i in range(60))])
def test_a_phone_shows_it_without_scrolling_sideways(opened: Open, tmp_path: Path, classes: tuple[str, ...]):
    run = make(tmp_path / "a-run-with-a-name-that-is-longer-than-a-phone-is-wide-and-has-no-place-to-break")
    write_evaluation(run, classes, shape=(3, 40, 20))
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with opened(write(tmp_path / "page.html", run), **phone) as page:
        assert page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]") == [360, 360]
        wide = page.eval_on_selector_all(".canvas", "all => all.filter(e => e.clientWidth > 360 || !e.data).length")
        assert wide == 0 and page.eval_on_selector(".canvas", "e => e.layout.dragmode") is False


def test_spikes_and_gaps_are_seen_in_a_thinned_curve(opened: Open, tmp_path: Path):
    run = make(tmp_path / "long", finished=False)
    long = [line for line in lines(6000, ranks=1) if "train/loss" in line]
    long[1234]["train/loss"], long[2345]["train/loss"] = 77.0, float("nan")
    long[2350]["train/loss"] = float("inf")
    write_lines(run, long)
    with opened(write(tmp_path / "page.html", run)) as page:
        drawn = curve(page, "loss", 0)
        assert len(drawn["x"]) <= 2000 and max(y for y in drawn["y"] if y is not None) == 77.0
        assert f"{len(drawn['x']):,} of 6,000 points; each bucket keeps its extremes" in page.inner_text(
            "[data-panel=loss] .note"
        )
        assert set(curve(page, "loss", 1)["x"]) <= {2346, 2351} and curve(page, "loss", 1)["name"].endswith(
            "not finite"
        )
        assert row(page, "not_finite") == ["2"] and row(page, "status") == ["unfinished"]
        assert "mean of 16 lines" in page.inner_text("[data-panel=ranks] .note")


def cells(page, key: str) -> list[list[str]]:
    rows = f"[data-panel='{key}'] tbody tr"
    return page.eval_on_selector_all(rows, "all => all.map(r => [...r.cells].map(c => c.innerText))")


def test_a_regression_shows_predicted_against_true(opened: Open, tmp_path: Path):
    run, found = make(tmp_path / "run", finished=False), lines()
    measured(found, "eval/r2", ["loss"], [], r2=lambda step: step / 100, loss=lambda step: 1 / step)
    write_lines(run, found)
    write_predictions(run)
    with opened(write(tmp_path / "page.html", run)) as page:
        assert row(page, "best_r2") == ["0.4"]
        first = page.inner_text(".card.run .facts div:first-child").split("\n")
        assert first == ["Best r2", "0.4", "at step 40"]
        some, worst = (curve(page, "predicted", i) for i in (0, 1))
        assert len(some["x"]) == 48 and sorted(worst["customdata"]) == [1, 12, 21]
        assert worst["y"][worst["customdata"].index(1)] == -1
        low, high = layout(page, "predicted", "xaxis.range")
        assert layout(page, "predicted", "yaxis.range") == [low, high] and low < -2 and high > 4
        marks = page.eval_on_selector_all(f"{figure('predicted')} .points path", "all => all.length")
        assert marks == 51
        assert cells(page, "worst")[1] == ["#1", "9.25", "2", "-1"]
        assert "51 test samples; marked: the 3" in page.inner_text("[data-panel='predicted'] .note")


def test_a_segmentation_shows_its_worst_masks(opened: Open, tmp_path: Path):
    run = make(tmp_path / "run", finished=False)
    write_masks(run)
    colours = """all => all.map(e => { const c = document.createElement("canvas"); c.width = e.naturalWidth;
        c.height = e.naturalHeight; const p = c.getContext("2d"); p.drawImage(e, 0, 0);
        return [c.width, c.height, [...p.getImageData(1, 1, 1, 1).data].slice(0, 3).join()]; })"""
    with opened(write(tmp_path / "page.html", run)) as page:
        seen = page.eval_on_selector_all("[data-panel='masks'] img", colours)
        assert [one[:2] for one in seen] == [[6, 4]] * 3 + [[3, 5]] * 3
        # Pixel (1, 1) is of class 7 % 4 = 3, which the first predicts as well, and of 4 % 4 = 0, taken for 1.
        assert [one[2] for one in seen] == [
            "9,9,9", "180,82,143", "180,82,143", "9,9,9", "0,114,178", "232,112,42",
        ]  # fmt: skip
        legend = page.eval_on_selector_all("[data-panel='masks'] .legend li", "all => all.map(e => e.innerText)")
        assert legend == ["does not count", *CLASSES]
        assert page.inner_text("[data-panel='masks'] figcaption >> nth=1").split("\n") == [
            "#3", "loss 2.25, 0.00% of its pixels right",
        ]  # fmt: skip


def test_panels_of_the_users_own_are_drawn_and_none_of_them_runs(opened: Open, tmp_path: Path):
    run = make(tmp_path / "run", finished=False)
    figure_of_hers = {
        "data": [{"type": "bar", "x": [NASTY, "b"], "y": [1, 2], "name": NASTY}, {"type": "bar", "y": [3, None]}],
        "layout": {"title": {"text": "hers"}, "height": 250, "xaxis": {"title": {"text": NASTY}}},
    }
    table = Table(NASTY, [NASTY, "b"], [[NASTY, 0.12345], [None, True]], NASTY)
    panels.write(run, panels.encoded([table, Plot("Bars", figure_of_hers)]))
    with opened(write(tmp_path / "page.html", run), color_scheme="dark") as page:
        assert page.evaluate("window.hacked") is None and not page.query_selector_all("main script")
        assert page.inner_text("[data-panel='own-0'] h3") == NASTY
        assert cells(page, "own-0") == [[NASTY, "0.1235"], ["–", "yes"]]
        assert page.eval_on_selector_all(f"{figure('own-1')} .bars .point", "all => all.length") >= 3
        assert page.eval_on_selector(figure("own-1"), "e => e.clientHeight") == 250
        assert page.eval_on_selector_all(f"{figure('own-1')} .gtitle", "all => all.length") == 0
        assert layout(page, "own-1", "template.layout.paper_bgcolor") == "rgba(0,0,0,0)"


def test_a_real_run(opened: Open, zygote: Zygote, tmp_path: Path):
    argv = ["--run.dir", str(tmp_path / "run"), "--train.epochs", "2", "--track.every_steps", "5"]
    (ended,) = zygote.run(Run([*argv, "--data.name", "digits", "--train.threads", "1"]))
    ended.check()
    recorded = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert report.run([str(tmp_path / "run")], Launcher()) == 0
    with opened(tmp_path / "run/report.html") as page:
        drawn = curve(page, "loss", 0)
        assert drawn["y"] == [line["train/loss"] for line in recorded if "train/loss" in line]
        assert row(page, "accuracy") == [f"{summary['eval/accuracy']:.2%}"]
        assert summary["versions"]["torch"] in page.inner_text("#environment")
