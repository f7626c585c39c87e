"""Take over token shards as llm.c writes them, for `tarflowlm train --data OUT`.

python examples/token_shards.py FOLDER --out OUT [--tokenizer gpt2]

A shard is a header of 256 int32 (20240520, 1, the number of tokens) and tokens of uint16. Shards
with "val" in their names become the validation and the test split, half each.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tarflowlm.data import Corpus, Tokenizer, TokenizerConfig, build_tokenizer, open_corpus
from tarflowlm.data.corpus import META, VERSION, Meta, SplitMeta
from tarflowlm.data.splits import SPLITS, Split
from tarflowlm.data.windows import Array
from tarflowlm.errors import UserError
from tarflowlm.files import new_folder, write_json

MAGIC = 20240520
HEADER = 1024
AT_ONCE = 1 << 24
"""Tokens that are read at once."""


def read_shard(path: Path) -> Array:
    """The tokens of a shard, memory-mapped. UserError for another file, or a part of one."""
    size = (path.stat().st_size - HEADER) // 2
    if np.fromfile(path, "<i4", count=3).tolist() != [MAGIC, 1, size]:
        raise UserError(f"{path} is not a whole token shard of llm.c: get it again")
    return np.memmap(path, "<u2", "r", offset=HEADER)


def write_split(shards: Sequence[Array], path: Path, tokenizer: Tokenizer) -> SplitMeta:
    """Copy the tokens of a split. UserError for one that the tokenizer does not have."""
    digest = hashlib.sha256()
    counts = np.zeros(1 << 16, dtype=np.int64)
    with path.open("wb") as file:
        for tokens in shards:
            for start in range(0, len(tokens), AT_ONCE):
                some = tokens[start : start + AT_ONCE]
                counts += np.bincount(some, minlength=1 << 16)
                known = some.astype(tokenizer.token_dtype)
                known.tofile(file)
                digest.update(known.tobytes())
    last = int(counts.nonzero()[0].max(initial=0))
    if last >= tokenizer.vocab_size:
        what = f"{path.stem} has token {last}, and the tokenizer has {tokenizer.vocab_size} symbols"
        raise UserError(f"{what}: give the --tokenizer that made the shards")
    characters = counts[: tokenizer.vocab_size] @ tokenizer.characters_per_token
    return {
        "tokens": int(counts.sum()),
        "characters": int(characters),
        "sha256": digest.hexdigest(),
    }


def take_over(folder: Path, out: Path, tokenizer: str) -> Corpus:
    """The corpus of all shards in a folder; `out` appears complete or not at all."""
    config = TokenizerConfig(kind="bpe", source=tokenizer, normalize="none")
    reader = build_tokenizer(config)
    shards: dict[Split, list[Array]] = {split: [] for split in SPLITS}
    files = sorted(folder.glob("*.bin"))
    for file in files:
        tokens = read_shard(file)
        middle = len(tokens) // 2
        if "val" in file.name:
            shards["valid"].append(tokens[:middle])
            shards["test"].append(tokens[middle:])
        else:
            shards["train"].append(tokens)
    missing = [split for split in SPLITS if not shards[split]]
    if missing:
        raise UserError(
            f"{folder} gives no {missing[0]} split: put *train*.bin and *val*.bin there"
        )
    with new_folder(out) as partial:
        reader.save(partial)
        meta: Meta = {
            "source": str(folder),
            "plan": [VERSION, str(folder), [file.name for file in files], reader.fingerprint],
            "tokenizer": reader.fingerprint,
            "tokenizer_config": asdict(config),
            "splits": {s: write_split(shards[s], partial / f"{s}.bin", reader) for s in SPLITS},
        }
        write_json(partial / META, meta)
    return open_corpus(out)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--tokenizer", default="gpt2", help="a tokenizer.json or a hub name")
    args = options.parse_args()
    found = take_over(args.folder, args.out, args.tokenizer)
    print({split: found.num_tokens(split) for split in SPLITS})
