"""Runs whose numbers become NaN: they stop, and no checkpoint and no model holds NaN."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_toys import tiny_checkpoint

import kvjax
from kvjax.tasks.families import rows
from train.checkpoints import Checkpoints, finished_steps
from train.compare import runs
from train.compare.config import CompareConfig, final_jobs, search_jobs
from train.data import DataConfig, SourceConfig, check_documents
from train.finetune import run as loop
from train.finetune.config import TuneConfig
from train.finetune.run import finetune
from train.finetune.setup import load
from train.pretrain import run as pretrain
from train.pretrain.curriculum import Curriculum, ModelShape, Stage
from train.pretrain.episodes import EpisodeConfig
from train.pretrain.results import export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the project's vocabulary, and rows to train on."""
    out = tmp_path_factory.mktemp("tune")
    tiny_checkpoint(out / "model")
    lines = [json.dumps(row) + "\n" for row in rows("word_problems", 60, 0)]
    (out / "rows.jsonl").write_text("".join(lines))
    return out


def settings(folder, **changes):
    quick = {"sequence_length": 64, "batch_size": 2, "dtype": "float32", "steps": 5}
    quick |= {"checkpoint_every": 1, "log_every": 1, "keep": 2}
    data = (f"plain:{folder / 'rows.jsonl'}",)
    return TuneConfig(**{"model": str(folder / "model"), "data": data, **quick, **changes})


def run(config, out):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):  # for orbax
        warnings.simplefilter("ignore")
        return finetune(config, out)


def nan_rate_at(step, monkeypatch):
    """From this step on, counted from 1, the update of the parameters is NaN."""
    rate = loop.learning_rate
    monkeypatch.setattr(
        loop, "learning_rate", lambda at, *rest: rate(at, *rest) if at + 1 < step else float("nan")
    )


def stored(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


def test_the_checkpoint_of_a_nan_update_is_not_written(folder, tmp_path, monkeypatch):
    """The step's own loss is finite: it is of the parameters before the update."""
    nan_rate_at(3, monkeypatch)
    with pytest.raises(ValueError) as error:
        run(settings(folder), tmp_path)
    assert str(error.value) == (
        "step 3: NaN or infinite values in layers_0/attn/k, expected finite numbers; stopped, the "
        "last good checkpoint is of step 2"
    )
    assert stored(tmp_path) == [1, 2]


def test_a_nan_in_the_last_step_is_no_model(folder, tmp_path, monkeypatch):
    nan_rate_at(5, monkeypatch)
    config = settings(folder, merge=True, checkpoint_every=100)
    with pytest.raises(ValueError, match=r"step 5: NaN .* in layers_0/attn/k.*no checkpoint yet"):
        run(config, tmp_path)
    assert not (tmp_path / "model").exists() and stored(tmp_path) == []


def test_a_checkpoint_that_holds_nan_is_refused(folder, tmp_path):
    config = settings(folder)
    _, state = load(config)
    broken = {path: leaf * jnp.nan for path, leaf in state.params.items()}
    where = {"iterators": [], "tokens": 0, "learned": 0}
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        kept = Checkpoints(tmp_path, 2)
        kept.save(4, dataclasses.replace(state, params=broken), where)
        kept.close()
    with pytest.raises(ValueError, match=r"checkpoints/4: params/.*attn/k has NaN .*remove this"):
        run(config, tmp_path)


def test_a_model_that_holds_nan_is_refused(folder, tmp_path):
    model, params = kvjax.load(folder / "model", dtype="float32")
    params["layers_1"]["mlp"]["up"] = params["layers_1"]["mlp"]["up"].at[0, 0].set(jnp.inf)
    kvjax.save(model, params, tmp_path / "model", layout="hf")
    config = settings(folder, model=str(tmp_path / "model"), tokenizer=str(folder / "model"))
    with pytest.raises(ValueError, match=r"model: layers_1/mlp/up has NaN or infinite values"):
        run(config, tmp_path / "out")


@pytest.mark.parametrize("stop", [0, -1, True])
def test_steps_to_stop_after(folder, tmp_path, stop):
    with pytest.raises(ValueError, match=f"stop_after is {stop}, expected a whole number from 1"):
        finetune(settings(folder), tmp_path / "out", stop_after=stop)
    assert not (tmp_path / "out").exists()


def test_documents_that_a_model_cannot_read(folder):
    tokenizer = kvjax.load_tokenizer(folder / "model")
    data = DataConfig((SourceConfig(str(folder / "rows.jsonl"), "plain"),), sequence_length=64)
    check_documents(data, tokenizer, len(tokenizer), 64)
    with pytest.raises(ValueError, match=r"token \d+, expected at most 9: it is not the model's"):
        check_documents(data, tokenizer, 10, 64)
    with pytest.raises(ValueError, match=r"a document of \d+ tokens, expected at most 8"):
        check_documents(data, tokenizer, len(tokenizer), 8)


EPISODES = EpisodeConfig(40, (2, 2), (1, 1), 1, {"thing": 1})
RECIPE = Curriculum(
    model=ModelShape(16, 1, 2, 1, 8, 16, 64),
    stages=(Stage(EPISODES, 2, 6),),
    report_every=2,
    warmup_steps=4,
)


def pretrained(out, max_steps=None):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        return pretrain.pretrain(RECIPE, out, max_steps)


@pytest.mark.parametrize("max_steps", [None, 4, 5])
def test_pretraining_stops_before_a_nan_checkpoint(tmp_path, monkeypatch, max_steps):
    rate = pretrain.learning_rate
    monkeypatch.setattr(
        pretrain, "learning_rate", lambda r, p: rate(r, p) if p.step < 3 else float("nan")
    )
    with pytest.raises(ValueError, match=r"step 4: NaN or infinite values in params/.*of step 2$"):
        pretrained(tmp_path, max_steps)
    assert finished_steps(tmp_path) == [2]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


def test_a_pretraining_checkpoint_of_nan_is_neither_resumed_nor_exported(tmp_path):
    state = pretrained(tmp_path, 2)
    broken = dataclasses.replace(state, params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        pretrain.save(tmp_path, broken, pretrain.Progress(step=4, stage_step=4))
        for again in (
            lambda: pretrained(tmp_path),
            lambda: export(RECIPE, tmp_path, tmp_path / "m"),
        ):
            with pytest.raises(ValueError, match=r"checkpoints/4: params/embedding has NaN"):
                again()
    assert not (tmp_path / "m").exists()


def test_steps_beyond_the_last_are_none(tmp_path):
    pretrained(tmp_path, 4)
    assert pretrained(tmp_path, 2) is not None  # it used to run on: 4 is not 2
    assert finished_steps(tmp_path) == [2, 4]
    with pytest.raises(ValueError, match="max_steps is -1"):
        pretrained(tmp_path, -1)


def test_an_export_that_overflows_is_refused(tmp_path):
    state = pretrained(tmp_path, 2)
    large = dataclasses.replace(
        state, params=state.params | {"embedding": state.params["embedding"] * 1e6}
    )
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        pretrain.save(tmp_path, large, pretrain.Progress(step=4, stage_step=4))
        with pytest.raises(ValueError, match=r"embedding has NaN or infinite .* in float16"):
            export(RECIPE, tmp_path, tmp_path / "m", dtype="float16")
        with pytest.raises(ValueError, match="dtype is 'int8', expected one of bfloat16"):
            export(RECIPE, tmp_path, tmp_path / "m", dtype="int8")


def test_a_comparison_leaves_out_a_rate_that_diverges(folder, tmp_path):
    config = CompareConfig(
        model=str(folder / "model"), families=("word_problems",), arms=("gqa",), rows=60,
        problems=8, steps=8, batch_size=2, sequence_length=64, rates=(1e38, 1e-3), seeds=1,
        eval_every=1, eval_rows=8, paper_rate=1e38,
    )  # fmt: skip
    runs.write_data(config, tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        trainer = runs.trainer(config, tmp_path, "gqa")
        for job in search_jobs(config, "gqa"):
            trainer.run_once(job)
        held_out = runs.read_result(tmp_path, search_jobs(config, "gqa")[0])["held_out"]
        assert held_out[-1][1] is None and all(np.isfinite(loss) for _, loss in held_out[:-1])
        assert runs.best_rate(config, tmp_path, "gqa") == 1e-3
        reported = final_jobs(config, "gqa", 1e-3)[-1]
        assert reported.rate == 1e38
        with pytest.raises(ValueError, match=r"gqa, rate 1e\+38, seed 0: the loss is NaN"):
            trainer.run_once(reported)
    assert not (tmp_path / "runs" / f"{reported.name}.json").exists()
    alone = dataclasses.replace(config, rates=(1e38,))
    with pytest.raises(ValueError, match=r"gqa: the loss became NaN at every rate of \[1e\+38\]"):
        runs.best_rate(alone, tmp_path, "gqa")
