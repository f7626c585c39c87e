"""What a command chooses for its whole process, and an import does not."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from tarflowlm.cli.environment import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed_memory()
torch.zeros(2**21)
before = faults()
for _ in range(20):
    torch.zeros(2**21)
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone gives memory back this eagerly")
@pytest.mark.parametrize(
    "chosen", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}], ids=["ours", "the user's"]
)
def test_freed_memory_is_kept_for_what_comes_next(chosen):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=inherited | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(found.stdout) < 4096) is not bool(chosen)  # 20 blocks of 8 MiB are 40,960 pages


HELD = """
import torch, tarflowlm
from tarflowlm.cli.main import main

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def left():
    before = held()
    some = [torch.zeros(2**20) for _ in range(50)]
    del some
    return held() - before

{work}
print(left())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone gives memory back this eagerly")
@pytest.mark.parametrize(
    ("work", "is_kept"),
    [
        ("tarflowlm.load('english-mini').write(length=8)", False),
        ("tarflowlm.load('english-mini').evaluate('the old king\\n')", False),
        ("main(['sample', 'english-mini', '--length', '8', '--json'])", True),
    ],
    ids=["write", "evaluate", "command"],
)
def test_only_a_command_keeps_what_its_process_frees(work, is_kept):
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    argv = [sys.executable, "-c", HELD.format(work=work)]
    found = subprocess.run(argv, env=inherited, capture_output=True, text=True, check=True)
    # 50 blocks of 4 MiB
    assert (int(found.stdout.split()[-1]) > 100 * 2**20) is is_kept


@pytest.mark.slow
def test_importing_the_package_leaves_warnings_as_they_are():
    code = (
        "import warnings, torch.distributed.checkpoint\nbefore = [*warnings.filters]\n"
        "import tarflowlm.training.checkpoint, tarflowlm.cli.main\n"
        "assert warnings.filters == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
