"`eed_train` from a shell, as a newcomer runs it."

import json, subprocess, sys
import pandas as pd
import pytest
from conftest import all_digits, Image, Path
from eed_fastai import cli


def eed_train(*args, cwd):
    return subprocess.run(
        [Path(sys.executable).parent / 'eed_train', *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def write_folder(path, per_class=12, classes='01'):
    for im, y in all_digits.train_ds.items:
        d = path / y
        if y not in classes or d.exists() and len(list(d.iterdir())) >= per_class:
            continue
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(d / f'{len(list(d.iterdir()))}.png')


def test_the_readmes_command(tmp_path):
    "`eed_train` and nothing else: digits, 97 % on the main exit, and a run folder with everything in it"
    r = eed_train(cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    out = tmp_path / 'runs/digits-resnet18-eed_mse-1'
    assert sorted(o.name for o in out.iterdir()) == [
        'config.json',
        'curve.png',
        'exits.csv',
        'history.csv',
        'model.safetensors',
        'run.json',
    ]
    exits = pd.read_csv(out / 'exits.csv').set_index('exit')
    assert list(exits.columns) == [
        'accuracy',
        'macs',
        'share',
        'params',
        'activation_mb',
        'costs_more_than_main',
    ] and list(exits.index) == ['exit0', 'exit1', 'exit2', 'main', 'ensemble']
    assert exits.accuracy['main'] >= 0.97 and exits['share']['main'] == 1 and exits.accuracy['exit0'] > 0.9
    history = pd.read_csv(out / 'history.csv')
    assert len(history) == 8 and {'exit0', 'exit1', 'exit2', 'main', 'ensemble'} <= set(history.columns)
    assert all(o in r.stdout for o in ('exit0', 'ensemble', 'train_loss', 'share', str(out.relative_to(tmp_path))))
    assert Image.open(out / 'curve.png').size[0] > 400
    facts = json.loads((out / 'run.json').read_text())
    assert facts['options']['seed'] == 42 and facts['torch'] and facts['hardware']


def test_own_images(tmp_path):
    write_folder(tmp_path / 'pets')
    args = (
        '--data',
        'pets',
        '--arch',
        'cifar_resnet18',
        '--recipe',
        'eed_kl_code',
        '--epochs',
        1,
        '--bs',
        4,
        '--size',
        16,
        '--valid-pct',
        0.5,
        '--out',
        'mine',
    )
    r = eed_train(*args, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    assert len(pd.read_csv(tmp_path / 'mine/exits.csv')) == 5
    weights = (tmp_path / 'mine/model.safetensors').read_bytes()
    r = eed_train(*args, cwd=tmp_path)
    assert r.returncode != 0 and 'mine exists already' in r.stderr and 'Traceback' not in r.stderr
    assert (tmp_path / 'mine/model.safetensors').read_bytes() == weights


def test_a_mistake_is_one_line(tmp_path):
    r = eed_train('--data', 'nowhere', cwd=tmp_path)
    assert r.returncode != 0 and 'There is no folder nowhere' in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    'kw,message',
    [
        (dict(arch='resnet81'), 'did you mean'),
        (dict(recipe='best'), 'there are plain'),
        (dict(epochs=0), '`epochs` is 0'),
        (dict(arch='vit_b_16'), 'cannot be cut'),
    ],
    ids=str,
)
def test_mistakes(tmp_path, kw, message):
    with pytest.raises(ValueError, match=message):
        cli.eed_train(**kw)
    assert not (tmp_path / 'runs').exists()


def command(name, *args, cwd):
    return subprocess.run(
        [Path(sys.executable).parent / name, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=1200
    )


def test_from_images_to_graphs(tmp_path):
    "Train, find a policy, predict files and export, each from the shell"
    write_folder(tmp_path / 'pets', per_class=30)
    r = eed_train(
        '--data',
        'pets',
        '--arch',
        'resnet18',
        '--epochs',
        3,
        '--bs',
        8,
        '--size',
        32,
        '--valid-pct',
        0.5,
        '--out',
        'run',
        cwd=tmp_path,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    r = command('eed_eval', 'run', '--budget', 0.8, cwd=tmp_path)
    assert r.returncode == 0 and 'exit0' in r.stdout and 'reported' in r.stdout, r.stderr[-2000:]
    assert (
        json.loads((tmp_path / 'run/config.json').read_text())['policy']
        and Image.open(tmp_path / 'run/early.png').size[0] > 400
    )
    assert {'target', 'cost', 'accuracy'} <= set(pd.read_csv(tmp_path / 'run/early.csv').figure)
    r = command('eed_predict', 'run', 'pets/0', 'pets/1/0.png', '--csv', 'answers.csv', cwd=tmp_path)
    answers = pd.read_csv(tmp_path / 'answers.csv', dtype=dict(answer=str))
    assert (
        r.returncode == 0 and list(answers.columns) == ['file', 'answer', 'probability', 'exit'] and len(answers) == 31
    )
    assert '100.00%' in r.stdout + r.stderr  # progress
    assert (
        set(answers.answer) <= {'0', '1'}
        and set(answers.exit) <= {'exit0', 'exit1', 'exit2', 'main'}
        and answers.probability.between(0.5, 1).all()
    )
    r = command('eed_export', 'run', cwd=tmp_path)
    assert (
        r.returncode == 0
        and (tmp_path / 'run/onnx/stage3.onnx').exists()
        and (tmp_path / 'run/onnx/runtime.py').exists()
    ), r.stderr[-2000:]
    for f, args, kw, said in (
        (cli.eed_eval, ['nowhere'], {}, 'config.json'),
        (cli.eed_eval, ['run'], dict(budget=1e-3), 'cheapest setting'),
        (cli.eed_predict, ['run'], {}, 'Give image files'),
        (cli.eed_predict, ['run', 'run/run.json'], {}, 'cannot be read as an image'),
        (cli.eed_export, ['run'], {}, 'exists already'),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            f(*args, **kw)
    (tmp_path / 'pets/0/0.png').unlink()
    with pytest.raises(ValueError, match='have changed since'):
        cli.eed_eval('run', budget=0.8)


def test_help(tmp_path):
    r = eed_train('--help', cwd=tmp_path)
    assert r.returncode == 0 and all(
        f'--{o}' in r.stdout for o in 'data arch recipe epochs lr bs size pretrained fp16 seed out'.split()
    )
