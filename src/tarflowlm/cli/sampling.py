"""Samples for `tarflowlm sample`: drawn batch by batch, each printed or written as it is
finished.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm.cli.options import read_source
from tarflowlm.cli.sample import Args
from tarflowlm.data import Tokenizer
from tarflowlm.data.prompts import BLANK, Reading, read, read_template
from tarflowlm.errors import UserError
from tarflowlm.files import NewLines
from tarflowlm.generation import Generation, generate, generate_steps
from tarflowlm.generation.sampling import row_generators
from tarflowlm.generation.writing import num_positions
from tarflowlm.language_model import LanguageModel
from tarflowlm.terminal.bars import Bars, json_line, print_json, print_notice
from tarflowlm.terminal.texts import (
    TextStream,
    first_stop,
    print_samples,
    samples_to_json,
    write_out,
)

# written at once, candidates counted: memory is bounded, and batches are large enough to be fast
BATCH_TOKENS = 6144


class Sampling:
    """Prints or writes samples batch by batch, as they are drawn. Sample r continues prompt r //
    num where given.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, args: Args) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.context = model.config.context
        self.length = self.context if args.length is None else args.length
        self.given = self._read_given()
        if args.template is not None and args.length is None:
            self.length = len(self.given[0].tokens)
        exact = model.config.has_token_weights or (
            args.template is None and model.config.continues_exactly
        )
        if self.given and args.particles == 1 and not exact:
            print_notice(
                "this model follows given text loosely: --particles 64 weighs that many candidates by it"
            )
        if (args.passes or args.states) and (model.is_exact or self.length > self.context):
            what = "this is a baseline" if model.is_exact else f"length {self.length} is more"
            flag = "passes" if args.passes else "states"
            raise UserError(
                f"--{flag} needs a flow, and at most its context of {self.context} tokens: {what}"
            )
        self.stops = tuple(self._read(stop, "stop").text for stop in args.stop)
        for notice in dict.fromkeys(
            reading.notice for reading in self.given if reading.notice is not None
        ):
            print_notice(notice)
        self.total = args.num * max(len(self.given), 1)
        self.decoder: Any = args.decoder
        self.objects: list[dict[str, Any]] = []
        self.sweeps: list[int] = []
        self.done = self.num_tokens = 0

    def _read(self, text: str, name: str) -> Reading:
        return read(
            self.tokenizer, text, name=name, normalize=self.args.normalize, goes_on=name == "prompt"
        )

    def _read_given(self) -> list[Reading]:
        """The prompts, or the template; nothing for free samples."""
        args = self.args
        if args.template is not None:
            return [
                read_template(self.tokenizer, args.template, args.blank, normalize=args.normalize)
            ]
        if args.prompts is None:
            return [] if args.prompt is None else [self._read(args.prompt, "prompt")]
        readings = []
        for number, line in enumerate(read_source(args.prompts).split("\n"), 1):
            try:
                if line.strip():
                    readings.append(self._read(line.removesuffix("\r"), "prompt"))
                    if (count := len(readings[-1].tokens)) >= self.length:
                        raise UserError(
                            f"{count} tokens leave no room in {self.length}: raise --length"
                        )
            except UserError as error:
                error.args = (f"line {number} of {args.prompts}: {error}",)
                raise
        if not readings:
            raise UserError(f"prompts {args.prompts}: holds no prompt; write one per line")
        return readings

    def run(self, out: NewLines | None) -> None:
        """Write all samples. An interrupt keeps those that are finished, and tells their number."""
        start, interrupt = time.perf_counter(), None
        try:
            self._write_all(out)
        except KeyboardInterrupt:
            where = f" and kept in {out.path}" if out is not None and self.done else ""
            interrupt = KeyboardInterrupt(
                f"{self.done} of {self.total} samples are finished{where}"
            )
        if self.args.json:
            seconds = time.perf_counter() - start
            result: dict[str, Any] = {"samples": self.objects}
            if out is not None:
                result = {"out": str(out.path), "written": self.done}
            result |= {
                "sweeps": self.sweeps,
                "decoders": [] if isinstance(self.decoder, str) else self.decoder,
            }
            result |= {"seconds": seconds, "tokens_per_second": self.num_tokens / seconds}
            print_json(result | ({"interrupted": True} if interrupt else {}))
        elif out is not None and interrupt is None:
            sys.stdout.write(
                f"{self.done} sample{'s are' if self.done != 1 else ' is'} in {out.path}\n"
            )
        if interrupt is not None:
            raise interrupt

    def _write_all(self, out: NewLines | None) -> None:
        args = self.args
        batches = list(self._batches())
        ticks = sum(
            num_positions(self.model, self.length, max(map(len, self._prompts(rows))))
            for rows in batches
        )
        with Bars("sampling, positions", ticks) as bars:
            for rows in batches:
                if args.stream:
                    result, texts = self._stream(rows)
                else:
                    result = generate(**self._asked(rows), progress=bars)
                    self._count(result)
                    decoded = map(self.tokenizer.decode, result.tokens.tolist())
                    texts = [self._cut(row, text) for row, text in zip(rows, decoded, strict=True)]
                    # rich would print below a running bar, on stderr
                    bars.close()
                self._put(rows, result, texts, out)

    def _batches(self) -> Iterator[range]:
        """Consecutive samples; prompts that fill a window are not mixed with others."""
        num, length = self.args.num, min(self.length, self.context)
        size = (
            1 if self.args.stream else max(BATCH_TOKENS // max(length * self.args.particles, 1), 1)
        )
        fills = max((len(reading.tokens) for reading in self.given), default=0) >= self.context
        first = 0
        while first < self.total:
            end = min(first + size, (first // num + 1) * num if fills else self.total)
            yield range(first, end)
            first = end

    def _prompts(self, rows: range) -> list[Tensor]:
        if not self.given:
            return [torch.zeros(0, dtype=torch.long)]
        return [self.given[row // self.args.num].tokens for row in rows]

    def _asked(self, rows: range) -> dict[str, Any]:
        args = self.args
        prompt = pad_sequence(self._prompts(rows), batch_first=True, padding_value=BLANK)
        # streams of rows numbered over all batches, so that a sample does not depend on the batches
        generator = row_generators(rows, torch.Generator().manual_seed(args.seed))
        return {
            "model": self.model,
            "num_tokens": self.length,
            "num": len(rows),
            "prompt": prompt,
            "generator": generator,
            "decoder": self.decoder,
            **args.writing(),
        }

    def _count(self, result: Generation) -> None:
        self.num_tokens += result.tokens.numel()
        # the choice of auto for the first batch serves the others
        self.decoder = result.decoders or self.decoder
        self.sweeps = [a + b for a, b in zip_longest(self.sweeps, result.sweeps, fillvalue=0)]

    def _start(self, row: int) -> int:
        """Characters of the prompt of a sample."""
        given = self.given[row // self.args.num].tokens.tolist() if self.given else []
        return len(self.tokenizer.decode(given)) if self.args.template is None else 0

    def _cut(self, row: int, text: str) -> str:
        """The text of a sample up to the first stop after its prompt."""
        return text[: first_stop(text, self.stops, self._start(row))]

    def _stream(self, rows: range) -> tuple[Generation, list[str]]:
        """The sample of one row, shown while it is written."""
        (row,) = rows
        if self.total > 1:
            write_out(f"sample {row + 1}\n" if row == 0 else f"\nsample {row + 1}\n")
        stream = TextStream(write_out, self.tokenizer, self.stops, start=self._start(row))

        parts = list[Tensor]()
        try:
            for tokens in generate_steps(**self._asked(rows)):
                parts.append(tokens)
                stream.add(tokens[0])
                if stream.has_stopped:
                    break
        except KeyboardInterrupt:
            write_out("\n")
            raise
        text = stream.close()
        write_out("\n")
        result = Generation(torch.cat(parts, 1))
        self._count(result)
        return result, [text]

    def _put(
        self, rows: range, result: Generation, texts: Sequence[str], out: NewLines | None
    ) -> None:
        """Print, write or keep the samples of a batch."""
        args = self.args
        if out is not None or args.json:
            objects = samples_to_json(
                result, self.tokenizer, texts=texts, passes=args.passes, states=args.states
            )
            if args.template is not None:
                objects = [{"template": args.template} | sample for sample in objects]
            elif self.given:
                prompts = (self.tokenizer.decode(prompt.tolist()) for prompt in self._prompts(rows))
                objects = [
                    {"prompt": text} | sample for text, sample in zip(prompts, objects, strict=True)
                ]
            if out is None:
                self.objects += objects
            else:
                numbered = zip(rows, objects, strict=True)
                out.write(
                    "".join(
                        json_line({"index": row, "seed": args.seed} | one) for row, one in numbered
                    )
                )
        elif not args.stream:
            options: Any = {
                "texts": texts,
                "first": rows.start,
                "candidates": args.particles,
                "passes": args.passes,
            }
            about = "" if args.temperature == 1.0 else f", temperature {args.temperature:g}"
            print_samples(Console(), result, self.tokenizer, about=about, **options)
        self.done += len(rows)
