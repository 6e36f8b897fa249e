"""The table of `benchmarks.needles` counts right answers and names no folder of the machine."""

import dataclasses
import json

from benchmarks.needles import collected, page
from eval.predictions import PREDICTIONS, RESULTS, Prediction


def test_a_run_becomes_a_row(tmp_path):
    model, book = tmp_path / "models" / "small", tmp_path / "book.txt"
    policy = f"headkv:kv_size=8,scores={tmp_path}/heads.json"
    lines = [
        Prediction(f"q{i}", f"{n}/0.00", policy, n, False, "x", score, 10, 100)
        for i, (n, score) in enumerate([(1024, 1.0), (1024, 0.5), (512, 0.0)])
    ]
    text = "".join(json.dumps(dataclasses.asdict(line)) + "\n" for line in lines)
    (tmp_path / PREDICTIONS).write_text(text)
    row = {"policy": policy, "all": {"score": 0.5, "standard_error": 0.3}}
    row |= {"cache_bytes": 10, "full_cache_bytes": 100}
    command = f"python -m eval needle --model {model} --set haystack={book} --out {tmp_path}"
    report = dict.fromkeys(("metric", "items", "seconds", "date", "device", "versions"), 1)
    report |= {"task": "needle", "protocol": "generate", "prompt": "chat", "commit": "abc"}
    report |= {"model": str(model), "policies": [row], "command": command}
    (tmp_path / RESULTS).write_text(json.dumps(report))
    assert collected(tmp_path, {})["model"] == "small"
    found = collected(tmp_path, {"small": "Small-1B"})
    assert str(tmp_path.parent) not in json.dumps(found) and found["model"] == "Small-1B"
    assert "--model small --set haystack=book.txt --out" in found["command"]
    assert found["policies"][0]["right"] == {"512": "0 of 1", "1024": "1.5 of 2"}
    cells = ["Small-1B", "needle, haystack=book.txt", "chat", "generate", "abc"]
    cells += ["headkv:kv_size=8,scores=heads.json", "10.0%", "512: 0 of 1, 1024: 1.5 of 2"]
    lines = page([found], ["A note."])
    assert lines[-1] == f"| {' | '.join(cells)} |" and "A note." in lines
