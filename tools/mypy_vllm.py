# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A mypy plugin for what mypy itself lets pass: a method of ours stands in the place of
one of vLLM's, and vLLM's callers cannot call it by the same names; and a module that
the release lacks, which mypy would take from the installed vLLM."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_paths

from mypy.errorcodes import OVERRIDE
from mypy.errors import CompileError
from mypy.nodes import (
    ARG_NAMED,
    ARG_NAMED_OPT,
    ARG_POS,
    ARG_STAR,
    ARG_STAR2,
    ArgKind,
    Decorator,
    FuncDef,
    Import,
    ImportFrom,
    MypyFile,
    SymbolNode,
)
from mypy.plugin import ClassDefContext, MethodContext, Plugin
from mypy.types import CallableType, Instance, Parameters, Type, get_proper_type

OURS = (
    "vllm.model_executor.layers.fused_moe.expert_slots",
    "vllm.plugins.moe_gpu_prefetch",
)
STOCK = "vllm."
_PACKAGES = Path(get_paths()["purelib"])


@dataclass(frozen=True)
class Signature:
    """The parameters of a function, in order."""

    names: Sequence[str | None]
    kinds: Sequence[ArgKind]

    def of_kind(self, *kinds: ArgKind) -> list[str]:
        pairs = zip(self.names, self.kinds, strict=True)
        return [name for name, kind in pairs if kind in kinds and name]

    @property
    def positional(self) -> list[str]:
        pairs = zip(self.names, self.kinds, strict=True)
        return [name or "_" for name, kind in pairs if kind.is_positional()]

    @property
    def keywords(self) -> list[str]:
        return self.of_kind(ARG_NAMED, ARG_NAMED_OPT)

    @property
    def required(self) -> list[str]:
        return self.of_kind(ARG_POS, ARG_NAMED)


_UNKNOWN = Signature([None, None], [ARG_STAR, ARG_STAR2])
"""`Callable[..., T]`."""


def incompatible(ours: Signature, stock: Signature) -> Iterator[str]:
    """Why a caller of `stock`, by position or by name, could not call `ours` alike."""
    if stock == _UNKNOWN:
        return
    takes_more, takes_names = ARG_STAR in ours.kinds, ARG_STAR2 in ours.kinds
    mine = ours.positional
    for place, name in enumerate(stock.positional):
        if place < len(mine):
            if mine[place] != name:
                yield f"has {mine[place]} where stock has {name}"
        elif not (takes_more and takes_names):
            yield f"takes no {name}"
    for name in stock.keywords:
        if name not in mine + ours.keywords and not takes_names:
            yield f"takes no {name}"
    if ARG_STAR in stock.kinds and not takes_more:
        yield "takes no *args"
    if ARG_STAR2 in stock.kinds and not takes_names:
        yield "takes no **kwargs"
    if ARG_STAR not in stock.kinds and ARG_STAR2 not in stock.kinds:
        for name in ours.required:
            if name not in stock.positional + stock.keywords:
                yield f"needs {name}, which stock's callers do not give"


class VllmPlugin(Plugin):
    """Checks the methods of each class of ours against those of vLLM's classes above
    it, and each function of ours with `functools.wraps` against what it wraps."""

    def get_additional_deps(self, file: MypyFile) -> list[tuple[int, str, int]]:
        """None; called for each file, with its imports.

        Raises:
            CompileError: it imports a module of vLLM's that the release, which is in
                MYPYPATH, does not have.
        """
        release = os.environ.get("MYPYPATH")
        if release is None or not _is_ours(file.fullname):
            return []
        absent = [
            f"{file.path}:{line}: error: no module {module} in this release"
            for line, module in _modules_of_vllm(file)
            if not _is_module(Path(release), module)
        ]
        if absent:
            raise CompileError(absent)
        return []

    def get_base_class_hook(
        self, fullname: str
    ) -> Callable[[ClassDefContext], None] | None:
        return _check_class if fullname.startswith(STOCK) else None

    def get_method_hook(self, fullname: str) -> Callable[[MethodContext], Type] | None:
        return _check_wrap if fullname == "functools._Wrapper.__call__" else None


def _is_ours(fullname: str) -> bool:
    return fullname.startswith(OURS)


def _modules_of_vllm(file: MypyFile) -> Iterator[tuple[int, str]]:
    """The modules of stock vLLM that a file imports, each with the line."""
    for node in file.imports:
        names: list[str] = []
        if node.is_unreachable:
            continue
        if isinstance(node, Import):
            names = [name for name, _ in node.ids]
        elif isinstance(node, ImportFrom):
            inner = [f"{node.id}.{name}" for name, _ in node.names]
            names = [node.id, *(name for name in inner if _is_module(_PACKAGES, name))]
        for name in names:
            if name.startswith(STOCK) and not _is_ours(name):
                yield node.line, name


def _is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _check_class(context: ClassDefContext) -> None:
    info = context.cls.info
    if not _is_ours(info.fullname):
        return
    for base in info.mro[1:]:
        if not base.fullname.startswith(STOCK) or _is_ours(base.fullname):
            continue
        for name, symbol in info.names.items():
            ours = _function(symbol.node)
            stock = _function(base.names[name].node) if name in base.names else None
            if ours is None or stock is None or name == "__init__":
                continue
            for reason in incompatible(_signature(ours), _signature(stock)):
                text = f"{name} stands in for {stock.fullname}: {reason}"
                context.api.fail(text, ours, code=OVERRIDE)


def _check_wrap(context: MethodContext) -> Type:
    assert isinstance(context.type, Instance)  # functools._Wrapper
    stock = get_proper_type(context.type.args[0]) if context.type.args else None
    ours = get_proper_type(context.arg_types[0][0])
    if isinstance(stock, Parameters | CallableType) and isinstance(ours, CallableType):
        for reason in incompatible(_signature(ours), _signature(stock)):
            text = f"{ours.name or 'a function'} stands in for what it wraps: {reason}"
            context.api.fail(text, context.context, code=OVERRIDE)
    return context.default_return_type


def _function(node: SymbolNode | None) -> FuncDef | None:
    if isinstance(node, Decorator):
        node = node.func
    return node if isinstance(node, FuncDef) else None


def _signature(function: FuncDef | CallableType | Parameters) -> Signature:
    return Signature(function.arg_names, function.arg_kinds)


def plugin(version: str) -> type[Plugin]:
    """What mypy calls."""
    return VllmPlugin
