"""Preparing a corpus: speed relative to the `tokenizers` library alone, peak memory, and the loader's cost."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from rich.console import Console

from tarflowlm.bench import train as bench_train
from tarflowlm.bench.arguments import DataArgs, TrainArgs
from tarflowlm.bench.measure import high_water_mark
from tarflowlm.data import (
    BPETokenizer,
    TokenizerConfig,
    WindowSampler,
    build_tokenizer,
    load_tokenizer,
    open_corpus,
    prepare_corpus,
)
from tarflowlm.data.sources import resolve_source
from tarflowlm.data.text import text_blocks, text_pieces
from tarflowlm.runs.presets import preset
from tarflowlm.terminal.bars import StageProgress, no_progress
from tarflowlm.terminal.tables import print_table

VOCAB_SIZE = 16_384
LOADER_BATCHES = 2000


def run(args: DataArgs, progress: StageProgress = no_progress) -> dict[str, Any]:
    """{"mb_per_second", "library_mb_per_second", "ratio", "memory": [{"mb", "peak_mb", "mb_per_second"}],
    "loader_share", ...}.

    Speeds are medians over rounds, in 10^6 bytes per second; the ratio is the median of the ratios of each round, and
    above 1 means faster than the library. Peak memory is that of fresh processes, including all they import.
    """
    sizes = {"small": args.small_mb, "large": args.large_mb, "speed": args.speed_mb}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, (label, size) in enumerate(sizes.items()):
            progress("texts", i, len(sizes))
            _write_text(args.text, folder / f"{label}.txt", size * 10**6)
        progress("tokenizer", 0, 1)
        tokenizer = _bpe(args.tokenizer, folder / "small.txt")
        tokenizer.save(folder / "tokenizer.json")
        ours, alone = _speeds(tokenizer, folder, args.rounds, progress)
        memory = []
        for i, label in enumerate(("small", "large")):
            progress("peak memory, texts", i, 2)
            found = _in_fresh_process(folder / f"{label}.txt", folder / "tokenizer.json", folder / label)
            memory.append({"mb": sizes[label]} | found)
        loader = _seconds_per_batch(folder / "large", args.preset)
    step = bench_train.run(
        TrainArgs(presets=(args.preset,), rounds=3, vocab_size=27, memory=False, scaling=False), progress
    )
    milliseconds = step["rows"][0]["milliseconds"]
    return {
        "mb_per_second": args.speed_mb / statistics.median(ours),
        "library_mb_per_second": args.speed_mb / statistics.median(alone),
        "ratio": statistics.median(b / a for a, b in zip(ours, alone, strict=True)),
        "memory": memory,
        "loader_milliseconds": 1000 * loader,
        "step_milliseconds": milliseconds,
        "loader_share": 1000 * loader / milliseconds,
        "preset": args.preset,
        "tokenizers": tokenizers.__version__,
    }


def _write_text(text: Path | None, path: Path, size: int) -> None:
    """Write the text repeatedly, up to `size` bytes; at most 3 bytes fewer, so as not to cut a character."""
    with path.open("wb") as file:
        room = size
        while room:
            before = room
            for block in _blocks(text):
                # without a cut character at the end
                data = block.encode("utf-8")[:room].decode("utf-8", errors="ignore").encode("utf-8")
                file.write(data)
                room -= len(data)
                if room < 4:
                    return
            assert room < before


def _blocks(text: Path | None) -> Iterator[str]:
    if text is not None:
        yield from text_blocks(text)
        return
    for batch in resolve_source("english").stream("none").batches:
        yield from batch.texts


def _bpe(source: str, text: Path) -> BPETokenizer:
    if source:
        config = TokenizerConfig(kind="bpe", source=source, normalize="none")
    else:
        config = TokenizerConfig(kind="bpe", vocab_size=VOCAB_SIZE, normalize="none")
    built = build_tokenizer(config, text_blocks(text))
    assert isinstance(built, BPETokenizer)
    return built


def _speeds(
    tokenizer: BPETokenizer, folder: Path, rounds: int, progress: StageProgress
) -> tuple[list[float], list[float]]:
    """Seconds of preparing a text, and of the library encoding it from memory, in every round."""
    # lines, as a user of the library would pass them, and pieces, as we do: the faster counts
    text = (folder / "speed.txt").read_text(encoding="utf-8")
    cuts = [text.splitlines(keepends=True), list(text_pieces(text, 1 << 15))]
    ours, alone = [], []
    for i in range(rounds):
        progress("preparing a text, rounds", i, rounds)
        start = time.perf_counter()
        prepare_corpus(str(folder / "speed.txt"), tokenizer, folder / f"round{i}")
        ours.append(time.perf_counter() - start)
        alone.append(min(_library_seconds(tokenizer, texts) for texts in cuts))
    return ours, alone


def _library_seconds(tokenizer: BPETokenizer, texts: list[str], batch: int = 1 << 20) -> float:
    """Seconds of `encode_batch_fast` on all `texts`, in batches of a megabyte, including reading the ids."""
    per_batch = max(1, batch * len(texts) // max(1, sum(map(len, texts))))
    start = time.perf_counter()
    for i in range(0, len(texts), per_batch):
        for encoding in tokenizer.library.encode_batch_fast(texts[i : i + per_batch], add_special_tokens=False):
            encoding.ids  # noqa: B018
    return time.perf_counter() - start


def _in_fresh_process(text: Path, tokenizer: Path, out: Path) -> dict[str, float]:
    code = f"from {__name__} import prepare_and_measure; prepare_and_measure()"
    command = [sys.executable, "-c", code, str(text), str(tokenizer), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def prepare_and_measure() -> None:
    """Entry point of a fresh process: prepare the text argv[1] with the tokenizer argv[2] in argv[3]; print JSON."""
    text, tokenizer, out = sys.argv[1:]
    start = time.perf_counter()
    prepare_corpus(text, load_tokenizer(tokenizer), out)
    seconds = time.perf_counter() - start
    megabytes = Path(text).stat().st_size / 1e6
    sys.stdout.write(json.dumps({"peak_mb": 1000 * high_water_mark(), "mb_per_second": megabytes / seconds}))


def _seconds_per_batch(corpus: Path, name: str) -> float:
    """Seconds per batch of the sampler, at the sizes of a preset."""
    run_config = preset(name)
    tokens = open_corpus(corpus).split("train")
    sampler = WindowSampler(tokens, window=run_config.model.context, batch=run_config.train.batch_size, seed=0)
    start = time.perf_counter()
    for _ in range(LOADER_BATCHES):
        sampler.next()
    return (time.perf_counter() - start) / LOADER_BATCHES


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print what `run` returned as a table."""
    small, large = result["memory"]
    rows = [
        ("text to shards", f"{result['mb_per_second']:.2f} MB/s"),
        ("the library alone", f"{result['library_mb_per_second']:.2f} MB/s (tokenizers {result['tokenizers']})"),
        ("ratio", f"{result['ratio']:.3f}"),
        (f"peak memory, {small['mb']} MB", f"{small['peak_mb']:.0f} MB"),
        (f"peak memory, {large['mb']} MB", f"{large['peak_mb']:.0f} MB at {large['mb_per_second']:.2f} MB/s"),
        ("a batch of windows", f"{result['loader_milliseconds']:.3f} ms"),
        (
            f"a step of {result['preset']}",
            f"{result['step_milliseconds']:.0f} ms: the loader takes {result['loader_share']:.2%} of it",
        ),
    ]
    print_table(console, "preparing a corpus", rows)
