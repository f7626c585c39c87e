"""`tarflowlm sample`: text from a trained model, in batches of bounded size."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tarflowlm.cli.arguments import SampleArgs
from tarflowlm.cli.interactive import converse
from tarflowlm.cli.models import load_checkpoint
from tarflowlm.cli.prompts import Wording, read_prompts
from tarflowlm.cli.signals import interrupt_on_termination
from tarflowlm.config import checked_seed
from tarflowlm.data import Tokenizer
from tarflowlm.device import pick_device, threads_for
from tarflowlm.errors import UserError
from tarflowlm.files import NewLines
from tarflowlm.generation import Generation, generate
from tarflowlm.generation.inversion import Decoders
from tarflowlm.generation.sampling import BLANK, row_generators
from tarflowlm.generation.streaming import Watch
from tarflowlm.generation.window import num_positions
from tarflowlm.language_model import LanguageModel
from tarflowlm.runs.released import chosen
from tarflowlm.terminal.bars import Stage
from tarflowlm.terminal.progress import Bars
from tarflowlm.terminal.streams import TextStream, first_stop, write_out
from tarflowlm.terminal.tables import json_line, print_json, print_notice
from tarflowlm.terminal.texts import print_samples, samples_to_json

BATCH_TOKENS = 6144
"""Tokens that are written at once, candidates counted: memory is bounded, and batches are large enough to be fast."""


def run_sample(args: SampleArgs) -> None:
    checkpoint = load_checkpoint(chosen(args.directory, args.model), pick_device(args.device))
    wording = Wording(checkpoint.tokenizer, args.normalize)
    if checkpoint.model.is_exact and (args.passes or args.states):
        flag = "passes" if args.passes else "states"
        raise UserError(f"--{flag}: this model is a baseline, which writes token by token, in one pass: leave it out")
    if args.interactive:
        converse(checkpoint.model, wording, args)
        return
    order = _ordered(args, wording, checkpoint.model.config.context)
    wording.say(partial(print_notice, Console(stderr=True)))
    with interrupt_on_termination(), nullcontext() if args.out is None else NewLines(args.out) as out:
        _Sampling(checkpoint.model, wording.tokenizer, args, order, out).run()


@dataclass(frozen=True)
class _Order:
    """What to write: `num` samples for each of the prompts, sample r for prompt r // num."""

    prompts: list[Tensor]
    """Tokens [tokens] of each; a single empty one for samples without a prompt."""
    texts: list[str]
    """The prompts, decoded."""
    template: Tensor | None
    stops: tuple[str, ...]
    length: int
    num: int

    @property
    def total(self) -> int:
        return self.num * len(self.prompts)

    def batches(self, size: int, context: int) -> Iterator[range]:
        """Consecutive samples, at most `size` at once; prompts that fill a window are not mixed with others."""
        fills = max(map(len, self.prompts)) >= context
        first = 0
        while first < self.total:
            end = min(first + size, (first // self.num + 1) * self.num if fills else self.total)
            yield range(first, end)
            first = end

    def of(self, rows: range) -> list[Tensor]:
        return [self.prompts[row // self.num] for row in rows]

    def text_of(self, row: int) -> str:
        return self.texts[row // self.num]


def _ordered(args: SampleArgs, wording: Wording, context: int) -> _Order:
    """UserError for what cannot be written, before anything is."""
    if args.num < 1:
        raise UserError(f"num {args.num}: must be at least 1")
    checked_seed(args.seed)
    template = None if args.template is None else wording.template(args.template, args.blank)
    length = args.length
    if length is None:
        length = context if template is None else len(template)
    prompts = [torch.zeros(0, dtype=torch.long)]
    if args.prompt is not None:
        prompts = [wording.prompt(args.prompt)]
    elif args.prompts is not None:
        prompts = []
        for number, text in read_prompts(args.prompts).items():
            try:
                prompts.append(wording.prompt(text))
                if len(prompts[-1]) >= length:
                    raise UserError(f"{len(prompts[-1])} tokens leave no room in {length}: raise --length")
            except UserError as error:
                raise UserError(f"line {number} of {args.prompts}: {error}") from None
    texts = [wording.tokenizer.decode(prompt) for prompt in prompts]
    stops = tuple(map(wording.stop, args.stop))
    return _Order(prompts, texts, template, stops, length, args.num)


class _Sampling:
    """Draws the samples of an order batch by batch, and puts out each batch as it is finished."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, args: SampleArgs, order: _Order, out: NewLines | None
    ) -> None:
        self.model, self.tokenizer, self.args, self.order, self.out = model, tokenizer, args, order, out
        self.decoder: Decoders = args.decoder
        self.objects: list[dict[str, Any]] = []
        self.sweeps: list[int] = []
        self.done = self.num_tokens = 0

    def run(self) -> None:
        """Write all samples; an interrupt keeps those that are finished, and says how many."""
        start, interrupt = time.perf_counter(), None
        try:
            self._write_all()
        except KeyboardInterrupt:
            where = f" and kept in {self.out.path}" if self.out is not None and self.done else ""
            interrupt = KeyboardInterrupt(f"{self.done} of {self.order.total} samples are finished{where}")
        if self.args.json:
            seconds = time.perf_counter() - start
            result: dict[str, Any] = {"samples": self.objects}
            if self.out is not None:
                result = {"out": str(self.out.path), "written": self.done}
            result |= {"sweeps": self.sweeps, "decoders": [] if isinstance(self.decoder, str) else self.decoder}
            result |= {"seconds": seconds, "tokens_per_second": self.num_tokens / seconds}
            print_json(result | ({"interrupted": True} if interrupt else {}))
        elif self.out is not None and interrupt is None:
            print_notice(Console(), f"{self.done} samples are in {self.out.path}")
        if interrupt is not None:
            raise interrupt

    def _write_all(self) -> None:
        args, order, context = self.args, self.order, self.model.config.context
        rows_at_once = BATCH_TOKENS // max(min(order.length, context) * args.particles, 1)
        size = 1 if args.stream else max(rows_at_once, 1)
        batches = list(order.batches(size, context))
        total = sum(num_positions(self.model, order.length, min(map(len, order.of(rows)))) for rows in batches)
        bars = Bars(Console(stderr=True))
        progress = Stage(bars.show, "sampling, positions", total)
        try:
            for rows in batches:
                if args.stream:
                    self._put(rows, *self._streamed(rows))
                    continue
                result = self._drawn(rows, Watch(progress, self._stopping(rows)))
                # rich would take what is printed below a running bar to stderr
                bars.close()
                self._put(rows, result, self._texts(rows, result))
        finally:
            bars.close()

    def _drawn(self, rows: range, watch: Watch) -> Generation:
        args, order = self.args, self.order
        prompt = order.template
        if prompt is None:
            prompt = pad_sequence(order.of(rows), batch_first=True, padding_value=BLANK)
        with threads_for(len(rows) * args.particles):
            result = generate(
                self.model,
                num_tokens=order.length,
                num=len(rows),
                prompt=prompt,
                # rows are numbered over all batches, so that a sample does not depend on their size
                generator=row_generators(rows, torch.Generator().manual_seed(args.seed)),
                decoder=self.decoder,
                watch=watch,
                **args.writing(),
            )
        self.num_tokens += result.tokens.numel()
        # what auto chose for the first batch serves the others
        self.decoder = result.decoders or self.decoder
        self.sweeps = [a + b for a, b in zip_longest(self.sweeps, result.sweeps, fillvalue=0)]
        return result

    def _stopping(self, rows: range) -> Callable[[Tensor], bool] | None:
        """Whether all texts of a batch contain a stop by now, given the tokens as they become final."""
        parts = list[Tensor]()

        def have_stopped(tokens: Tensor) -> bool:
            parts.append(tokens)
            texts = [self.tokenizer.decode(row.tolist()) for row in torch.cat(parts, 1)]
            return all(self._end(row, text) < len(text) for row, text in zip(rows, texts, strict=True))

        return have_stopped if self.order.stops else None

    def _end(self, row: int, text: str) -> int:
        """Where the sample with this text ends."""
        return first_stop(text, self.order.stops, len(self.order.text_of(row)))

    def _texts(self, rows: range, result: Generation) -> list[str]:
        texts = [self.tokenizer.decode(tokens.tolist()) for tokens in result.tokens]
        return [text[: self._end(row, text)] for row, text in zip(rows, texts, strict=True)]

    def _streamed(self, rows: range) -> tuple[Generation, list[str]]:
        """The sample of one row, which is shown meanwhile."""
        (row,) = rows
        title = "" if self.order.total == 1 else f"sample {row + 1}\n" if row == 0 else f"\nsample {row + 1}\n"
        stream = TextStream(write_out, self.tokenizer, self.order.stops, start=len(self.order.text_of(row)))

        def on_tokens(tokens: Tensor) -> bool:
            nonlocal title
            write_out(title)
            title = ""
            stream.add(tokens[0])
            return stream.has_stopped

        try:
            result = self._drawn(rows, Watch(on_tokens=on_tokens))
        except KeyboardInterrupt:
            write_out("\n")
            raise
        stream.close()
        write_out("\n")
        texts = self._texts(rows, result)
        if texts != [stream.text]:
            print_notice(Console(stderr=True), "the last check has changed the text, which is now:")
            write_out(f"{texts[0]}\n")
        return result, texts

    def _put(self, rows: range, result: Generation, texts: Sequence[str]) -> None:
        """Print, write or keep the samples of a batch."""
        args, order = self.args, self.order
        samples = samples_to_json(result, self.tokenizer, texts=texts, states=args.states)
        given = {} if args.template is None else {"template": args.template}
        prompts = [{"prompt": order.text_of(row)} if order.text_of(row) else given for row in rows]
        objects = [prompt | sample for prompt, sample in zip(prompts, samples, strict=True)]
        if self.out is not None:
            numbered = [{"index": row, "seed": args.seed} | s for row, s in zip(rows, objects, strict=True)]
            self.out.write("".join(map(json_line, numbered)))
        elif args.json:
            self.objects += objects
        elif not args.stream:
            print_samples(Console(), result, self.tokenizer, texts=texts, first=rows.start, candidates=args.particles)
        self.done += len(rows)
