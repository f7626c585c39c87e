"""Run directories, and models by name. A run directory holds:

CONFIG      the configuration, with all that text, device and time have decided
TOKENIZER   the tokenizer, whole
WEIGHTS     the newest weights, with their checksum. These three are a model
CARD        the model card, if there is one
ASKED       the configuration that was asked for
METRICS     the log, a line of JSON for each record
SUMMARY     the results, written at the end
BEST        a folder that loads like a run directory: the weights of the best validation bound
PARENT      the weights that a run of `train --from` begins with
STATE       training states, in a folder step-N each, with COUNTERS as the readable file; MANIFEST,
            written last, holds the sha256 of the others

A writer holds `files.LOCK`.
"""

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
ASKED = "asked.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
BEST = "best"
PARENT = "parent.safetensors"
STATE = "state"
COUNTERS = "counters.json"
MANIFEST = "manifest.json"
