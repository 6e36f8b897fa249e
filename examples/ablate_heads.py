"""Does a model need the heads that head scores call important? Silences heads, counts answers.

python examples/ablate_heads.py [EXAMPLES [LENGTH]]
"""

import sys

import kvjax


def main(count: int = 32, length: int = 512) -> dict[str, list[float]]:
    """Asks the embedded model without some of its heads, with the full cache."""
    model, params = kvjax.load("builtin:needle", dtype="float32")
    scores = kvjax.headkv.default_scores(model.config)
    assert scores is not None  # this model has its own; others need `kvjax score`
    ranked = scores.ranked
    choices = {
        "none": [],
        "the 4 highest": ranked[:4],
        "the 4 lowest": ranked[-4:],
        "layer 0": [(0, head) for head in range(model.config.query_heads)],
    }
    tasks, words = ("needle", "two_hop"), kvjax.tasks.WordVocabulary()
    examples = [kvjax.tasks.make_examples(task, words, count, length=length) for task in tasks]
    found = {}
    print(f"heads silenced   {'  '.join(tasks)}")
    for name, heads in choices.items():
        fewer = kvjax.headkv.without_heads(params, heads)
        found[name] = [
            kvjax.tasks.accuracy(model, fewer, each, eos_id=model.config.eos_ids[0])
            for each in examples
        ]
        print(f"{name:15}  {found[name][0]:6.3f}  {found[name][1]:7.3f}")
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
