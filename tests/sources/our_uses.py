# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Walks our sources and holds every use of vLLM against a tree of its sources: each
name imported, each attribute read off it, each call, and each method that stands in for
one of vLLM's."""

import ast
import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.sources.vllm_tree import Found, Missing, Tree, own_names, statements

SWITCH = "VLLM_0_33"
"""`if VLLM_0_33:` in our sources is followed as the version in question would."""


@dataclass(frozen=True)
class Value:
    """What an expression of ours is: a definition of vLLM's, or an instance of a class
    of its, or a method bound to one (`skip` leading parameters are filled in)."""

    found: Found
    instance: bool = False
    skip: int = 0


@dataclass
class OurClass:
    module: str
    node: ast.ClassDef
    vllm_bases: list[Found] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


@dataclass
class Uses:
    """What was found: `imported` definitions by where we import them, the number of
    `calls` that were bound to a signature, and the `problems`."""

    imported: dict[str, Found] = field(default_factory=dict)
    calls: int = 0
    overrides: int = 0
    problems: list[str] = field(default_factory=list)


class Checker:
    """Checks our packages against `tree`, which has the version that `newer` tells."""

    def __init__(self, tree: Tree, ours: Tree, packages: tuple[str, ...], newer: bool):
        self.tree, self.ours, self.packages, self.newer = tree, ours, packages, newer
        self.uses = Uses()
        self._classes: dict[str, OurClass] = {}

    def run(self) -> Uses:
        modules = [
            m for package in self.packages for m in _modules(self.ours.root, package)
        ]
        parsed = {
            m: self._prune(ast.parse(self.ours.path(m).read_text())) for m in modules
        }
        for module, body in parsed.items():
            self._collect_classes(module, body)
        self._settle_bases()
        for self._module, body in parsed.items():
            self._block(body, {}, None)
        return self.uses

    # Which statements count, and what our classes inherit.

    def _prune(self, tree: ast.Module) -> list[ast.stmt]:
        newer = self.newer

        class Pruner(ast.NodeTransformer):
            def visit_If(self, node: ast.If) -> Any:
                self.generic_visit(node)
                test = ast.unparse(node.test)
                if test == SWITCH:
                    return (node.body if newer else node.orelse) or None
                return node.body if test == "TYPE_CHECKING" else node

        return Pruner().visit(tree).body

    def _is_ours(self, module: str) -> bool:
        return any(module == p or module.startswith(f"{p}.") for p in self.packages)

    def _collect_classes(self, module: str, body: list[ast.stmt]) -> None:
        imported = _imports(body)
        for node in statements(body):
            if not isinstance(node, ast.ClassDef):
                continue
            cls = self._classes[node.name] = OurClass(module, node)
            cls.names = {name for inner in ast.walk(node) for name in own_names(inner)}
            for base in node.bases:
                source, _, name = imported.get(ast.unparse(base), "").partition(":")
                if source.startswith("vllm") and not self._is_ours(source):
                    with suppress(Missing):  # named where the import is walked
                        cls.vllm_bases.append(self.tree.find(source, name))

    def _settle_bases(self) -> None:
        """Our mixins count as classes of what they are mixed into."""
        for _ in range(3):
            for cls in self._classes.values():
                for base in cls.node.bases:
                    ours = self._classes.get(ast.unparse(base))
                    if ours is None:
                        continue
                    cls.names |= ours.names
                    for one, other in ((cls, ours), (ours, cls)):
                        one.vllm_bases += [
                            b for b in other.vllm_bases if b not in one.vllm_bases
                        ]

    # The walk.

    def _problem(self, node: ast.AST, text: object) -> None:
        self.uses.problems.append(
            f"{self._module}:{getattr(node, 'lineno', '?')}: {text}"
        )

    def _block(
        self, body: list[ast.stmt], env: dict[str, Any], cls: OurClass | None
    ) -> None:
        for node in body:
            self._statement(node, env, cls)

    def _statement(
        self, node: ast.stmt, env: dict[str, Any], cls: OurClass | None
    ) -> None:
        if isinstance(node, ast.ImportFrom | ast.Import):
            self._import(node, env)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    self._function(
                        inner, env, self._classes.get(node.name), method=True
                    )
                else:
                    self._statement(inner, dict(env), None)
        elif isinstance(node, ast.FunctionDef):
            self._function(node, env, cls)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                values = [self._value(element, env, cls) for element in node.value.elts]
                for element, value in zip(target.elts, values, strict=True):
                    self._bind(element, value, env, cls)
            else:
                self._bind(target, self._value(node.value, env, cls), env, cls)
        elif isinstance(node, ast.AnnAssign):
            value = node.value and self._value(node.value, env, cls)
            self._bind(
                node.target, value or self._annotated(node.annotation, env), env, cls
            )
        else:
            for name, part in ast.iter_fields(node):
                for item in part if isinstance(part, list) else [part]:
                    if isinstance(item, ast.stmt):
                        self._statement(item, env, cls)
                    elif isinstance(item, ast.ExceptHandler | ast.withitem):
                        self._nested(item, env, cls)
                    elif isinstance(item, ast.expr) and name != "target":
                        self._value(item, env, cls)

    def _nested(self, node: ast.AST, env: dict[str, Any], cls: OurClass | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child, env, cls)
            elif isinstance(child, ast.expr):
                self._value(child, env, cls)

    def _bind(
        self, target: ast.expr, value: Any, env: dict[str, Any], cls: Any
    ) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                self._bind(element, None, env, cls)
        else:  # what we set must be there to be set
            self._value(target, env, cls)

    def _import(self, node: ast.ImportFrom | ast.Import, env: dict[str, Any]) -> None:
        for alias in node.names:
            module = node.module if isinstance(node, ast.ImportFrom) else alias.name
            name = alias.name if isinstance(node, ast.ImportFrom) else ""
            bound, value = alias.asname or alias.name, None
            if module.partition(".")[0] == "vllm" and not self._is_ours(
                f"{module}.{name}"
            ):
                if self._is_ours(module):
                    env[bound] = None
                    continue
                try:
                    found = self.tree.find(module, name)
                    self.uses.imported[f"{module}:{name}"] = found
                    value = self._as_value(found)
                except Missing as missing:
                    self._problem(node, missing)
            env[bound] = value

    def _as_value(self, found: Found) -> Value | None:
        if isinstance(found.node, ast.AnnAssign):
            return self._instance(found.module, found.node.annotation)
        return Value(found)

    def _function(
        self,
        node: ast.FunctionDef,
        env: dict[str, Any],
        cls: OurClass | None,
        method: bool = False,
    ) -> None:
        env[node.name] = None
        inner = dict(env)
        for argument in [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
        ]:
            inner[argument.arg] = argument.annotation and self._annotated(
                argument.annotation, env
            )
        static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
        if method and cls is not None and not static:
            inner[node.args.args[0].arg] = cls
            for base in cls.vllm_bases:
                self._override(node, self._member(base, node.name))
        for decorator in node.decorator_list:
            if (
                isinstance(decorator, ast.Call)
                and ast.unparse(decorator.func) == "functools.wraps"
            ):
                wrapped = self._value(decorator.args[0], env, cls)
                self._override(node, wrapped.found if wrapped else None)
        self._block(node.body, inner, cls)

    # What an expression is.

    def _value(self, node: ast.expr, env: dict[str, Any], cls: OurClass | None) -> Any:
        if isinstance(node, ast.Name):
            return env.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, self._value(node.value, env, cls))
        if isinstance(node, ast.Call):
            return self._call(node, env, cls)
        if isinstance(node, ast.Lambda):
            env = {**env, **{a.arg: None for a in node.args.args}}
        elif isinstance(
            node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
        ):
            env = dict(env)
            for generator in node.generators:
                self._value(generator.iter, env, cls)
                self._bind(generator.target, None, env, cls)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child, env, cls)
            elif isinstance(child, ast.comprehension | ast.keyword):
                self._nested(child, env, cls)
        return None

    def _attribute(self, node: ast.Attribute, value: Any) -> Any:
        if isinstance(value, OurClass):
            if node.attr in value.names or not value.vllm_bases:
                return None
            found = [self._member(base, node.attr) for base in value.vllm_bases]
            if not any(found) and not node.attr.startswith("__"):
                bases = ", ".join(base.name for base in value.vllm_bases)
                self._problem(node, f"self.{node.attr} is neither ours nor of {bases}")
            first = next(filter(None, found), None)
            return first and self._of_instance(first)
        if not isinstance(value, Value) or value.found.outside is not None:
            return None
        if node.attr == "__func__":
            return Value(value.found)
        if (
            node.attr.startswith("__")
            and node.attr.endswith("__")
            and node.attr != "__version__"
        ):
            return None
        if value.found.is_function or isinstance(
            value.found.node, ast.Assign | ast.AnnAssign
        ):
            return None
        member = self._member(value.found, node.attr)
        if member is None:
            if not self._open_ended(value.found):
                self._problem(node, f"{value.found.name} has no {node.attr}")
            return None
        if value.instance:
            return self._of_instance(member)
        return Value(member, skip=int(member.decorated("classmethod")))

    def _member(self, found: Found, name: str) -> Found | None:
        try:
            return self.tree.attribute(found, name)
        except Missing:
            return None

    def _open_ended(self, found: Found) -> bool:
        return found.is_class and self._member(found, "__getattr__") is not None

    def _of_instance(self, member: Found) -> Value | None:
        node = member.node
        if member.is_function:
            if member.decorated("property", "cached_property"):
                return node.returns and self._instance(member.module, node.returns)
            return Value(member, skip=int(not member.decorated("staticmethod")))
        if isinstance(node, ast.AnnAssign):
            return self._instance(member.module, node.annotation)
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Name)
            and member.owner
        ):
            init = self._member(member.owner, "__init__")
            arguments = init.node.args.args if init and init.is_function else []
            for argument in arguments:
                if argument.arg == node.value.id and argument.annotation:
                    return self._instance(member.module, argument.annotation)
        return None

    def _instance(self, module: str, annotation: ast.expr) -> Value | None:
        try:
            found = self.tree.expression(module, annotation)
        except Missing:
            return None
        return (
            Value(found, instance=True)
            if isinstance(found.node, ast.ClassDef)
            else None
        )

    def _annotated(self, annotation: ast.expr, env: dict[str, Any]) -> Value | None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        while isinstance(annotation, ast.BinOp):
            annotation = annotation.left
        value = self._value(annotation, env, None)
        if isinstance(value, Value) and isinstance(value.found.node, ast.ClassDef):
            return Value(value.found, instance=True)
        return None

    # Calls and overrides.

    def _call(self, node: ast.Call, env: dict[str, Any], cls: OurClass | None) -> Any:
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            starred = isinstance(argument, ast.Starred)
            self._value(argument.value if starred else argument, env, cls)
        if (
            isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "super()"
        ):
            for base in cls.vllm_bases if cls else ():
                member = self._member(base, node.func.attr)
                if member is None:
                    self._problem(node, f"{base.name} has no {node.func.attr}")
                else:
                    self._bind_call(node, member, 1)
            return None
        value = self._value(node.func, env, cls)
        if (
            not isinstance(value, Value)
            or value.instance
            or value.found.outside is not None
        ):
            return None
        self._bind_call(node, value.found, value.skip)
        if value.found.is_class:
            return Value(value.found, instance=True)
        returns = getattr(value.found.node, "returns", None)
        return returns and self._instance(value.found.module, returns)

    def _bind_call(self, node: ast.Call, found: Found, skip: int) -> None:
        signature = self.tree.signature(found)
        if signature is None:
            return
        self.uses.calls += 1
        parameters = list(signature.parameters.values())[skip:]
        known = [a for a in node.args if not isinstance(a, ast.Starred)]
        keywords = {k.arg: None for k in node.keywords if k.arg is not None}
        starred = len(known) < len(node.args) or len(keywords) < len(node.keywords)
        signature = signature.replace(parameters=parameters)
        bind = signature.bind_partial if starred else signature.bind
        try:
            bind(*known, **keywords)
        except TypeError as error:
            self._problem(node, f"{found.name}{signature}: {error}")

    def _override(self, node: ast.FunctionDef, found: Found | None) -> None:
        stock = self.tree.signature(found) if found else None
        if stock is None:
            return
        self.uses.overrides += 1
        for reason in incompatible(self.ours.signature(Found("", node)), stock):
            self._problem(
                node, f"{node.name} stands in for {found.name}{stock}: {reason}"
            )


def incompatible(ours: inspect.Signature, stock: inspect.Signature) -> Iterator[str]:
    """Why a caller of `stock`, by position or by name, could not call `ours` alike."""
    mine, kinds = ours.parameters, {p.kind for p in ours.parameters.values()}
    takes_more = inspect.Parameter.VAR_POSITIONAL in kinds
    takes_names = inspect.Parameter.VAR_KEYWORD in kinds
    positional = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for i, theirs in enumerate(stock.parameters.values()):
        if theirs.kind is theirs.VAR_POSITIONAL:
            if not takes_more:
                yield f"takes no *{theirs.name}"
        elif theirs.kind is theirs.VAR_KEYWORD:
            if not takes_names:
                yield f"takes no **{theirs.name}"
        elif theirs.kind is theirs.KEYWORD_ONLY:
            if theirs.name not in mine and not takes_names:
                yield f"takes no {theirs.name}"
        elif i < len(positional):
            if positional[i] != theirs.name:
                yield f"has {positional[i]} where stock has {theirs.name}"
        elif not (takes_more and takes_names):
            yield f"takes no {theirs.name}"
    for parameter in mine.values():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in stock.parameters:
            open_ended = {p.kind for p in stock.parameters.values()} & {
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            }
            if not open_ended:
                yield f"needs {parameter.name}, which stock's callers do not give"


def _imports(body: list[ast.stmt]) -> dict[str, str]:
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in statements(body)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _modules(root: Path, package: str) -> list[str]:
    directory = root.joinpath(*package.split("."))
    files = sorted(directory.rglob("*.py"))
    parts = (file.relative_to(root).with_suffix("").parts for file in files)
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
