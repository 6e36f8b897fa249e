"""Published files load whole."""

import pytest

import kvjax
from train.data import DataConfig, SourceConfig, make_loader, summary

pytestmark = pytest.mark.data

FILES = {
    "gsm8k": ("gsm8k/train.jsonl.gz", 7473),
    "gsm8k_backward": ("metamath/GSM8K_Backward.jsonl.gz", 1270),
    "mbpp": ("mbpp/mbpp.jsonl.gz", 974),
    "text": ("text/tinystories.txt.gz", 5000),
}


@pytest.fixture(scope="module")
def tokenizer(data_dir):
    return kvjax.load_tokenizer(data_dir / "checkpoints" / "stories260k")


@pytest.mark.parametrize("form", FILES)
def test_loads_whole(data_dir, tokenizer, form):
    name, rows = FILES[form]
    source = SourceConfig(str(data_dir / name), form)
    data = DataConfig((source,), sequence_length=4096, batch_size=4, epochs=1)
    found = summary(data, tokenizer)
    assert found.dropped == 0
    if form != "text":
        assert found.rows == rows
    assert 0.3 < found.learned_tokens / found.tokens < 1
    batch = next(iter(make_loader(data, tokenizer)))
    assert (batch["segment_ids"] > 0).mean() > 0.9
    here = (batch["segment_ids"][0] == 1) & (batch["weights"][0] > 0)
    answer = tokenizer.decode(batch["targets"][0][here], skip_special_tokens=True)
    prompt = tokenizer.decode(batch["tokens"][0][batch["segment_ids"][0] == 1])
    if form in ("gsm8k", "gsm8k_backward"):
        assert "\n#### " in answer and "\nThe answer is: " in answer and "<<" not in answer
        assert "### Response: Let's think step by step." in prompt
    if form == "mbpp":
        assert answer.strip().startswith("```python\n") and answer.endswith("\n```")
        assert "### Instruction\n" in prompt and "### Response\n" in prompt


def test_a_mixture(data_dir, tokenizer):
    """The stand-ins for MetaMathQA and Self-OSS-Instruct, half of the documents from each."""
    sources = tuple(
        SourceConfig(str(data_dir / FILES[form][0]), form) for form in ("gsm8k", "mbpp")
    )
    data = DataConfig(sources, sequence_length=2048, batch_size=8, epochs=0.1, max_rows=500)
    batches = list(make_loader(data, tokenizer))
    assert len(batches) == summary(data, tokenizer).batches > 0
