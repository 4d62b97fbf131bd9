"What a user installs and reads: the wheel, the commands, the README, the notebooks, and that they all agree."

import ast, configparser, importlib.metadata, importlib.util, json, re, subprocess, sys, zipfile
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root / 'nbs').glob('*.ipynb'))
settings = configparser.ConfigParser(delimiters=['='])
settings.read(root / 'settings.ini')
settings = settings['DEFAULT']
wanted = settings['requirements'].split()


def cells(nb):
    return json.loads(nb.read_text(encoding='utf-8'))['cells']


def source(cell):
    return ''.join(cell['source'])


def check_metadata(meta):
    "`meta` is an email message: what pip will read"
    requires = [r.replace(' ', '') for r in meta.get_all('Requires-Dist')]
    for o in wanted:
        assert any(
            r.startswith(re.split('[<>=]', o)[0]) and all(part in r for part in re.split('[<>=]+', o)[0].split(','))
            for r in requires
            if 'extra' not in r
        ), o
    assert {e for e in meta.get_all('Provides-Extra')} == set(settings['extras'].split())
    assert any(r.startswith('pytest') and 'extra' in r for r in requires)
    assert meta['Requires-Python'] == '>=' + settings['min_python'] and meta['License-Expression'] == 'Apache-2.0'
    assert meta['Summary'] and meta['Keywords'] and meta['Author']


def test_installed_metadata():
    check_metadata(importlib.metadata.metadata('eed_fastai'))
    entry = {(e.group, e.name): e.value for e in importlib.metadata.distribution('eed_fastai').entry_points}
    assert entry == {
        **{('console_scripts', f'eed_{o}'): f'eed_fastai.cli:eed_{o}' for o in ('train', 'eval', 'predict', 'export')},
        ('nbdev', 'eed_fastai'): 'eed_fastai._modidx:d',
    }


def test_wheel(tmp_path):
    files = subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for f in files:
        if f.startswith('eed_fastai/') or '/' not in f:
            (tmp_path / 'src' / f).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / 'src' / f).write_bytes((root / f).read_bytes())
    subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--quiet',
            '--no-deps',
            '--no-build-isolation',
            '-w',
            tmp_path,
            tmp_path / 'src',
        ],
        check=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as z:
        names = z.namelist()
        import email

        check_metadata(email.message_from_bytes(z.read(next(n for n in names if n.endswith('METADATA')))))
    modules = {f'eed_fastai/{f.name}' for f in (root / 'eed_fastai').glob('*.py')}
    assert {n for n in names if n.startswith('eed_fastai/')} == modules
    assert any(n.endswith('LICENSE') for n in names)


def test_one_version():
    import eed_fastai

    assert importlib.metadata.version('eed_fastai') == eed_fastai.__version__
    others = [
        f for f in ('settings.ini', 'pyproject.toml', 'setup.py') if eed_fastai.__version__ in (root / f).read_text()
    ]
    assert not others
    assert (
        f'version: {eed_fastai.__version__}' in (root / 'CITATION.cff').read_text()
        and f'## {eed_fastai.__version__}' in (root / 'CHANGELOG.md').read_text()
    )


def test_everything_has_the_everyday_names():
    import eed_fastai.all as everyday

    names = '''
        digits_dls folder_dls cifar_resnet18 split_stages ExitHead make_heads multi_exit MultiExitModel exit_costs
        main_teacher ensemble_teacher subset_teacher weighted_teacher exit_ce logit_mse logit_kl feat_mse
        EEDCallback recipes multi_exit_learner plot_exits ExitMetric EnsembleMetric early_exit max_prob
        exit_thresholds ExitPolicy anytime_curve budgeted_curve save_multi_exit load_multi_exit export_onnx
    '''.split()
    assert not [n for n in names if not hasattr(everyday, n)]
    from fastai.learner import Learner

    assert all(
        hasattr(Learner, o)
        for o in ('to_eed', 'get_exit_preds', 'validate_exits', 'exit_table', 'fit_policy', 'predict_early')
    )


def test_package_is_the_notebooks(tmp_path):
    for f in ('pyproject.toml', 'settings.ini', 'setup.py', 'README.md'):
        (tmp_path / f).write_bytes((root / f).read_bytes())
    for d in ('nbs', 'eed_fastai'):
        (tmp_path / d).mkdir()
        for f in (root / d).iterdir():
            if f.is_file():
                (tmp_path / d / f.name).write_bytes(f.read_bytes())
    subprocess.run(['nbdev-export'], cwd=tmp_path, check=True, capture_output=True)
    for f in (root / 'eed_fastai').glob('*.py'):
        assert (tmp_path / 'eed_fastai' / f.name).read_text() == f.read_text(), (
            f'{f.name} is not what nbdev-export makes of nbs/'
        )


def test_notebooks_are_clean(tmp_path):
    for nb in notebooks:
        (tmp_path / nb.name).write_bytes(nb.read_bytes())
    subprocess.run(['nbdev-clean', '--fname', tmp_path], cwd=root, check=True, capture_output=True)
    for nb in notebooks:
        assert (tmp_path / nb.name).read_text() == nb.read_text(), f'{nb.name}: run nbdev-clean'


def pictures(code):
    "Saved pictures of these cells, as SVG or as PNG"
    data = [o.get('data', {}) for c in code for o in c['outputs']]
    return [d for d in data if 'image/png' in d or 'image/svg+xml' in d]


@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_notebook(nb):
    assert nb.stat().st_size <= 300_000
    cs = cells(nb)
    assert re.match(r'# .+\n\n> .+', source(cs[0])), 'a title and a summary come first'
    assert len({c['id'] for c in cs}) == len(cs)
    code = [c for c in cs if c['cell_type'] == 'code']
    shown = [c for c in code if c['outputs']]
    assert shown, 'no outputs are saved'
    text = json.dumps([c['outputs'] for c in code])
    assert 'object at 0x' not in text and '"error"' not in text and '█' not in text and 'Warning' not in text
    assert pictures(code), 'a chapter has a picture'
    hidden = [c for c in cs[-len(cs) // 3 :] if source(c).startswith('#| hide')]
    assert len(hidden) <= 2


def order():
    "Modules in the order of their chapters"
    found = [
        (nb.name, m[1])
        for nb in notebooks
        for c in cells(nb)[:3]
        if (m := re.search(r'#\| default_exp (\S+)', source(c)))
    ]
    return [m for _, m in found]


def imports(module):
    "What a module imports from others of the package: pairs of module and name"
    tree = ast.parse((root / f'eed_fastai/{module}.py').read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and n.level]  # nbdev writes `.x`
    return [(n.module, alias.name) for n in found for alias in n.names]


def test_imports_are_found():
    "Without this a change of how imports are written would leave the next test with nothing to look at"
    assert ('stages', '*') in imports('model') and ('exits', '*') in imports('callback')
    assert sum(len(imports(m)) for m in order()) > 50


@pytest.mark.parametrize('i,module', enumerate(order()), ids=order())
def test_imports_go_up(i, module):
    used = {m for m, _ in imports(module)}
    assert used <= set(order()[:i]), f'{module} imports {used - set(order()[:i])} from a later chapter'
    private = [name for _, name in imports(module) if name.startswith('_')]
    assert not private, f'{module} imports {private}: make them public, or do not share them'
    text = (root / f'eed_fastai/{module}.py').read_text()
    if module != 'cli':
        assert not re.search(r'(^|[^_.\w])print\(', text)
    assert not re.search(r'\b(exit|out|feat|head|loss|stage)_?[1-9]\b', text), 'exits are axis 1, not names'


@pytest.mark.parametrize('module', order())
def test_public_names_are_documented_and_shown(module):
    "A one-line docstring and docments for every public name, which a visible cell of its chapter uses"
    import importlib, inspect
    from fastcore.docments import docments

    mod = importlib.import_module(f'eed_fastai.{module}')
    nb = next(nb for nb in notebooks if any(f'default_exp {module}\n' in source(c) + '\n' for c in cells(nb)[:3]))
    shown = '\n'.join(
        source(c) for c in cells(nb) if c['cell_type'] == 'code' and not re.match(r'#\| (hide|export)', source(c))
    )
    for name in mod.__all__:
        o = getattr(mod, name)
        if not (inspect.isfunction(o) or inspect.isclass(o)):
            continue
        assert o.__doc__ and '\n' not in o.__doc__.strip(), name
        assert re.search(rf'\b{name}\b', shown), f'{name} is in no visible cell'
        f = o.__init__ if inspect.isclass(o) else o
        if inspect.isclass(o) and '__init__' not in o.__dict__:
            continue
        docs = docments(f)
        for p, v in inspect.signature(f).parameters.items():
            if p != 'self' and v.kind not in (v.VAR_KEYWORD, v.VAR_POSITIONAL):
                assert docs.get(p), f'{name}: `{p}` is not documented'


def test_importing_says_nothing():
    res = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', 'from eed_fastai.all import *'], capture_output=True, text=True
    )
    assert (res.returncode, res.stdout, res.stderr) == (0, '', '')


def readme_tool():
    spec = importlib.util.spec_from_file_location('readme', root / 'tools/readme.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


def test_readme_is_the_index():
    text, pictures = readme_tool().make()
    assert (root / 'README.md').read_text() == text, 'run python tools/readme.py'
    assert pictures and all((root / p).read_bytes() == d for p, d in pictures.items())


def test_readme_commands():
    text = (root / 'README.md').read_text()
    assert '\n    pip install . && eed_train\n' in text
    assert "\n    pip install -e '.[dev]' && nbdev-test && pytest\n" in text  # .ci/run reads it from here
    assert 'Learner(dls, multi_exit(resnet18), metrics=accuracy, cbs=EEDCallback())' in text


def test_links_lead_somewhere():
    for f in [*root.glob('*.md'), *notebooks]:
        text = (
            f.read_text()
            if f.suffix == '.md'
            else '\n'.join(source(c) for c in cells(f) if c['cell_type'] == 'markdown')
        )
        for link in re.findall(r'\]\(([^)#]+)', text):
            if link.startswith('http'):
                assert link.startswith('https://arxiv.org/abs/2104.00299'), link
            else:
                assert (f.parent / link).exists(), f'{f.name}: {link}'


def test_workflow_runs_the_same_script():
    assert 'run: bash .ci/run' in (root / '.github/workflows/test.yml').read_text()
    assert (root / 'settings.ini').read_text().startswith('# Read by setup.py')
