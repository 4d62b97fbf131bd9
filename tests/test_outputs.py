"What the notebooks show is what the code gives today."

import json, os, re, shutil, subprocess
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root / 'nbs').glob('*.ipynb'))
minutes = 15  # for one notebook, on the slowest machine


def cells(path):
    "Code cells by their ids"
    return {c['id']: c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'}


def directives(cell):
    "The words behind `#|` at the top of a cell"
    lines = ''.join(cell['source']).splitlines()
    return {line[2:].split()[0] for line in lines if re.match(r'#\|\s*\w', line)}


def text_of(output):
    "The text of an output; of a picture, only that there is one"
    if 'text' in output:
        return ''.join(output['text'])
    data = output.get('data', {})
    if 'image/png' in data or 'image/svg+xml' in data:
        return 'a picture'
    return ''.join(data.get('text/plain', ''))


def without_numbers(text):
    "Text in which numbers, and the width that they take, do not count"
    return re.sub(r'[-+\s]+', ' ', re.sub(r'-?\d[\d.,e+-]*|nan|inf', '#', text)).strip()


def shown(cell):
    "What a cell shows, as far as it has to stay the same"
    texts = [text_of(o) for o in cell['outputs']]
    return [without_numbers(t) for t in texts] if 'varies' in directives(cell) else texts


def is_run(cell):
    "Is the cell run by `nbdev-test` without flags?"
    return not directives(cell) & {'slow', 'cuda', 'notest', 'eval:'}


@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "A copy of the checkout in which notebooks may be saved"
    folder = tmp_path_factory.mktemp('outputs') / 'project'
    ignore = shutil.ignore_patterns('.git', '__pycache__', '*.egg-info', 'logits')
    shutil.copytree(root, folder, ignore=ignore)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', [nb.name for nb in notebooks])
def test_saved_outputs_are_todays(name, copy):
    "Run, save, clean: nothing differs, but for numbers in cells that are declared to vary"
    env = {
        **os.environ,
        'MPLBACKEND': 'agg',
        'PYTHONWARNINGS': 'ignore',
        'PYTHONPATH': str(copy),
        'OMP_NUM_THREADS': '1',
    }
    run = ['nbdev-test', f'nbs/{name}', '--save', '--n-workers', '0']
    clean = ['nbdev-clean', '--fname', f'nbs/{name}']
    for command in (run, clean):
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=60 * minutes)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    saved, today = cells(root / 'nbs' / name), cells(copy / 'nbs' / name)
    assert list(saved) == list(today)
    for key, cell in saved.items():
        if is_run(cell):
            assert shown(cell) == shown(today[key]), ''.join(cell['source'])


def test_numbers_do_not_count_where_they_vary():
    varies = dict(source=['#| varies\n', 'f()'], outputs=[dict(text=['took 3.5 s\n'])])
    fixed = dict(source=['f()'], outputs=[dict(text=['took 3.5 s\n'])])
    assert shown(varies) == shown(varies | dict(outputs=[dict(text=['took  12.25 s\n'])]))
    assert shown(varies) != shown(varies | dict(outputs=[dict(text=['lasted 3.5 s\n'])]))
    assert shown(fixed) != shown(fixed | dict(outputs=[dict(text=['took 12.25 s\n'])]))
