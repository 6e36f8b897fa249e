"""One static page of finished runs: `python -m eval report RUNS… --out report`."""
