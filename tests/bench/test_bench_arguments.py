"""What cannot be measured is refused before anything is imported or timed."""

from pathlib import Path

import pytest

from tarflowlm.bench.arguments import BENCHMARKS
from tarflowlm.errors import UserError

GIVEN = {name: {"directories": (Path("run"),)} for name in ("evaluation", "generation", "infilling")}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("data", {"rounds": 0}, "rounds 0: must be at least 1"),
        ("data", {"small_mb": -1}, "small-mb -1"),
        ("data", {"preset": "mini-arr"}, "preset 'mini-arr' is unknown"),
        ("numerics", {"accuracy_rows": -5}, "accuracy-rows -5: must be at least 2"),
        ("numerics", {"components": (2, 0)}, "components 0"),
        ("numerics", {"components": ()}, "components: name at least one"),
        ("numerics", {"threads": 0}, "threads 0"),
        ("numerics", {"seed": -1}, "seed -1"),
        ("train", {"presets": ()}, "presets: name at least one"),
        ("train", {"scaling_presets": ("mini-arr",)}, "preset 'mini-arr' is unknown"),
        ("train", {"threads": -2}, "threads -2"),
        ("train", {"peak_tflops": float("nan")}, "peak-tflops nan: must be above 0"),
        ("sizes", {"utilisation": 1.5}, r"utilisation 1\.5"),
        ("sizes", {"memory": float("inf")}, "memory inf"),
        ("generation", {"batches": (0,)}, "batches 0"),
        ("generation", {"length": 0}, "length 0"),
        ("generation", {"directories": ()}, "directories: name at least one"),
        ("evaluation", {"windows": 0}, "windows 0"),
        ("infilling", {"blanks": 64}, "blanks 64"),
        ("infilling", {"particles": (0,)}, "particles 0"),
    ],
)
def test_numbers_out_of_range_are_named(name, options, words):
    with pytest.raises(UserError, match=words):
        BENCHMARKS[name](**(GIVEN.get(name, {}) | options))
