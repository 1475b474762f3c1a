"""Does `clado plan --probe` predict what a run takes? Runs both, writes ETA.md. python -m tests.benchmarks.bench_eta"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clado.records.text import markdown_table
from tests.benchmarks.bench_measure import machine

HERE = Path(__file__).parent
PHASES = {"preparing": ("preparing",), "measuring": ("measuring",), "evaluation": ("evaluation",)}


def clado(*arguments: str) -> str:
    """What a command prints."""
    result = subprocess.run([Path(sys.executable).with_name("clado"), *arguments], check=True, capture_output=True, text=True)
    return result.stdout


def main() -> None:
    """Probes, runs, compares."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"folder={folder}/run"
        text = clado("plan", "demo.yaml", "--probe", run)
        begin = time.perf_counter()
        clado("run", "demo.yaml", run)
        took = time.perf_counter() - begin
        seconds = json.loads((Path(folder) / "run" / "record.json").read_text())["seconds"]
    expected = {name: float(re.search(rf"{name} (\d+)", text)[1]) for name in PHASES}  # type: ignore[index]
    around = float(re.search(r"shutdown (\d+)", text)[1])  # type: ignore[index]
    total = float(re.search(r"about (\d+) s", text)[1])  # type: ignore[index]
    rows = [[name, f"{expected[name]:.0f}", f"{seconds[name]:.0f}", f"{expected[name] / seconds[name]:.2f}"] for name in PHASES]
    rest = took - sum(seconds[name] for name in PHASES)
    rows.append(["all around", f"{around:.0f}", f"{rest:.0f}", f"{around / rest:.2f}"])
    rows.append(["**run**", f"{total:.0f}", f"{took:.0f}", f"**{total / took:.2f}** (goal 0.75 to 1.25)"])
    page = (
        "# `clado plan --probe` against the run\n\nWritten by `python -m tests.benchmarks.bench_eta`: the demo, seconds.\n\n"
        f"Machine: {machine()}.\n\n" + markdown_table(["phase", "predicted", "took", "predicted ÷ took"], rows) + "\n"
    )
    (HERE / "ETA.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
