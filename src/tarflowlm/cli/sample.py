"""`tarflowlm sample`: text from a trained model."""

import time

import torch
from rich.console import Console

from tarflowlm.cli.arguments import SampleArgs
from tarflowlm.cli.models import load_checkpoint
from tarflowlm.data import Tokenizer
from tarflowlm.device import pick_device, threads_for
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.generation.sampling import encode_template
from tarflowlm.runs.config import checked_seed
from tarflowlm.runs.released import chosen
from tarflowlm.terminal.bars import sampling_bar
from tarflowlm.terminal.tables import print_json
from tarflowlm.terminal.texts import print_samples, samples_to_json


def run_sample(args: SampleArgs) -> None:
    checkpoint = load_checkpoint(chosen(args.directory, args.model), pick_device(args.device))
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    prompt = None if args.prompt is None else _encoded(tokenizer, args.prompt, normalize=args.normalize is not None)
    template = None if args.template is None else encode_template(tokenizer, args.template, args.blank)
    length = args.length
    if length is None:
        length = checkpoint.run.model.context if template is None else max(len(template), 1)
    start = time.perf_counter()
    bar = sampling_bar(Console(stderr=True), checkpoint.model, max(length, 1), 0 if prompt is None else len(prompt))
    with threads_for(args.num * args.particles), bar as tick:
        result = generate(
            checkpoint.model,
            num_tokens=length,
            num=args.num,
            prompt=prompt,
            template=template,
            particles=args.particles,
            generator=torch.Generator().manual_seed(checked_seed(args.seed)),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            decoding=args.decoding,
            return_passes=args.passes or args.states,
            return_rounds=args.rounds,
            decoder="drafted" if args.rounds else args.decoder,
            compile=args.compile,
            tick=tick,
        )
    seconds = time.perf_counter() - start
    if not args.json:
        print_samples(Console(), result, tokenizer)
        return
    print_json(
        {
            "samples": samples_to_json(result, tokenizer, states=args.states),
            "sweeps": result.sweeps,
            "decoders": result.decoders,
            "seconds": seconds,
            "tokens_per_second": result.tokens.numel() / seconds,
        }
    )


def _encoded(tokenizer: Tokenizer, prompt: str, *, normalize: bool) -> torch.Tensor:
    text = tokenizer.prepare(prompt) if prompt and normalize else prompt
    if not text:
        raise UserError("the prompt is empty: leave --prompt out to sample without one")
    return torch.from_numpy(tokenizer.encode(text))
