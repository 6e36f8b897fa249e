"""The files of eval/configs agree with the papers, and what the docs say of files is there."""

import re
from pathlib import Path

import pytest
import yaml

from eval.suites import read

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "eval" / "configs"

SIZES = (64, 128, 256, 512, 1024)
BETA = {
    ("Meta-Llama-3-8B-Instruct", "retrieval"): (2, 1.5, 1.1, 1.2, 1.2),
    ("Meta-Llama-3-8B-Instruct", "retrieval_reasoning"): (1.2, 1.01, 1.1, 1.1, 1.2),
    ("Mistral-7B-Instruct-v0.2", "retrieval"): (1.5, 1.5, 2, 1.01, 1.5),
    ("Mistral-7B-Instruct-v0.2", "retrieval_reasoning"): (1.2, 1.1, 1.005, 1.005, 1.01),
}
"""β of HeadKV-R and HeadKV-R2 at SIZES: arXiv 2410.19258, table 4 (appendix A)."""

ALL_BETA = (1.005, 1.01, 1.1, 1.2, 1.5, 2, 5, 10)
"""What the paper chooses β from, for each row."""

TITLES = {
    "headkv_table1": "HeadKV tables 1 and 4:",
    "headkv_table2": "HeadKV table 2:",
    "headkv_table3": "HeadKV table 3:",
    "headkv_figure_beta": "HeadKV figures 10 and 11:",
    "headkv_figure_needle": "HeadKV figures 5 and 8:",
    "headkv_figure_latency": "HeadKV figure 6:",
}
POLICY = re.compile(
    r"headkv_paper:kv_size=(\d+),beta=([\d.]+),scores=scores/([^,]+?)_"
    r"(retrieval|retrieval_reasoning|enhanced_retrieval)_heads\.json"
)

FOLDS = {
    "meta-llama/Llama-2-7b-hf": 8,
    "mistralai/Mistral-7B-v0.3": 8,
    "meta-llama/Meta-Llama-3-8B": 4,
    "meta-llama/Llama-3.2-1B": 4,
    "Qwen/Qwen2.5-7B": 4,
    "HuggingFaceTB/SmolLM-1.7B": 0,
}
"""FreqFold in the README of fxmeng/TransMLA; 0, the best one, where it is unknown."""


def rows(name):
    """(model, estimator, KV size, β) of every `headkv_paper` policy of a file."""
    found = []
    for run in read(CONFIGS / f"{name}.yaml").runs:
        for policy in run.policies:
            if policy.startswith("headkv_paper"):
                match = POLICY.fullmatch(policy)
                assert match is not None, policy
                assert match[3] == run.model.partition("/")[2]
                found.append((match[3], match[4], int(match[1]), float(match[2])))
    return found


@pytest.mark.parametrize(
    "name", ["headkv_table1", "headkv_table2", "headkv_table3", "headkv_figure_needle"]
)
def test_beta_is_the_published_one(name):
    asked = SIZES if name == "headkv_table1" else (128,)
    published = {
        (model, kind, size, beta)
        for (model, kind), betas in BETA.items()
        for size, beta in zip(SIZES, betas, strict=True)
        if size in asked
    }
    assert {row for row in rows(name) if row[1] != "enhanced_retrieval"} == published


def test_latency_has_the_published_beta_of_its_row():
    assert set(rows("headkv_figure_latency")) == {
        ("Mistral-7B-Instruct-v0.2", "retrieval_reasoning", 128, 1.1)
    }


def test_unpublished_beta_is_tried_at_all_values():
    for model in {model for model, _ in BETA}:
        tried = [
            row[3] for row in rows("headkv_table2") if row[:2] == (model, "enhanced_retrieval")
        ]
        assert tuple(tried) == ALL_BETA
        for size in (128, 512):
            curve = [row[3] for row in rows("headkv_figure_beta") if row[::2] == (model, size)]
            assert tuple(curve) == ALL_BETA


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("headkv_*.yaml")), ids=lambda p: p.stem)
def test_title_and_header_have_the_number_of_the_file(path):
    title = TITLES[path.stem]
    assert read(path).title.startswith(title)
    number = title.removeprefix("HeadKV ").rstrip(":").replace("figures 5 and 8", "figures 5 (")
    assert path.read_text().startswith(f"# HeadKV (arXiv 2410.19258), {number}")


@pytest.mark.parametrize(
    "name, command", [("headkv_table2", "longbench"), ("headkv_table3", "babilong")]
)
def test_tables_at_one_kv_size(name, command):
    assert {run.command for run in read(CONFIGS / f"{name}.yaml").runs} == {command}
    assert {size for _, _, size, _ in rows(name)} == {128}


def conversions(name):
    """Words of the `kvjax convert` commands in the comments of a TransMLA file."""
    zoo = re.search(r'export ZOO="(.*)"', (CONFIGS / "transmla_perplexity.yaml").read_text())
    assert zoo is not None
    lines = re.findall(r"^#   kvjax (convert .*)$", (CONFIGS / name).read_text(), re.MULTILINE)
    return [line.replace("$ZOO", zoo[1]).split() for line in lines]


@pytest.mark.parametrize("name", ["transmla_perplexity.yaml", "transmla_zeroshot.yaml"])
def test_converted_models_have_their_command(name, monkeypatch):
    from kvjax import cli

    asked = {}

    def note(source, out, wanted, dtype, mesh):
        asked[str(out)] = source, wanted
        return {}

    monkeypatch.setattr("kvjax.commands.convert.convert_to_decoupled", note)
    for words in conversions(name):
        cli.main(words)
    models = {run.model for run in read(CONFIGS / name).runs if run.model.startswith("runs/")}
    untuned = {model for model in models if not model.endswith("-tuned/model")}
    tuned_from = {model.removesuffix("-tuned/model") for model in models - untuned}
    assert set(asked) == untuned | tuned_from
    for out, (source, wanted) in asked.items():
        assert (wanted.recipe, wanted.fold, wanted.calibration_length) == (
            "published",
            FOLDS[source],
            256,
        )
        sizes = re.search(r"-(\d+)-(\d+)$", out)
        if sizes is not None:
            assert (wanted.kv_rank, wanted.rope_dim) == (int(sizes[1]), int(sizes[2]))


def test_128_sequences_calibrate(tmp_path, monkeypatch):
    import numpy as np

    from kvjax.commands.text import calibration_tokens

    [words] = {
        tuple(line[line.index("--calibration-tokens") :][:2])
        for line in conversions("transmla_perplexity.yaml")
    }
    np.save(tmp_path / "ids.npy", np.zeros((200, 256), np.int32))
    fit, _ = calibration_tokens("builtin:needle", tmp_path / "ids.npy", int(words[1]), 256)
    assert fit.shape == (128, 256)


def test_zero_shot_is_a_mean_of_six():
    groups = {}
    for path in (CONFIGS / "harness").glob("*.yaml"):
        groups[path.stem] = yaml.safe_load(path.read_text())
        assert groups[path.stem]["group"] == path.stem
    assert groups["arc_both"]["task"] == ["arc_easy", "arc_challenge"]
    assert groups["arc_both"]["aggregate_metric_list"][0]["weight_by_size"] is False
    for run in read(CONFIGS / "transmla_zeroshot.yaml").runs:
        tasks = run.options["tasks"]
        assert len(tasks) == 6 and set(groups) <= set(tasks)
        assert Path(run.options["include_path"]).samefile(CONFIGS / "harness")


def test_harness_knows_the_zero_shot_tasks():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")
    from eval.lm_eval import task_manager

    options = read(CONFIGS / "transmla_zeroshot.yaml").runs[0].options
    manager = task_manager(options["tasks"], Path(options["include_path"]))
    assert set(options["tasks"]) <= set(manager.all_tasks)


PAGES = [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "benchmarks" / "results").glob("*.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_configs_that_are_named_exist():
    others = [ROOT / "Makefile", *CONFIGS.glob("*.yaml"), *(ROOT / "eval").rglob("*.py")]
    for page in [*PAGES, *others]:
        text = page.read_text()
        names = re.findall(r"\b(?:headkv|transmla|embedded)\w*\.yaml", text)
        missing = [name for name in names if not (CONFIGS / name).is_file()]
        assert not missing, page


def test_evaluation_page_names_every_config():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert all(path.name in text for path in CONFIGS.glob("*.yaml"))
