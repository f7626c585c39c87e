"""The names in a configuration that stand for classes and functions of a user's own.

config.json has their modules, which are never imported from here.
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from typing import Any, NamedTuple

from tarflowlm.config import OPTIMIZERS, SCHEDULES, TOKENIZERS, OptimConfig, RunConfig
from tarflowlm.errors import UserError
from tarflowlm.model_config import (
    COUPLINGS,
    FAMILIES,
    LAYERS,
    Affine,
    BaselineConfig,
    BlockConfig,
    FlowConfig,
    TransformerConfig,
)
from tarflowlm.registry import Registry, own_module

KeyPath = tuple[str | int, ...]
"""The keys and indices from the document of a configuration to one of its names."""
PLACES: dict[KeyPath, Registry] = {
    ("model", "family"): FAMILIES,
    ("model", "trunk", "layer"): LAYERS,
    ("data", "tokenizer", "kind"): TOKENIZERS,
    ("optim", "optimizer"): OPTIMIZERS,
    ("optim", "schedule"): SCHEDULES,
}


class Named(NamedTuple):
    """A name in the JSON values of a configuration."""

    path: KeyPath
    values: dict[str, Any]
    """The values among which it is."""
    registry: Registry

    @property
    def name(self) -> str:
        name: str = self.values[str(self.path[-1])]
        return name

    @property
    def label(self) -> str:
        """What imports in config.json and messages call it, such as coupling 'spline'."""
        return f"{self.registry.word} {self.name!r}"

    @property
    def module(self) -> str | None:
        """The module of what has the name now; None for ours, and for nothing."""
        return own_module(self.registry.get(self.name))


def names_in(document: dict[str, Any]) -> Iterator[Named]:
    """The names in a configuration; values of other types, which are refused later, are not."""
    model = document.get("model")
    blocks = model.get("blocks") if isinstance(model, dict) else None
    count = len(blocks) if isinstance(blocks, list) else 0
    of_blocks: dict[KeyPath, Registry] = {
        ("model", "blocks", index, "coupling"): COUPLINGS for index in range(count)
    }
    for path, registry in (PLACES | of_blocks).items():
        values: Any = document
        for key in path[:-1]:
            if isinstance(key, int):
                values = values[key]
            else:
                values = values.get(key) if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(values.get(path[-1]), str):
            yield Named(path, values, registry)


def imports_of(document: dict[str, Any]) -> dict[str, str]:
    """The modules of a user's own that a configuration needs, by the labels of its names."""
    modules = {one.label: one.module for one in names_in(document)}
    return {label: module for label, module in modules.items() if module not in (None, "__main__")}


def check_imports(document: dict[str, Any], imports: dict[str, str], where: str) -> list[Named]:
    """The names of a configuration whose modules, of its `imports`, are not imported.

    UserError for a name of ours that a module has taken.
    """
    missing = []
    for one in names_in(document):
        if one.label in imports and one.module is None:
            missing.append(one)
        elif one.label not in imports and one.module not in (None, "__main__"):
            what = f"{where} has the {one.label} of tarflowlm, whose name {one.module} has taken"
            raise UserError(f"{what}: load it without that module")
    return missing


def stand_in(missing: Named) -> str:
    """Let a name of ours take the place of one that is missing, and drop options that it does not
    have; returns the missing one.
    """
    name, values, key = missing.name, missing.values, str(missing.path[-1])
    flow_or_baseline = FlowConfig if "blocks" in values else BaselineConfig
    kinds: dict[str, tuple[type[Any], str]] = {
        "family": (flow_or_baseline, flow_or_baseline.family),
        "layer": (TransformerConfig, TransformerConfig.layer),
        "coupling": (BlockConfig, Affine.coupling),
        "optimizer": (OptimConfig, "adamw"),
        "schedule": (OptimConfig, OptimConfig.schedule),
    }
    if key == "kind":
        kept, ours = {"normalize"}, "byte"
    else:
        kind, ours = kinds[key]
        kept = {one.name for one in fields(kind)}
    for option in values.keys() - kept:
        del values[option]
    values[key] = ours
    return name


def with_name(config: Any, path: KeyPath, name: str) -> Any:
    """A configuration, or a tuple of them, with this name at the end of the path; not checked."""
    key, *rest = path
    if isinstance(key, int):
        changed = with_name(config[key], tuple(rest), name)
        return (*config[:key], changed, *config[key + 1 :])
    inner = with_name(getattr(config, key), tuple(rest), name) if rest else name
    return config.unchecked(**{key: inner})


def with_names(run: RunConfig, names: dict[KeyPath, str]) -> RunConfig:
    """The run with the names for which others stand in."""
    named: RunConfig = reduce(lambda found, one: with_name(found, *one), names.items(), run)
    return named
