"""Memory that is freed and wanted again."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FAULTS = """
import resource, torch
from tarflowlm.device import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
torch.zeros(2**21)
before = faults()
for _ in range(20):
    torch.zeros(2**21)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone gives memory back this eagerly")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}], ids=["ours", "the user's"])
def test_freed_memory_is_kept_for_what_comes_next(chosen):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], env=inherited | chosen, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) < 4096) is not bool(chosen)  # 20 blocks of 8 MiB are 40,960 pages
