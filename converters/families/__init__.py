"""Model types whose checkpoints are spelled unlike Llama's, each in a module of its own.

Such a module says
    DEFAULTS            what an absent key of the config means
    KEYS                which key says what others call by another name
    EMBED, HEAD, PREFIXES    names of the two tables, and what may stand before all names but HEAD
    ARCHITECTURE        the name of the class, where it is not the type's name and ForCausalLM
    facts(keys, hidden, heads)               fields of ModelSpec that are the type's own (those that
                                             `configuration` asks the others for)
    biases(keys)                             which segments of biases there are
    sources(spec, prefix, kind, layer, index, part)    where a segment is found (naming.Source)
"""

from types import ModuleType

from . import falcon, granite, granitemoe, opt

OWN: dict[str, ModuleType] = {
    "falcon": falcon, "granite": granite, "granitemoe": granitemoe, "opt": opt,
}  # fmt: skip
"""By model type."""
