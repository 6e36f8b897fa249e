"""The report of hand-made runs: its pictures load, its text is escaped, its errors name folders."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from eval.report import page
from eval.report.command import ReportCommand, write
from eval.report.headline import headline
from eval.report.runs import Run, cells, find

PNG = b"\x89PNG\r\n\x1a\n"
WHERE = {
    "date": "2026-01-02",
    "device": "1 × cpu",
    "versions": {"jax": "0.10.2"},
    "commit": "abc1234",
    "seconds": 3.5,
}
EVIL = "<script>alert('x')</script>"


def part(score, items=8):
    return {"score": score, "standard_error": 0.05, "items": items}


def entry(policy, score, held, groups=(), kept=None):
    return {
        "policy": policy,
        "all": part(score),
        "groups": dict(groups),
        "cache_bytes": held,
        "full_cache_bytes": 4096.0,
        "gqa_cache_bytes": 4096.0,
        "kept": {} if kept is None else {"256": kept},
        "prompt_tokens": {"least": 1, "mean": 2.0, "most": 3},
        "truncated": 0,
    }


def needle():
    grid = {f"{n}/{d:.2f}": part((n + d) / 2000) for n in (256, 512, 1024) for d in (0, 0.5, 1)}
    return {
        "task": "needle",
        "metric": "exact_match",
        "model": "builtin:needle",
        "protocol": "generate",
        "items": 8,
        "policies": [
            entry("full", 0.9, 4096.0, grid),
            entry("headkv:kv_size=24", 0.79, 512.0, grid, [[9, 40, 20, 3]] * 5),
            entry("headkv:kv_size=48", 0.9, 1024.0, grid, [[20, 70, 20, 9]] * 5),
        ],
        "command": "python -m eval needle --model 'builtin:needle' --policy full",
        **WHERE,
    }


def latency():
    rows = [
        {
            "policy": policy,
            "context": context,
            "batch": 1,
            "time_to_first_token": 0.01 * context,
            "time_per_token": 0.001,
            "cache_bytes": context * 100,
            "full_cache_bytes": context * 100,
            "device_peak_bytes": None,
        }
        for policy in ("full", "snapkv")
        for context in (256, 512)
    ]
    return {"task": "latency", "model": "m", "rows": rows, "command": "python -m eval latency"}


def folder(path, results):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if results is not None:
        (path / "results.json").write_text(json.dumps(results))
    return path


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.dark = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "source":
            self.dark.append(dict(attrs))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    folder(root / "needle", needle())
    evil = needle() | {"task": "gsm8k", "model": EVIL, "command": EVIL}
    groups = {"short": part(0.5), EVIL: part(0.25)}
    evil["policies"] = [entry("full", 0.5, 4096.0, groups), entry("snapkv", 0.25, 64.0, groups)]
    evil["policies"][0]["summary"] = {"strict": 0.5, "note": EVIL}
    folder(root / "evil", evil)
    folder(root / "latency", latency())
    tuned = root / "tuned"
    tuned.mkdir()
    lines = [{"step": s, "loss": 2 / s, "learning_rate": 1e-4} for s in range(1, 9)]
    (tuned / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step"')
    return write(ReportCommand((root,), out=root.parent / "report"))


def test_pictures_load(report):
    text = report.read_text()
    found = Page(text)
    assert len(found.images) == 2 + 1 + 1 + 1 + 3 + 1  # bytes, grid, head, kept, latency, loss
    for image in found.images:
        assert len(image["alt"]) > 15
    names = [image["src"] for image in found.images] + [dark["srcset"] for dark in found.dark]
    assert len(found.dark) == len(found.images) and len(set(names)) == len(names)
    assert {dark["media"] for dark in found.dark} == {"(prefers-color-scheme: dark)"}
    assert {path.name for path in report.parent.glob("*.png")} == set(names)
    assert all((report.parent / name).read_bytes()[:8] == PNG for name in names)


def test_each_run_says_what_it_shows(report):
    text = report.read_text()
    assert "<h2>Needle, builtin:needle</h2>" in text and "<h2>Gsm8k, " in text
    # 24 tokens keep .79 of .9, which is less than nine tenths; 48 keep all.
    assert "headkv keeps 100% of the full cache&#x27;s score in 25% of its bytes." in text
    assert "snapkv keeps 50% of the full cache&#x27;s score in 1.6% of its bytes." in text
    assert "exact match" in text and "exact_match" not in text


@pytest.mark.parametrize(
    ("metric", "scores", "said"),
    [
        ("exact_match", (0.0, 0.5, 0.2), None),
        ("exact_match", (0.5, 0.25, 0.3), "snapkv keeps 60% of the full cache's score in 13% of"),
        ("perplexity", (10.0, 10.5, 30.0), "headkv has 10.5 in 13% of the full cache's bytes, whi"),
    ],
)
def test_headlines(metric, scores, said):
    names = ("full", "headkv:kv_size=24", "snapkv:kv_size=24")
    held = (4096.0, 516.0, 520.0)
    entries = [entry(*each) for each in zip(names, scores, held, strict=True)]
    found = headline(Run("run", "scores", {"metric": metric, "policies": entries}))
    assert found is None if said is None else str(found).startswith(said)
    if metric == "perplexity":
        assert str(found).endswith("which has 10; snapkv 30.")
    assert headline(Run("run", "scores", {"policies": entries[1:]})) is None


def test_page_is_static_and_fits_a_phone(report):
    text = report.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('<div class="scroll"><table>') == Page(text).tags.count("table") >= 5
    assert not {"script", "link", "iframe"} & set(Page(text).tags)
    assert not re.search(r"https?://", text)


def test_everything_is_escaped(report):
    text = report.read_text()
    assert EVIL not in text and "&lt;script&gt;" in text
    assert text.count("&lt;script&gt;") >= 4  # model, command, group and note


def test_numbers_and_provenance(report):
    text = report.read_text()
    assert "0.790 ± 0.050" in text and ">12%<" in text
    assert "python -m eval needle --model &#x27;builtin:needle&#x27; --policy full" in text
    for said in ("1 × cpu", "jax 0.10.2", "abc1234", "2026-01-02"):
        assert said in text


def test_unfinished_runs_are_one_line_that_names_them(tmp_path, capsys):
    from eval.__main__ import main as run

    folder(tmp_path / "good", needle())
    bad = folder(tmp_path / "half done", None)
    with pytest.raises(SystemExit) as ended:
        run(["report", str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert str(bad) in said and str(tmp_path / "good") not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1]", "{", '{"policies": [{}]}', "{}"])
def test_damaged_results_are_refused(tmp_path, text):
    path = folder(tmp_path / "run", None)
    (path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path / "results.json"))):
        find([path])


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="nothing here"):
        write(ReportCommand((tmp_path / "nothing here",), out=tmp_path / "out"))


def test_runs_of_one_name_stay_apart(tmp_path):
    paths = [folder(tmp_path / place / "needle", needle()) for place in "ab"]
    assert [run.name for run in find(paths)] == ["needle", "needle (2)"]


def test_score_files_get_pictures_of_their_own(tmp_path):
    import numpy as np

    from kvjax.headkv import HeadScores

    HeadScores(np.random.default_rng(0).random((3, 4, 2))).save(tmp_path / "heads.json")
    run = folder(tmp_path / "run", latency())
    paths = {"out": tmp_path / "out"}
    command = ReportCommand((run,), **paths, head_scores=(tmp_path / "heads.json",), kv_size=64)
    text = write(command).read_text()
    assert "Importance of 4 query heads in 3 layers" in text and "Budgets of the heads" in text


def test_cells():
    assert cells({"512/0.50": 1, "1024/1.00": 2}) == {(512, 0.5): 1, (1024, 1.0): 2}
    assert cells({"4k/qa1": 1}) is None and cells({}) is None


@pytest.mark.parametrize(
    "value, said", [(512, "512 B"), (2048, "2 KiB"), (3 << 20, "3 MiB"), (5 << 30, "5 GiB")]
)
def test_sizes(value, said):
    assert page.size(value) == said


def test_opens_in_a_browser(report, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chrome = next(filter(None, map(shutil.which, names)), None)
    firefox = shutil.which("firefox")
    if chrome is None and firefox is None:
        pytest.skip("no chromium, chrome or firefox here")
    picture = tmp_path / "page.png"
    if chrome is not None:
        command = [chrome, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,4000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    else:
        command = [str(firefox), "--headless", "--window-size=400", f"--screenshot={picture}"]
    subprocess.run([*command, report.as_uri()], check=True, capture_output=True, timeout=120)
    assert picture.read_bytes()[:8] == PNG
