"""Code that two processes run together, over gloo."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEFORE = """
import sys, torch, torch.distributed as dist

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
"""
AFTER = """
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def run_in_two(script, folder):
    """Run a script in two processes, which know their `rank`; both have to come to its end."""
    code = BEFORE + textwrap.dedent(script) + AFTER
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "".join(errors[-2000:] for _, errors in results)
    assert all(out.strip().endswith("done") for out, _ in results)
