"What a reader may count on: plain lines, one thing a line, a docstring for every definition, rooms of one idea."

import ast, json, re, subprocess, sys
from pathlib import Path
import numpy as np, pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root / 'nbs').glob('*.ipynb'))
modules = sorted(f for f in (root / 'eed_fastai').glob('*.py') if f.name not in ('_modidx.py', '__init__.py', 'all.py'))
scripts = sorted([*(root / 'benchmarks').glob('*.py'), *(root / 'tools').glob('*.py')])
definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def code_cells(notebook):
    "Source of each code cell of a notebook, without cell magics and shell lines"
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return ['\n'.join('' if line.startswith(('%', '!')) else line for line in s.splitlines()) for s in sources]


def sources(path):
    "The pieces of code in a notebook or a script"
    return code_cells(path) if path.suffix == '.ipynb' else [path.read_text(encoding='utf-8')]


def is_unpacking(node):
    "Is this tuple assignment a swap, or the unpacking of one result?"
    target, value = node.targets[0], node.value
    if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
        return True
    return {ast.unparse(o) for o in target.elts} == {ast.unparse(o) for o in value.elts}


def control_by_and_or(node):
    "Does `x and y or z` stand for a condition?"
    if not (isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)):
        return False
    return any(isinstance(o, ast.BoolOp) and isinstance(o.op, ast.And) and not is_test(o) for o in node.values)


def is_test(node):
    "Do all parts of a condition look like questions: comparisons, calls, `not`?"
    questions = (ast.Compare, ast.Call, ast.UnaryOp, ast.BoolOp, ast.Name, ast.Attribute)
    return all(isinstance(o, questions) for o in node.values)


def faults_of(tree):
    "Line and fault of everything that is not plain"
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if isinstance(body, list):
            for before, after in zip(body, body[1:]):
                if before.lineno == after.lineno:
                    yield after.lineno, 'two statements on one line'
            if (
                isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try, *definitions))
                and body
                and body[0].lineno == node.lineno
            ):
                if not isinstance(node, definitions):
                    yield node.lineno, 'a block on the line that opens it'
        if isinstance(node, ast.Assign) and not is_unpacking(node):
            yield node.lineno, 'several things in one assignment'
        if isinstance(node, ast.NamedExpr):
            yield node.lineno, 'a walrus'
        if control_by_and_or(node):
            yield node.lineno, '`and … or` as control'
        if isinstance(node, ast.IfExp) and any(isinstance(o, ast.IfExp) for o in ast.walk(node) if o is not node):
            yield node.lineno, 'a conditional expression in another'


def plain_walrus(tree):
    "Lines of `if x := …:` and `while x := …:`, where the name is all that is asked"
    tests = [n.test for n in ast.walk(tree) if isinstance(n, (ast.If, ast.While))]
    return {t.lineno for t in tests if isinstance(t, ast.NamedExpr)}


@pytest.mark.parametrize('path', [*notebooks, *scripts], ids=lambda o: o.stem)
def test_plain_lines(path):
    "At most 120 characters; one statement a line, one thing an assignment"
    found = []
    for source in sources(path):
        found += [f'{len(line)} characters: {line}' for line in source.splitlines() if len(line) > 120]
        tree = ast.parse(source)
        fine = plain_walrus(tree)
        lines = source.splitlines()
        found += [f'{what}: {lines[n - 1]}' for n, what in faults_of(tree) if not (what == 'a walrus' and n in fine)]
    assert not found, '\n'.join(found)


def own_definitions(tree):
    "All definitions, those inside functions among them, but dunder methods"
    return [n for n in ast.walk(tree) if isinstance(n, definitions) and not re.fullmatch(r'__\w+__', n.name)]


@pytest.mark.parametrize('path', modules, ids=lambda o: o.stem)
def test_lines_of_the_package(path):
    "A chapter's summary is a line of its module, too; only nbdev's own `__all__` may be longer"
    lines = path.read_text(encoding='utf-8').splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith('__all__ = [')]


@pytest.mark.parametrize('path', [*modules, *scripts], ids=lambda o: o.stem)
def test_docstrings(path):
    "Every definition says in one line what it does"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in own_definitions(tree):
        doc = ast.get_docstring(node)
        assert doc and '\n' not in doc, f'{node.name}: {doc}'


def body_lines(node):
    "Lines of a function without its signature and docstring"
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def functions(path):
    "All functions and methods of a module"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_short_bodies():
    "Functions are short: 12 lines at the 90th percentile, 30 at most"
    lines = {f'{path.stem}.{f.name}': body_lines(f) for path in modules for f in functions(path)}
    assert np.percentile([*lines.values()], 90) <= 12
    longest = max(lines, key=lines.get)
    assert lines[longest] <= 30, f'{longest}: {lines[longest]}'


@pytest.mark.parametrize('path', modules, ids=lambda o: o.stem)
def test_one_idea_a_room(path):
    "A room has at most 330 lines of code"
    code = [
        line for line in path.read_text(encoding='utf-8').splitlines() if line.strip() and not line.startswith('# %%')
    ]
    assert len(code) <= 330


def test_ruff():
    "The settings are in pyproject.toml"
    pytest.importorskip('ruff', reason="ruff is an extra: pip install 'eed_fastai[dev]'")
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '.'], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    'source,fault',
    [
        ('a,b = 1,2', 'several things'),
        ('f(x := 3)', 'walrus'),
        ('y = a and 1 or 2', 'and … or'),
        ('if a: b()', 'a block on the line'),
        ('a(); b()', 'two statements'),
        ('x = 1 if a else 2 if b else 3', 'conditional expression'),
    ],
)
def test_the_check_sees_what_it_is_for(source, fault):
    assert any(fault in what for _, what in faults_of(ast.parse(source)))


@pytest.mark.parametrize('source', ['a,b = b,a', 'a,b = f()', 'ok = a>1 and b>2 or c>3', 'if x: # why\n    y()'])
def test_the_check_leaves_plain_code_alone(source):
    assert not list(faults_of(ast.parse(source)))
