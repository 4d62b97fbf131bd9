"`eed_train` from a shell, as a newcomer runs it."
import json, subprocess, sys
import pandas as pd
import pytest
from conftest import all_digits, Image, Path

def eed_train(*args, cwd):
    return subprocess.run([Path(sys.executable).parent/'eed_train', *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=400)

def write_folder(path, per_class=12, classes='01'):
    for im,y in all_digits.train_ds.items:
        d = path/y
        if y not in classes or d.exists() and len(list(d.iterdir()))>=per_class: continue
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(d/f'{len(list(d.iterdir()))}.png')

def test_the_readmes_command(tmp_path):
    "`eed_train` and nothing else: digits, 97 % on the main exit, and a run folder with everything in it"
    r = eed_train(cwd=tmp_path)
    assert r.returncode==0, r.stderr[-2000:]
    out = tmp_path/'runs/digits-resnet18-eed_mse-1'
    assert sorted(o.name for o in out.iterdir()) == ['curve.png','exits.csv','history.csv','model.pth','run.json']
    exits = pd.read_csv(out/'exits.csv').set_index('exit')
    assert list(exits.columns)==['accuracy','macs','share','params'] and list(exits.index)==['exit0','exit1','exit2','main','ensemble']
    assert exits.accuracy['main'] >= 0.97 and exits['share']['main'] == 1 and exits.accuracy['exit0'] > 0.9
    history = pd.read_csv(out/'history.csv')
    assert len(history)==8 and {'exit0','exit1','exit2','main','ensemble'} <= set(history.columns)
    assert all(o in r.stdout for o in ('exit0', 'ensemble', 'train_loss', 'share', str(out.relative_to(tmp_path))))
    assert Image.open(out/'curve.png').size[0] > 400
    facts = json.loads((out/'run.json').read_text())
    assert facts['options']['seed']==42 and facts['torch'] and facts['hardware']

def test_own_images(tmp_path):
    write_folder(tmp_path/'pets')
    args = ('--data', 'pets', '--arch', 'cifar_resnet18', '--recipe', 'eed_kl_code', '--epochs', 1, '--bs', 4, '--size', 16, '--valid-pct', 0.5, '--out', 'mine')
    r = eed_train(*args, cwd=tmp_path)
    assert r.returncode==0, r.stderr[-2000:]
    assert len(pd.read_csv(tmp_path/'mine/exits.csv'))==5
    weights = (tmp_path/'mine/model.pth').read_bytes()
    r = eed_train(*args, cwd=tmp_path)
    assert r.returncode!=0 and 'mine exists already' in r.stderr and 'Traceback' not in r.stderr
    assert (tmp_path/'mine/model.pth').read_bytes()==weights

@pytest.mark.parametrize('args,message', [
    (('--data', 'nowhere'), 'There is no folder nowhere'),
    (('--arch', 'resnet81'), 'did you mean'),
    (('--recipe', 'best'), 'there are plain'),
    (('--epochs', '0'), '`epochs` is 0'),
    (('--arch', 'vit_b_16'), 'cannot be cut'),
], ids=lambda o: o if isinstance(o, str) else ' '.join(o))
def test_mistakes_are_one_line(tmp_path, args, message):
    r = eed_train(*args, cwd=tmp_path)
    assert r.returncode!=0 and message in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path/'runs').exists()

def test_help(tmp_path):
    r = eed_train('--help', cwd=tmp_path)
    assert r.returncode==0 and all(f'--{o}' in r.stdout for o in 'data arch recipe epochs lr bs size pretrained fp16 seed out'.split())
