"""The model `tarflowlm` of lm-evaluation-harness, and the harness's command line with it."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tarflowlm.config import Normalization
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError, check_package, first_line
from tarflowlm.model import LanguageModel
from tarflowlm.pretrained import load
from tarflowlm.requests import Writing
from tarflowlm.terminal.bars import Bars, print_notice
from tarflowlm_apps.lm_eval.scoring import TextScorer

Requests = list[Any]
"""Requests of lm-eval, each with its `args`."""


def run_lm_eval(words: Sequence[str]) -> None:
    """The command line of lm-eval on `words`. UserError if lm-eval refuses them."""
    check_package("lm_eval", "lm-eval", "harness")
    from lm_eval.__main__ import cli_evaluate

    register()
    if not any(word.startswith(("-v", "--verbosity")) for word in words):
        # without a level it logs every step
        os.environ.setdefault("LMEVAL_LOG_LEVEL", "WARNING")
    before = sys.argv
    sys.argv = ["lm-eval", *words]
    try:
        cli_evaluate()
    except UserError:
        raise
    except (ValueError, LookupError, OSError, ImportError) as error:
        raise UserError(f"lm-eval stopped: {first_line(error)} ({type(error).__name__})") from error
    finally:
        sys.argv = before


def meaning(model: LanguageModel, samples: int) -> dict[str, str]:
    """The two kinds of log-likelihood of a model in words, for that many posterior samples."""
    if model.is_exact:
        return {"rolling": "exact", "conditional": "exact"}
    bound = "lower bound: " + (f"importance-weighted, {samples} samples" if samples > 1 else "ELBO")
    conditional = "difference of two bounds with the same noise, no bound itself"
    if model.num_blocks == 1:
        conditional = f"{bound}, of the prediction from the encoded context"
    return {"rolling": bound, "conditional": conditional}


def register() -> None:
    """Make the model known to lm-eval as `tarflowlm`."""
    import lm_eval.models  # noqa: F401  # which lm-eval imports only while no model is known
    from lm_eval.api.model import LM
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    if "tarflowlm" in MODEL_REGISTRY:
        return

    @register_model("tarflowlm")
    class HarnessModel(LM):  # type: ignore[misc]
        """A model that `load` finds, as lm-eval calls it."""

        def __init__(
            self,
            pretrained: str,
            *,
            posterior_samples: int = 1,
            noise_seed: int = 0,
            normalize: Normalization | None = None,
            device: str | None = None,
            # batches are sized by `chunks`
            batch_size: object = None,
            max_batch_size: object = None,
        ) -> None:
            super().__init__()
            # lm-eval passes cuda:0 by default
            self._device = pick_device("auto" if device in (None, "cuda:0") else device)
            lm = load(pretrained, self._device)
            lm = replace(lm, tokenizer=lm.tokenizer.with_normalization(normalize))
            self.tokenizer = lm.tokenizer
            self.scorer = TextScorer(lm, samples=posterior_samples, seed=noise_seed)
            self.meaning = meaning(lm.model, posterior_samples)
            for kind, words in self.meaning.items():
                print_notice(f"{kind} log-likelihoods: {words}")
            if self.tokenizer.normalization != "none":
                how = f"texts are normalised ({self.tokenizer.normalization})"
                print_notice(f"{how}: bits per byte are theirs, over bytes of the raw text")

        def loglikelihood(self, requests: Requests) -> list[tuple[float, bool]]:
            pairs = [self.scorer.encode_pair(*request.args) for request in requests]
            with Bars("log-likelihoods", len(pairs)) as progress:
                found = self.scorer.conditional(pairs, progress)
            # a choice of which normalisation leaves nothing cannot be the answer
            return [
                (-math.inf, False) if pair.given == len(pair.tokens) and request.args[1] else one
                for request, pair, one in zip(requests, pairs, found, strict=True)
            ]

        def loglikelihood_rolling(self, requests: Requests) -> list[float]:
            texts = [request.args[0] for request in requests]
            with Bars() as progress:
                return self.scorer.rolling(texts, progress)

        def generate_until(self, requests: Requests) -> list[str]:
            asked = [(request.args[0], how_to_continue(request.args[1])) for request in requests]
            with Bars("continuations", len(asked)) as progress:
                return self.scorer.complete(asked, progress)

        def chat_template(self, chat_template: bool | str = False) -> str:
            if chat_template:
                raise UserError("--apply_chat_template: there is no chat template; leave it out")
            return ""

        def get_model_info(self) -> dict[str, object]:
            """Entries of the configuration that lm-eval stores with the results."""
            return {
                "log_likelihoods": self.meaning,
                "normalization": self.tokenizer.normalization,
                "posterior_samples": self.scorer.samples,
                "noise_seed": self.scorer.seed,
            }


def how_to_continue(options: dict[str, Any]) -> Writing:
    """The generation options of a task, as a request without a text.

    As everywhere in lm-eval they are greedy at temperature 0, and unless `do_sample` or a
    temperature asks for samples.
    """
    until = options.get("until") or ()
    temperature = float(options.get("temperature", 1.0))
    samples = options.get("do_sample")
    samples = "temperature" in options if samples is None else samples
    is_greedy = not samples or temperature == 0.0
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    lengths = [int(options[name]) for name in names if options.get(name) is not None]
    return Writing(
        max_new_tokens=next(iter(lengths), 256),
        temperature=1.0 if is_greedy else temperature,
        top_k=1 if is_greedy else options.get("top_k") or None,
        top_p=None if is_greedy else options.get("top_p"),
        min_p=None if is_greedy else options.get("min_p"),
        stop=(until,) if isinstance(until, str) else tuple(filter(None, until)),
    )
