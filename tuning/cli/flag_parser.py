"""The flags as tyro parses them, told to it class by class: what it would find out by itself takes twice as long.

tyro reads the source of every class for its help and looks at every field for a dozen kinds of nested types. Here it is
given the fields as they are, one analysis a type, and help texts that are read only when they are shown. Imports no
torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from tuning.cli.coerce import WholeNumbers, as_key, field_types
from tuning.errors import UserError
from tuning.flags import Flags

NAMES_OF_OTHERS = {  # flags of timm's and Hugging Face's scripts -> ours
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro-batch",
    "train_dir": "data",
    "dataset_name": "data",
    "output_dir": "output",
    "pretrained": "weights",
    "model_name_or_path": "model",
    "amp": "precision",
    "bf16": "precision",
    "opt": "optimizer",
    "sched": "schedule",
}
SEVERAL = {
    tuple: PrimitiveConstructorSpec(
        nargs="*",
        metavar="[STR [STR ...]]",
        instance_from_str=tuple,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
    WholeNumbers: PrimitiveConstructorSpec(
        nargs="*",
        metavar="[INT [INT ...]]",
        instance_from_str=lambda words: WholeNumbers(map(int, words)),
        is_instance=lambda value: isinstance(value, WholeNumbers),
        str_from_instance=lambda numbers: list(map(str, numbers)),
    ),
}


def parse_flags(argv: Sequence[str], name: str, description: str, default: Flags) -> Flags:
    """Flags of a command line; what it leaves out is as in *default*.

    Raises:
        SystemExit: 2 on a malformed command line, 0 on ``--help``; rank 0 has printed the message.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_group)
    return tyro.cli(
        Flags,
        args=list(argv),
        default=default,
        prog=f"python {name}",  # its errors say that this with --help tells more
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=registry,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def refuse_names_of_others(argv: Sequence[str]) -> None:
    """Flags that other programs have for the same: nothing in their letters leads to ours.

    Raises:
        UserError: names ours.
    """
    for word in argv:
        typed = as_key(word[2:].partition("=")[0]) if word.startswith("--") else ""
        if typed in NAMES_OF_OTHERS:
            raise UserError(f"{word.partition('=')[0]} is no flag here. Perhaps you meant --{NAMES_OF_OTHERS[typed]}.")


def _group(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The fields of `Flags`, or of one of its groups, with the values of the instance that is the default."""
    cls = info.type
    if not dataclasses.is_dataclass(cls):
        return None
    fields = (
        StructFieldSpec(
            name=name,
            type=_analysed(kind),
            default=getattr(info.default, name),
            helptext="" if cls is Flags else partial(help_text, cls, name),
        )
        for name, kind in field_types(cls).items()
    )
    return StructConstructorSpec(cls, tuple(fields))


@cache
def _analysed(kind: Any) -> Any:
    """The type of a flag with tyro's own reading of it; groups and the simplest types as they are."""
    if dataclasses.is_dataclass(kind) or kind in (bool, int, float, str):
        return kind
    spec = SEVERAL.get(kind) or ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))
    assert isinstance(spec, PrimitiveConstructorSpec), f"{kind} can't be a flag"
    return Annotated[object, spec]


def help_text(cls: type, name: str) -> str | None:
    """The text under a field of a class, on one line."""
    return _help_texts(cls).get(name)


@cache
def _help_texts(cls: type) -> dict[str, str]:
    """``{field: the text under it}``; none where the source is not at hand."""
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except OSError:
        return {}
    parsed = ast.parse(source).body
    body = next(node.body for node in parsed if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    texts = {}
    for field, below in itertools.pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts
