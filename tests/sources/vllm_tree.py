# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Finds names, members and signatures in a tree of Python sources without importing any
of it."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_DATACLASS = {"dataclass", "config"}


class Missing(LookupError):
    """A name is not in the tree."""


@dataclass(frozen=True)
class Found:
    """A definition: where it stands and its node; `node` is None for a module,
    `outside` is the object itself where a name comes from another package."""

    module: str
    node: ast.AST | None = None
    owner: "Found | None" = None
    outside: Any = None

    @property
    def name(self) -> str:
        return f"{self.module}:{getattr(self.node, 'name', '')}"

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef) or inspect.isclass(self.outside)

    @property
    def is_function(self) -> bool:
        return isinstance(self.node, ast.FunctionDef | ast.AsyncFunctionDef)

    def decorated(self, *names: str) -> bool:
        for decorator in getattr(self.node, "decorator_list", ()):
            target = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(target).rpartition(".")[2] in names:
                return True
        return False


class Tree:
    """The packages under `root`."""

    def __init__(self, root: Path, package: str = "vllm"):
        self.root, self.package = root, package
        self._names: dict[str, dict[str, ast.AST]] = {}
        self.find = cache(self.find)  # type: ignore[method-assign]

    def path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        return next(
            (p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()),
            None,
        )

    def find(self, module: str, qualname: str = "") -> Found:
        """The definition behind a name of a module, through re-exports, and its
        members.

        Raises:
            Missing: it is not there; says which part.
        """
        if self.path(module) is None:
            raise Missing(f"no module {module}")
        found = Found(module)
        for name in filter(None, qualname.split(".")):
            found = self.attribute(found, name)
        return found

    def attribute(self, found: Found, name: str) -> Found:
        if found.outside is not None:
            if not hasattr(found.outside, name):
                raise Missing(f"{found.outside!r} has no {name}")
            return Found(found.module, outside=getattr(found.outside, name))
        if found.node is None:
            return self._of_module(found.module, name)
        if found.is_class:
            return self.member(found, name)
        raise Missing(f"{found.name} is no module and no class, so it has no {name}")

    def _of_module(self, module: str, name: str) -> Found:
        names = self._module_names(module)
        node = names.get(name)
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            return self._imported(self._source(module, node), alias.name)
        if isinstance(node, ast.Import):
            alias = next(
                a for a in node.names if (a.asname or a.name.partition(".")[0]) == name
            )
            return self._imported(alias.name if alias.asname else name, "")
        if node is not None:
            return Found(module, node)
        if self.path(f"{module}.{name}") is not None:
            return Found(f"{module}.{name}")
        for star in (n for key, n in names.items() if key.startswith("*")):
            try:
                return self._imported(self._source(module, star), name)
            except Missing:
                continue
        raise Missing(f"{module} has no {name}")

    def _imported(self, module: str, name: str) -> Found:
        if module.partition(".")[0] == self.package:
            return self.find(module, name)
        try:
            value = importlib.import_module(module)
            return Found(module, outside=getattr(value, name) if name else value)
        except (ImportError, AttributeError):
            return Found(module, outside=Any)

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.path(module)
        assert path is not None
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (path.name == "__init__.py")]
        return ".".join([*parts, *filter(None, [node.module])])

    def _module_names(self, module: str) -> dict[str, ast.AST]:
        if module not in self._names:
            path = self.path(module)
            assert path is not None
            names: dict[str, ast.AST] = {}
            for node in statements(ast.parse(path.read_text()).body):
                for name in () if _overload(node) else _bound(node):
                    names.setdefault(name, node)
            self._names[module] = names
        return self._names[module]

    def bases(self, cls: Found) -> Iterator[Found]:
        if not isinstance(cls.node, ast.ClassDef):
            return
        for base in cls.node.bases:
            try:
                yield self.expression(cls.module, base)
            except Missing:
                yield Found(cls.module, outside=Any)

    def expression(self, module: str, expression: ast.expr) -> Found:
        """What a dotted name, or the part of an annotation that says it, stands for."""
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            return self.expression(
                module, ast.parse(expression.value, mode="eval").body
            )
        if isinstance(expression, ast.Name):
            return self._of_module(module, expression.id)
        if isinstance(expression, ast.Attribute):
            return self.attribute(
                self.expression(module, expression.value), expression.attr
            )
        if isinstance(expression, ast.Subscript):
            return self.expression(module, expression.value)
        if isinstance(expression, ast.BinOp):
            return self.expression(module, expression.left)
        raise Missing(f"{module}: {ast.unparse(expression)}")

    def member(self, cls: Found, name: str) -> Found:
        """A method, field or attribute set on `self`, of a class or of one above it."""
        if isinstance(cls.node, ast.ClassDef):
            for node in statements(cls.node.body):
                if name in _bound(node) and not _overload(node):
                    return Found(cls.module, node, owner=cls)
            for node in ast.walk(cls.node):
                if name in _set_on_self(node):
                    return Found(cls.module, node, owner=cls)
            for base in self.bases(cls):
                try:
                    return self.attribute(base, name)
                except Missing:
                    continue
        raise Missing(f"{cls.name} has no {name}")

    def signature(self, found: Found) -> inspect.Signature | None:
        """What a function or a class takes, a method's `self` included, a constructor's
        not; None where it cannot be told."""
        if found.outside is not None:
            return None
        if found.is_function:
            return _signature(found.node)
        if not found.is_class:
            return None
        if found.decorated(*_DATACLASS):
            return self._fields(found)
        try:
            init = self.signature(self.member(found, "__init__"))
        except Missing:
            return None
        return init and init.replace(parameters=list(init.parameters.values())[1:])

    def _fields(self, cls: Found) -> inspect.Signature:
        names: dict[str, bool] = {}
        for base in reversed([cls, *self.bases(cls)]):
            for node in getattr(base.node, "body", ()):
                if isinstance(node, ast.AnnAssign) and isinstance(
                    node.target, ast.Name
                ):
                    names[node.target.id] = node.value is not None
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature(
            [
                inspect.Parameter(n, kind, **({"default": None} if d else {}))
                for n, d in names.items()
            ]
        )


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a scope, those under its `if`, `try` and `with` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, part, ()):
                    yield from statements(
                        getattr(inner, "body", []) if part == "handlers" else [inner]
                    )


def own_names(node: ast.AST) -> list[str]:
    """The names that a statement within a class gives to it or to its instances."""
    return _bound(node) + _set_on_self(node)


def _overload(node: ast.AST) -> bool:
    return Found("", node).decorated("overload")


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [
            f"*{node.lineno}" if a.name == "*" else a.asname or a.name
            for a in node.names
        ]
    if isinstance(node, ast.Import):
        return [a.asname or a.name.partition(".")[0] for a in node.names]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [getattr(node, "target", None)]
    )
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _set_on_self(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        targets = [t for target in targets for t in getattr(target, "elts", [target])]
        attributes = [t for t in targets if isinstance(t, ast.Attribute)]
        return [
            t.attr
            for t in attributes
            if isinstance(t.value, ast.Name) and t.value.id == "self"
        ]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
        "register_buffer",
        "register_parameter",
        "__setattr__",
    ):
        return [a.value for a in node.args if isinstance(a, ast.Constant)]
    return []


def _signature(node: Any) -> inspect.Signature:
    arguments, parameters = node.args, []
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)

    def add(argument: ast.arg, kind: Any, has_default: bool) -> None:
        default = {"default": None} if has_default else {}
        parameters.append(inspect.Parameter(argument.arg, kind, **default))

    for i, argument in enumerate(positional):
        only = i < len(arguments.posonlyargs)
        kind = (
            inspect.Parameter.POSITIONAL_ONLY
            if only
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        add(argument, kind, i >= required)
    if arguments.vararg:
        add(arguments.vararg, inspect.Parameter.VAR_POSITIONAL, False)
    for argument, default in zip(
        arguments.kwonlyargs, arguments.kw_defaults, strict=True
    ):
        add(argument, inspect.Parameter.KEYWORD_ONLY, default is not None)
    if arguments.kwarg:
        add(arguments.kwarg, inspect.Parameter.VAR_KEYWORD, False)
    return inspect.Signature(parameters)
