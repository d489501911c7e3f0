"""The HTML page: self-contained, escaped, and alive in a real browser."""

import itertools
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_records import make_record, runs

from twist.compare.page import CURVE_POINTS, PageOptions, curve_groups, render_page, thin
from twist.compare.table import Table, build_table
from twist.contracts.errors import UserError
from twist.contracts.published import load_published
from twist.contracts.record import RunRecord, read_records, write_record

ROOT = Path(__file__).resolve().parent.parent

# One pixel, the smallest PNG there is.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489"
    "0000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def write_page(path: Path, table: Table, found: list[tuple[Path, RunRecord]], **options: Any) -> Path:
    path.write_text(render_page(table, found, folder=path.parent, options=PageOptions(**options)))
    return path


def make_results(root: Path) -> list[tuple[Path, RunRecord]]:
    levels = {"random": 0.0, "moco-v2": 6.0, "twist": 7.0}
    kinds = {
        "sample-coco-mrcnn-fpn": ("instance-segmentation", {"coco_box_ap_percent": 20.0, "coco_mask_ap_percent": 18.0}),
        "sample-voc-fcn-d8": ("segmentation", {"miou_percent": 40.0}),
        "sample-semi-1pct": ("classification", {"top1_percent": 30.0}),
        "sample-semi-10pct": ("classification", {"top1_percent": 50.0}),
        "knn": ("classification", {"knn_top1_percent": 60.0}),
    }
    for protocol, (task, metrics) in kinds.items():
        for method, gain in levels.items():
            # TWIST has no segmentation record: the cell must be absent, not zero.
            if (method, protocol) == ("twist", "sample-voc-fcn-d8"):
                continue
            for seed in range(3):
                record = make_record(
                    method,
                    protocol,
                    seed=seed,
                    task=task,
                    scale="full" if protocol == "knn" else "sample",
                    metrics={name: value + gain + 0.3 * seed for name, value in metrics.items()},
                    media=("media/boxes.png",) if "coco" in protocol else (),
                    curves="curve.jsonl",
                    notes=("<b>watch out</b>",),
                )
                folder = write_record(record, root).parent
                (folder / "media").mkdir(exist_ok=True)
                (folder / "media" / "boxes.png").write_bytes(PIXEL)
                lines = [json.dumps({"step": step, "loss": 1 / (1 + step)}) for step in range(20)]
                (folder / "curve.jsonl").write_text("\n".join(lines) + "\n")
    return read_records([root])


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "epoch": step // 100, "total": -step / 1000, "agreement": step / 1000, "lr": 0.1}
        | {"stage": "self_label" if step > 700 else "mutual_information"}
        for step in range(1000)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 1000, "tot')  # a run that is still writing
    (folder / "online_eval.jsonl").write_text('{"epoch": 1, "knn_top1_percent": 33.0}\n')
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    found = make_results(root / "results")
    table = build_table([record for _, record in found], published=load_published(), baseline="random")
    (root / "views.png").write_bytes(PIXEL)
    return write_page(
        root / "report.html",
        table,
        found,
        pretrain_runs=[make_run(root / "runs" / "sample")],
        title="TWIST & <others>",
        pictures=[("Views of <four> images", root / "views.png")],
    )


def embedded(page: Path) -> dict[str, Any]:
    text = page.read_text().split('<script type="application/json" id="data">')[1]
    values: dict[str, Any] = json.loads(text.split("</script>")[0])
    return values


def embedded_runs(page: Path) -> list[dict[str, Any]]:
    return [run for c in embedded(page)["cells"] if c["measured"] for run in c["measured"]["runs"]]


def html_of(table: Table, folder: Path) -> str:
    """The page of `table` to the end of its whole table, no space between tags."""
    text = re.sub(r'<div class="apart">.*?(?=<div class="copy")', "", render_page(table, [], folder=folder), flags=re.S)
    text = text.split("<script")[0]
    return re.sub(r">\s+<", "><", text)


def test_the_page_asks_for_nothing_from_outside_and_escapes_what_it_shows(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    targets = [target for name in ("src", "href") for target in re.findall(rf'\b{name}="([^"]*)"', text)]
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert "@import" not in text
    assert "url(" not in text
    assert "<title>TWIST &amp; &lt;others&gt;</title>" in text
    assert "Views of &lt;four&gt; images" in text
    assert "<b>watch out" not in text
    assert any("<b>watch out</b>" in run["notes"] for run in embedded_runs(page))
    assert str(page.parent) not in text
    assert all((page.parent / run["path"]).is_file() for run in embedded_runs(page))


def test_curves_are_thinned_and_keep_their_end(page: Path) -> None:
    run = embedded(page)["pretrain"][0]
    assert run["name"] == "sample"
    assert len(run["series"]["total"]) <= CURVE_POINTS + 1
    assert run["series"]["total"][-1] == [999, -0.999]
    assert run["stages"] == [[701, "self label"]]
    assert run["series"]["knn_top1_percent"] == [[199, 33.0]]


def test_a_row_draws_its_first_runs_where_their_losses_are_numbers(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "lr": 0.5, "loss": 9.0, "total_loss": 2.0},
        {"step": 1, "total_loss": float("nan")},
        {"step": 2, "total_loss": True},
        {"loss": 7.0, "total_loss": 7.0},
        {"step": 3, "total_loss": 1},
    ]
    found = []
    for seed in (4, 3, 2, 1, 0):
        record = make_record(seed=seed, curves=f"{seed}.jsonl")
        path = write_record(record, tmp_path)
        written = lines if seed else [{"step": 0, "lr": 0.5}]  # the first run has no loss
        (path.parent / f"{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
        found.append((path, record))
    (group,) = curve_groups(found, {id(record): 5 for _, record in found})
    assert (group["protocol"], group["task"]) == ("sample-knn", "classification")
    assert group["lines"] == [{"row": 5, "seed": seed, "points": [[0, 2.0], [3, 1.0]]} for seed in (1, 2, 3)]
    for count in (0, 1, CURVE_POINTS, CURVE_POINTS + 1, 1000):
        points = thin([{"step": step, "loss": -step} for step in range(count)], "loss")
        assert len(points) <= CURVE_POINTS + 1
        assert [points[0][0], points[-1][0]] == [0, count - 1] if count else points == []


def test_cells_say_what_was_measured_what_was_printed_and_the_difference(tmp_path: Path) -> None:
    values = {"random": [60.0, 61, 62], "twist": [50.0, 51, 52], "byol": [70.0, 71, 72], "moco-v2": [60.99]}
    records = [record for method, means in values.items() for record in runs(method, means)]
    records += runs("twist", [40.0], "nmi_percent", protocol="sample-cluster", task="clustering")
    text = html_of(build_table(records, baseline="random"), tmp_path)

    def three(mean: str) -> str:
        return f'<span class="measured">{mean}<span class="sd"> ± 1.0 (3)</span></span>'

    assert re.findall(r"<td.*?>(.*?)</td>", text) == [
        three("61.0"),
        "–",
        three("71.0") + '<span class="gap up">+10.0*</span>',
        "–",
        '<span class="measured">61.0<span class="sd"> (1)</span></span><span class="gap ">+0.0?</span>',
        "–",
        three("51.0") + '<span class="gap down">−10.0*</span>',
        '<span class="measured">40.0<span class="sd"> (1)</span></span>',
    ]
    assert re.findall(r'<tr( class="baseline")? data-row="(\d)">', text) == [
        (' class="baseline"', "0"), ("", "1"), ("", "2"), ("", "3"),
    ]  # fmt: skip
    assert 'id="measured-only"' not in text
    assert "– absent" in text
    assert "published by others" not in text


def test_printed_numbers_are_marked_as_such(tmp_path: Path) -> None:
    records = runs("twist", [70.0], protocol="knn", scale="full", weights={"epochs": 300})
    table = build_table(records, published=[row for row in load_published() if row.method in ("twist", "dino")])
    text = html_of(table, tmp_path)
    assert "<small>" in text
    assert '<span class="tag">full · recipe' in text
    own, others = (re.findall(rf'<th scope="col"[^>]*data-column="{n}"[^>]*>', text) for n in (0, r"[^0]\d*"))
    assert "data-printed" not in own[0]
    assert all("data-printed" in head for head in others)
    assert re.search(r'data-column="0" [^>]*data-value="67.5"[^>]*><span class="printed">67.5<sup>\w', text)
    assert 'id="measured-only"' in text
    assert "published by others" in text
    assert "<dt>k-NN top-1</dt>" in text
    assert "– absent" not in html_of(build_table(records), tmp_path)


def test_curves_or_pictures_that_are_absent_are_named(tmp_path: Path) -> None:
    found = make_results(tmp_path / "results")
    table = build_table([record for _, record in found])
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        render_page(table, found, folder=tmp_path, options=PageOptions(pretrain_runs=[tmp_path]))
    with pytest.raises(UserError, match=r"notes\.txt is no picture"):
        render_page(table, found, folder=tmp_path, options=PageOptions(pictures=[("x", tmp_path / "notes.txt")]))
    (found[0][0].parent / "curve.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="no curves at"):
        render_page(table, found, folder=tmp_path)


def test_what_the_numbers_are_stands_before_them(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    about = text[text.index('id="about"') : text.index('id="table"')]
    for said in ("resnet50", "<dd>test</dd>", "42 transfer runs", "at sample scale", "No ranking of methods follows"):
        assert said in about
    records = runs("twist", [50.0, 51.0], recipe={"size": 32, "images": {"train": 600, "val": 300}})
    found = [(tmp_path / f"{record.seed}.json", record) for record in records]
    (tmp_path / "note.txt").write_text("Mine <first>.\n\nSecond.")
    text = render_page(build_table(records), found, folder=tmp_path, options=PageOptions(note=tmp_path / "note.txt"))
    assert re.findall(r'<p class="own">(.*?)</p>', text) == ["Mine &lt;first&gt;.", "Second."]
    for said in ("600 train, 300 val", "32 × 32", "Fewer than 3 results", '<td class="first">0.033</td>'):
        assert said in text


def test_each_protocol_has_its_own_table_with_every_value_and_link(page: Path) -> None:
    whole, _, rest = page.read_text().partition('<div class="apart">')
    apart = rest.partition('<div class="copy"')[0]
    cell = r'<td[^>]*data-link="([^"]*)"[^>]*>(.*?)</td>'
    cells = re.findall(cell, whole, re.S)
    assert len(cells) == len(set(cells)) == len(embedded(page)["cells"])
    assert sorted(re.findall(cell, apart, re.S)) == sorted(cells)
    copies = embedded(page)["copies"]
    assert [copies[name][:6] for name in ("markdown", "latex", "csv")] == ["| meth", "% need", "method"]


def test_the_same_picture_of_each_row_stands_side_by_side(tmp_path: Path) -> None:
    found = []
    for method in ("twist", "byol"):
        record = make_record(method, media=(f"{method}-0.png", f"{method}-1.png"))
        found.append((write_record(record, tmp_path), record))
        for name in record.media:
            (found[-1][0].parent / name).write_bytes(PIXEL)
    text = render_page(build_table([record for _, record in found]), found, folder=tmp_path)
    groups = text.split('<div class="pictures">')[1:]
    assert [re.findall(r"<b>(\w+)</b>", group.split("</section")[0]) for group in groups] == [["BYOL", "TWIST"]] * 2


@pytest.mark.parametrize("field", ["media", "curves"])
def test_a_record_cannot_bring_in_a_file_from_elsewhere(tmp_path: Path, field: str) -> None:
    (tmp_path / "secret.png").write_bytes(PIXEL)
    named = "../../secret.png"
    record = make_record(**{field: (named,) if field == "media" else named})
    path = write_record(record, tmp_path / "results")
    with pytest.raises(UserError, match="outside its own folder"):
        render_page(build_table([record]), [(path, record)], folder=tmp_path)


# ── In a real browser ──

AXE = "4.14.1"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    yield from shown(browser, page)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("published") / "page.html"
    return write_page(page, build_table([], published=load_published()), [])


@pytest.fixture(scope="module")  # it takes long to open
def published_alone(browser: Any, collection: Path) -> Iterator[Any]:
    yield from shown(browser, collection)


def shown(browser: Any, page: Path, **options: Any) -> Iterator[Any]:
    sheet = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light", **options)
    sheet.troubles = []
    sheet.on("pageerror", lambda error: sheet.troubles.append(str(error)))
    sheet.on("console", lambda message: sheet.troubles.append(message.text) if message.type == "error" else None)
    sheet.on(
        "request", lambda request: request.url.startswith(("file:", "data:")) or sheet.troubles.append(request.url)
    )
    sheet.goto(page.as_uri())
    sheet.wait_for_selector(".plot svg")
    yield sheet
    assert sheet.troubles == []
    sheet.close()


def names(sheet: Any, metric: str = "") -> list[str]:
    """The rows of the first table with a column called `metric` that can be seen."""
    table = sheet.locator("table.results:visible", has=sheet.locator("thead th[data-column]", has_text=metric)).first
    found: list[str] = table.locator("tbody tr:not([hidden]) th").evaluate_all(
        "heads => heads.map((head) => head.firstChild.textContent)"
    )
    return found


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's source: the file that $AXE names, else from npm."""
    if named := os.environ.get("AXE"):
        return Path(named).read_text()
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--no-save", "--prefix", str(folder), f"axe-core@{AXE}"]
    if shutil.which("npm") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("axe-core is not here: set $AXE to its axe.min.js, or install npm")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.mark.install
@pytest.mark.parametrize("look", [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"media": "print"}])
def test_axe_finds_nothing_serious(browser: Any, page: Path, collection: Path, axe: str, look: dict[str, str]) -> None:
    for file in (page, collection):
        for sheet in shown(browser, file, bypass_csp=True):
            sheet.emulate_media(**look)
            sheet.evaluate(axe)
            found = sheet.evaluate("axe.run()")
            assert len(found["passes"]) > 10, "it looked"
            said = [
                (one["impact"], one["id"], one["nodes"][0]["html"][:200])
                for one in found["violations"]
                if one["impact"] in ("serious", "critical")
            ]
            assert not said


@pytest.mark.slow
def test_sorting_by_click_and_by_keyboard(opened: Any) -> None:
    """Two stops for Tab, the heads and the cells; arrow keys within, Enter sorts. Absent stays last in either order."""
    head = opened.locator("th[data-column]:visible", has_text="mIoU").first
    before = names(opened, "mIoU")
    for wanted in (["MoCo v2", "random init"], ["random init", "MoCo v2"], before[:2]):
        head.locator("button").click()
        assert names(opened, "mIoU")[:2] == wanted
    before = names(opened)
    opened.locator('thead button[tabindex="0"]:visible').first.focus()
    for wanted in (sorted(before, key=str.casefold), sorted(before, key=str.casefold, reverse=True), before):
        opened.keyboard.press("Enter")
        assert names(opened) == wanted
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert opened.locator('th[aria-sort="descending"]').get_attribute("data-column") == "0"
    opened.keyboard.press("ArrowDown")
    assert opened.evaluate("document.activeElement.dataset.column") == "0"
    opened.keyboard.press("Tab")
    assert not opened.evaluate("document.activeElement.matches('td')")


@pytest.mark.slow
def test_the_published_collection_opens_on_one_protocol_without_empty_rows(published_alone: Any) -> None:
    groups = published_alone.locator(".scroll th[colspan]:visible, .apart h3:visible")
    heads = groups.all_inner_texts()
    assert heads[0].startswith("voc-frcnn-c4-24k")
    assert any(head.startswith("VOC07+12 C4 24k, MMDetection") for head in heads)
    assert not any("COCO" in head or "foreign:" in head for head in heads)
    rows = published_alone.locator(".results tbody tr:visible")
    assert rows.count() > 0
    has_value = "row => [...row.querySelectorAll('.printed')].some(value => value.checkVisibility())"
    assert rows.evaluate_all(f"rows => rows.every({has_value})")
    published_alone.get_by_label("protocol", exact=True).select_option("linear")
    assert published_alone.locator('.chips [aria-pressed="true"]').inner_text() == "Classification"
    assert groups.all_inner_texts()[0].startswith("linear")
    # A task shows all its protocols again, and lists no others.
    published_alone.get_by_role("button", name="Clustering").click()
    assert published_alone.get_by_label("protocol", exact=True).input_value() == ""
    assert published_alone.locator("#protocol optgroup:not([hidden])").count() == 1
    published_alone.get_by_role("button", name="All", exact=True).click()
    assert published_alone.locator(".results tbody tr:visible").count() > 120


@pytest.mark.slow
def test_a_table_without_room_becomes_one_for_each_protocol(opened: Any, published_alone: Any) -> None:
    for sheet, width in itertools.product((opened, published_alone), (1400, 390)):
        sheet.set_viewport_size({"width": width, "height": 844})
        sheet.wait_for_timeout(200)
        assert sheet.evaluate("document.documentElement.scrollWidth") <= width
    # The panel lies below the cell that it speaks of, which stays in sight.
    opened.locator("td[tabindex]:visible").first.click()
    opened.wait_for_timeout(500)
    box, cell = (opened.locator(of).first.bounding_box() for of in ("#provenance", "td[tabindex]:visible"))
    assert (box["x"], box["y"] + box["height"]) == (0, pytest.approx(844, abs=1))
    assert 0 < cell["y"] < cell["y"] + cell["height"] < box["y"]
    published_alone.get_by_label("protocol", exact=True).select_option("coco-mrcnn-fpn-1x")
    assert published_alone.locator(".scroll table.results").is_hidden()
    assert published_alone.locator(".apart table.results:visible").count() > 1


@pytest.mark.slow
def test_every_value_is_on_paper(browser: Any, page: Path, tmp_path: Path) -> None:
    """The text of the PDF has them all (pdftotext), else every cell lies within a sheet of A4 as it prints."""
    for sheet in shown(browser, page):
        wanted = [f"{cell['measured']['mean']:.1f}" for cell in embedded(page)["cells"] if cell["measured"]]
        sheet.pdf(path=tmp_path / "page.pdf", format="A4")
        if shutil.which("pdftotext"):
            command = ["pdftotext", "-layout", tmp_path / "page.pdf", "-"]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        sheet.set_viewport_size({"width": 720, "height": 1050})  # A4 at 96 dots an inch, without its margins
        sheet.emulate_media(media="print")
        cells = sheet.locator(".measured:visible")
        if not shutil.which("pdftotext"):
            printed = "\n".join(cells.all_inner_texts())
        assert all(box["x"] + box["width"] <= 720 for box in (cell.bounding_box() for cell in cells.all()))
        assert Counter(wanted) <= Counter(re.findall(r"\d+\.\d", printed))


@pytest.mark.slow
def test_links_and_copies(opened: Any) -> None:
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    link = opened.locator("td[data-link]:visible", has_text="27.3").first.get_attribute("data-link")
    opened.evaluate("link => { location.hash = encodeURIComponent(link); }", link)
    panel = opened.locator("#provenance")
    panel.wait_for(state="visible")
    assert "TWIST · sample-coco-mrcnn-fpn · box AP" in panel.locator("h3").first.inner_text()
    panel.locator(".runs a").first.click()
    assert opened.evaluate("location.hash").startswith("#record")
    assert panel.is_visible()
    opened.get_by_role("button", name="CSV").click()
    opened.wait_for_function("document.querySelector('.copy output').textContent")
    assert opened.evaluate("navigator.clipboard.readText()").startswith("method,row,")


@pytest.mark.slow
def test_filters(opened: Any) -> None:
    opened.get_by_role("button", name="Segmentation", exact=True).click()
    assert set(opened.locator(".results thead button:visible").all_inner_texts()) == {"method", "mIoU"}
    assert names(opened, "mIoU") == ["random init", "MoCo v2"]
    assert opened.locator("#metrics .chart:visible").count() == 1
    opened.get_by_role("button", name="All", exact=True).click()
    assert "DINO" in names(opened, "k-NN")
    opened.get_by_label("only rows and columns that were measured here").check()
    assert names(opened, "k-NN") == ["random init", "MoCo v2", "TWIST"]
    assert opened.locator(".scroll th:visible, .apart h3:visible", has_text="lightly").count() == 0


@pytest.mark.slow
def test_provenance_by_keyboard_and_by_pointing(opened: Any) -> None:
    panel = opened.locator("#provenance")
    assert panel.is_hidden()
    opened.locator(".printed:visible", has_text="67.5").first.hover()
    panel.wait_for(state="visible")  # after a moment, so that passing over the table opens nothing
    assert "DINO repository, README.md" in panel.inner_text()
    opened.locator("h1").hover()
    panel.wait_for(state="hidden")
    opened.locator('td[tabindex="0"]:visible').first.focus()
    assert "random init · sample-coco-mrcnn-fpn · box AP" in panel.locator("h3").first.inner_text()
    opened.keyboard.press("ArrowDown")
    assert "MoCo v2" in panel.locator("h3").first.inner_text()
    text = panel.inner_text()
    assert "Measured: 26.30 ± 0.30, 3 runs, from one pretraining" in text
    assert "+6.00 against random init: significant, p < 0.001" in text
    assert "results/sample-coco-mrcnn-fpn/moco-v2-" in text
    assert "<b>watch out</b>" in text
    opened.keyboard.press("Enter")
    opened.keyboard.press("Escape")
    assert panel.is_hidden()


@pytest.mark.slow
def test_charts_and_pictures(opened: Any) -> None:
    # Means of three methods, nine runs; the published diamond of the k-NN chart.
    dots = opened.locator("#metrics .chart", has_text="sample-coco-mrcnn-fpn").first
    assert dots.locator("circle").count() == 12
    assert opened.locator("#metrics .chart", has_text="k-NN top-1").locator("path").count() > 0
    opened.get_by_label("every metric and protocol").check()
    assert opened.locator("#metrics .chart:visible", has_text="mask AP").count() == 1
    assert opened.locator("#pretraining .chart svg").count() == 4
    opened.locator(".pictures button").first.click()
    assert opened.locator("dialog").is_visible()
    opened.keyboard.press("Escape")
    assert opened.locator("dialog").is_hidden()
