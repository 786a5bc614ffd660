# SPDX-License-Identifier: Apache-2.0
"""runx.py as a text: its parts know only those above them, and it stays short, typed and readable."""

from __future__ import annotations

import ast
import io
import pathlib
import re
import sys
import tokenize

import pytest

import runx

PATH = pathlib.Path(runx.__file__)
TEXT = PATH.read_text()
TREE = ast.parse(TEXT)
HEADING = re.compile(r"^# ==== (.+?) =+$")
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
CLASSES = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
LINES_MAX, TOKENS_MAX = 9105, 9.6  # of the file, of a line of code: they are to become fewer
FUNCTION_MAX, CLASS_MAX = 50, 200  # lines


def part_of_lines() -> list[int]:
    """For each line of the file, counted from 1, the number of its part: 0 is what stands above the first heading."""
    parts = [0]
    for line in TEXT.splitlines():
        parts.append(parts[-1] + bool(HEADING.match(line)))
    return parts


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [each.id for target in targets if target for each in ast.walk(target) if isinstance(each, ast.Name)]


def used(node: ast.stmt) -> list[ast.Name]:
    """The names of the module that a statement uses, also in annotations, though nothing evaluates those."""
    scopes = [node] if not isinstance(node, ast.ClassDef) else node.body
    own = [name for scope in scopes if scope is not node for name in defined(scope)]  # of a class, for its body alone
    found = []
    for scope in scopes:
        inner = list(ast.walk(scope))
        local = {each.arg for each in inner if isinstance(each, ast.arg)}
        if isinstance(scope, ast.FunctionDef):
            local |= {each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
        else:
            local.update(own)
        found += [each for each in inner if isinstance(each, ast.Name) and each.id not in local]
    return found


def test_no_part_uses_a_name_of_a_part_below():
    parts = part_of_lines()
    home = {name: parts[node.lineno] for node in TREE.body for name in defined(node)}
    assert len(set(home.values())) > 15
    headings = ["head", *(match.group(1) for match in map(HEADING.match, TEXT.splitlines()) if match)]
    below = {
        f"{headings[parts[name.lineno]]}, line {name.lineno}: {name.id} is in {headings[home[name.id]]}"
        for node in TREE.body
        for name in used(node)
        if home.get(name.id, 0) > parts[name.lineno]
    }
    assert sorted(below) == []


def test_each_part_says_what_it_owns():
    lines = TEXT.splitlines()
    for number, line in enumerate(lines):
        if HEADING.match(line):
            says = [bool(re.match("# ", text)) for text in lines[number + 1 : number + 5]]
            assert says[0] and not all(says), line


def test_functions_and_classes_can_be_seen_whole():
    long = [(node.name, node.end_lineno - node.lineno + 1) for node in (*FUNCTIONS, *CLASSES)]
    most = {node.name: CLASS_MAX if isinstance(node, ast.ClassDef) else FUNCTION_MAX for node in (*FUNCTIONS, *CLASSES)}
    assert [(name, size) for name, size in long if size > most[name]] == []


def test_every_function_is_annotated():
    bare = []
    for node in FUNCTIONS:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        typed = all(each.annotation or each.arg == "self" for each in arguments if each)
        if not (typed and node.returns):
            bare.append(node.name)
    assert bare == []


def test_the_file_is_short_and_its_lines_are_not_dense():
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(TEXT).readline) if each.type not in skipped]
    of_code = {each.start[0] for each in tokens}
    assert len(TEXT.splitlines()) <= LINES_MAX
    assert len(tokens) / len(of_code) <= TOKENS_MAX


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is there from Python 3.10 on")
def test_only_the_standard_library_is_imported():
    imported = {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == set()
